"""Causal grouped-query attention over packed rows, and over what earlier calls left."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from aquila_jax.axes import BATCH, EMBED, HEAD_DIM, KV_HEADS, Q_HEADS
from aquila_jax.config import ModelConfig
from aquila_jax.kernels.attention import MIXED, attend, causal_mask
from aquila_jax.nn.layers import Rotation, declare, project, rms_norm, rotary, weights
from aquila_jax.sharding import Layout

# The Linen collection in which attention leaves the keys and values of this call's tokens, and the
# one in which it finds those of earlier calls (see `aquila_jax.nn.cache`). Layers stack both.
KEY_VALUE = "key_value"
CACHE = "cache"

# Names of activations, for policies of recomputation.
QUERY, KEY, VALUE = "query", "key", "value"


def attend_cached(
    query_BTNH: Float[Array, "B T N H"],
    cached: tuple[Float[Array, "B S K H"], Float[Array, "B S K H"]],
    new: tuple[Float[Array, "B T K H"], Float[Array, "B T K H"]],
    sees_cached_BTS: Bool[Array, "B T S"],
    segment_ids_BT: Int[Array, "B T"],
) -> Float[Array, "B T N H"]:
    """Attention to cached and new tokens at once, without joining their arrays.

    Args:
        query_BTNH: turned queries of the new tokens.
        cached: turned keys, and values, of earlier tokens.
        new: those of the new tokens.
        sees_cached_BTS: which of the cached tokens each query may see.
        segment_ids_BT: of the new tokens, which see earlier ones of their own document.

    Returns:
        Mixed values, in the dtype of the queries; scores and softmax are float32 at least.
    """
    mask_B1TS = jnp.concatenate([sees_cached_BTS[:, None], causal_mask(segment_ids_BT)], axis=-1)
    num_cached, num_kv_heads, head_dim = cached[0].shape[1:]
    query_BTKGH = query_BTNH.reshape(*query_BTNH.shape[:2], num_kv_heads, -1, head_dim)
    wide = jnp.promote_types(query_BTNH.dtype, jnp.float32)
    scores_BKGTS = jnp.concatenate(
        [
            jnp.einsum("BTKGH,BSKH->BKGTS", query_BTKGH, key_BSKH, preferred_element_type=wide)
            for key_BSKH in (cached[0], new[0])
        ],
        axis=-1,
    )
    scores_BKGTS = scores_BKGTS / jnp.sqrt(jnp.asarray(head_dim, wide))
    seen_BKGTS = jnp.where(mask_B1TS[:, :, None], scores_BKGTS, jnp.finfo(wide).min)
    weights_BKGTS = jax.nn.softmax(seen_BKGTS, axis=-1).astype(query_BTNH.dtype)
    mixed_BTKGH = jnp.einsum(
        "BKGTS,BSKH->BTKGH", weights_BKGTS[..., :num_cached], cached[1]
    ) + jnp.einsum("BKGTS,BSKH->BTKGH", weights_BKGTS[..., num_cached:], new[1])
    return mixed_BTKGH.reshape(query_BTNH.shape)


class Attention(nn.Module):
    """Grouped-query attention (arXiv 2305.13245): query head n reads KV head n // G."""

    config: ModelConfig
    dtype: DTypeLike
    layout: Layout | None = None

    @nn.compact
    def __call__(
        self,
        x_BTD: Float[Array, "B T D"],
        angles: Rotation,
        segment_ids_BT: Int[Array, "B T"],
        sees_cached_BTS: Bool[Array, "B T S"] | None = None,
    ) -> Float[Array, "B T D"]:
        """The residual update, in `dtype`; the softmax is computed in float32.

        Keys are this call's tokens, after those in the `CACHE` collection where there is one.
        """
        query_BTNH = self._project(x_BTD, "query", Q_HEADS)
        key_BTKH = self._project(x_BTD, "key", KV_HEADS)
        value_BTKH = self._project(x_BTD, "value", KV_HEADS)
        if self.config.qk_norm:
            query_BTNH = self._normalise(query_BTNH, "query_norm")
            key_BTKH = self._normalise(key_BTKH, "key_norm")
        query_BTNH = checkpoint_name(rotary(query_BTNH, angles), QUERY)
        key_BTKH = rotary(key_BTKH, angles)
        key_BTKH, value_BTKH = checkpoint_name(key_BTKH, KEY), checkpoint_name(value_BTKH, VALUE)
        if self.is_mutable_collection(KEY_VALUE) and not self.is_initializing():
            self.put_variable(KEY_VALUE, "key", key_BTKH)
            self.put_variable(KEY_VALUE, "value", value_BTKH)
        if self.has_variable(CACHE, "key"):
            cached = (self.get_variable(CACHE, "key"), self.get_variable(CACHE, "value"))
            assert sees_cached_BTS is not None
            mixed_BTNH = attend_cached(
                query_BTNH, cached, (key_BTKH, value_BTKH), sees_cached_BTS, segment_ids_BT
            )
        else:
            mixed_BTNH = attend(
                query_BTNH, key_BTKH, value_BTKH, segment_ids_BT, layout=self.layout
            )
        mixed_BTNH = checkpoint_name(mixed_BTNH, MIXED)
        out_NHD = weights(self, self.config, "layers/attention/out", self.dtype)
        if self.layout is not None:
            out_NHD = self.layout.join_width(out_NHD, (Q_HEADS, HEAD_DIM, EMBED))
        return project(mixed_BTNH, out_NHD, self.layout)

    def _normalise(self, heads_BTNH: jax.Array, name: str) -> jax.Array:
        """Every head's vector by itself; all heads share one gain."""
        gain_H = declare(self, self.config, f"layers/attention/{name}")
        return rms_norm(heads_BTNH, gain_H, self.config.norm_eps)

    def _project(self, x_BTD: jax.Array, name: str, heads: str) -> jax.Array:
        """Query, key or value: `[B, T, N, H]` or `[B, T, K, H]`."""
        path = f"layers/attention/{name}"
        kernel_DNH = weights(self, self.config, path, self.dtype)
        if self.layout is not None:
            kernel_DNH = self.layout.join_width(kernel_DNH, (EMBED, heads, HEAD_DIM))
        projected_BTNH = project(x_BTD, kernel_DNH, self.layout)
        if self.config.qkv_bias:
            projected_BTNH += weights(self, self.config, f"{path}_bias", self.dtype)
        if self.layout is not None:
            projected_BTNH = self.layout.constrain(projected_BTNH, BATCH, None, heads, None)
        return projected_BTNH
