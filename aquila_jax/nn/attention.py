"""Causal grouped-query attention over packed rows."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from aquila_jax.axes import BATCH, KV_HEADS, Q_HEADS
from aquila_jax.config import ModelConfig
from aquila_jax.nn.layers import declare, rms_norm, rotary
from aquila_jax.sharding import Layout


def causal_mask(segment_ids_BT: Int[Array, "B T"]) -> Bool[Array, "B 1 T T"]:
    """Which key (last axis) each query may see: an earlier or equal token of its document."""
    num_tokens = segment_ids_BT.shape[1]
    same_document = segment_ids_BT[:, :, None] == segment_ids_BT[:, None, :]
    earlier = jnp.tril(jnp.ones((num_tokens, num_tokens), dtype=bool))
    return (same_document & earlier)[:, None]


class Attention(nn.Module):
    """Grouped-query attention (arXiv 2305.13245): query head n reads KV head n // G."""

    config: ModelConfig
    dtype: DTypeLike
    layout: Layout | None = None

    @nn.compact
    def __call__(
        self,
        x_BTD: Float[Array, "B T D"],
        positions_BT: Int[Array, "B T"],
        mask_B1TT: Bool[Array, "B 1 T T"],
    ) -> Float[Array, "B T D"]:
        """The residual update, in `dtype`; the softmax is computed in float32."""
        query_BTNH = self._project(x_BTD, "query", Q_HEADS)
        key_BTKH = self._project(x_BTD, "key", KV_HEADS)
        value_BTKH = self._project(x_BTD, "value", KV_HEADS)
        if self.config.qk_norm:
            query_BTNH = self._normalise(query_BTNH, "query_norm")
            key_BTKH = self._normalise(key_BTKH, "key_norm")
        theta, scaling = self.config.rope_theta, self.config.rope_scaling
        mixed_BTNH = jax.nn.dot_product_attention(
            rotary(query_BTNH, positions_BT, theta, scaling),
            rotary(key_BTKH, positions_BT, theta, scaling),
            value_BTKH,
            mask=mask_B1TT,
        )
        out_NHD = declare(self, self.config, "layers/attention/out").astype(self.dtype)
        return jnp.einsum("BTNH,NHD->BTD", mixed_BTNH, out_NHD)

    def _normalise(self, heads_BTNH: jax.Array, name: str) -> jax.Array:
        """Every head's vector by itself; all heads share one gain."""
        gain_H = declare(self, self.config, f"layers/attention/{name}")
        return rms_norm(heads_BTNH, gain_H, self.config.norm_eps)

    def _project(self, x_BTD: jax.Array, name: str, heads: str) -> jax.Array:
        """Query, key or value: `[B, T, N, H]` or `[B, T, K, H]`."""
        path = f"layers/attention/{name}"
        kernel_DNH = declare(self, self.config, path).astype(self.dtype)
        projected_BTNH = jnp.einsum("BTD,DNH->BTNH", x_BTD, kernel_DNH)
        if self.config.qkv_bias:
            projected_BTNH += declare(self, self.config, f"{path}_bias").astype(self.dtype)
        if self.layout is not None:
            projected_BTNH = self.layout.constrain(projected_BTNH, BATCH, None, heads, None)
        return projected_BTNH
