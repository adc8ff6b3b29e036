"""Causal attention over packed rows, and the one place that chooses how it is computed.

On a TPU by splash attention, which skips what a causal mask hides and never builds the mask; on a
GPU by cuDNN; anywhere else, and wherever those do not fit, by XLA.
"""

import functools
import logging
from typing import Literal, cast

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_kernel,
    splash_attention_mask,
)
from jaxtyping import Array, Bool, Float, Int

from aquila_jax.axes import BATCH, KV_HEADS, Q_HEADS
from aquila_jax.sharding import Layout

AttentionBackend = Literal["auto", "xla", "cudnn", "splash", "interpret"]
"""How to compute: `interpret` is splash attention carried out on a CPU, to test it. `auto` is
`splash` where the program is compiled for a TPU, whatever the machine that compiles it, `cudnn` on
a GPU, and `xla` elsewhere."""

# What splash attention stores for its backward pass, for policies of recomputation.
MIXED = "mixed"

# Rows and columns of scores that splash attention holds at once, the largest that divides T.
_BLOCKS = (512, 256, 128)


def causal_mask(segment_ids_BT: Int[Array, "B T"]) -> Bool[Array, "B 1 T T"]:
    """Which key (last axis) each query may see: an earlier or equal token of its document."""
    num_tokens = segment_ids_BT.shape[1]
    same_document = segment_ids_BT[:, :, None] == segment_ids_BT[:, None, :]
    earlier = jnp.tril(jnp.ones((num_tokens, num_tokens), dtype=bool))
    return (same_document & earlier)[:, None]


def attend(
    query_BTNH: Float[Array, "B T N H"],
    key_BTKH: Float[Array, "B T K H"],
    value_BTKH: Float[Array, "B T K H"],
    segment_ids_BT: Int[Array, "B T"],
    *,
    layout: Layout | None = None,
    backend: AttentionBackend = "auto",
) -> Float[Array, "B T N H"]:
    """Grouped-query attention (arXiv 2305.13245): query head n reads KV head n // G.

    Args:
        query_BTNH: turned queries.
        key_BTKH: turned keys.
        value_BTKH: values.
        segment_ids_BT: tokens see earlier ones of their own document, and themselves.
        layout: where rows and heads lie on a mesh.
        backend: how to compute.

    Returns:
        Mixed values, in the dtype of the queries; the softmax is float32.
    """
    operands = query_BTNH, key_BTKH, value_BTKH, segment_ids_BT
    splash = functools.partial(_splash, layout=layout, interpret=backend == "interpret")
    chosen, why = _choose(query_BTNH, layout, backend)
    _log_once(chosen, why)
    if chosen in ("splash", "interpret"):
        return splash(*operands)
    if chosen != "auto":
        return _jax_nn(*operands, implementation=chosen)
    xla = functools.partial(_jax_nn, implementation="xla")
    return jax.lax.platform_dependent(*operands, tpu=splash, default=xla)


def _choose(
    query_BTNH: jax.Array, layout: Layout | None, backend: AttentionBackend
) -> tuple[AttentionBackend, str]:
    """The backend, and what speaks against a faster one; `auto` is left to the compiler."""
    if backend != "auto":
        return backend, "as asked for"
    platform = jax.default_backend() if layout is None else layout.platform
    if platform == "gpu":
        head_dim, is_half = query_BTNH.shape[-1], query_BTNH.dtype in (jnp.bfloat16, jnp.float16)
        if is_half and head_dim % 8 == 0 and head_dim <= 128:
            return "cudnn", "on a GPU"
        return "xla", f"cuDNN takes 16 bits and head_dim to 128, not {query_BTNH.dtype} {head_dim}"
    if query_BTNH.shape[1] % _BLOCKS[-1] or query_BTNH.dtype == jnp.float64:
        return "xla", f"rows of {query_BTNH.shape[1]} tokens are no multiple of {_BLOCKS[-1]}"
    if layout is None:
        return "auto", "splash on a TPU, xla elsewhere"
    if platform != "tpu":
        return "xla", f"on {platform}"
    if layout.mesh_axes(Q_HEADS) != layout.mesh_axes(KV_HEADS):
        return "xla", "query and key/value heads are not split over the same mesh axes"
    return "splash", "on a TPU"


@functools.cache
def _log_once(chosen: str, why: str) -> None:
    logging.getLogger(__name__).info("attention by %s: %s", chosen, why)


def _jax_nn(
    query_BTNH: jax.Array,
    key_BTKH: jax.Array,
    value_BTKH: jax.Array,
    segment_ids_BT: jax.Array,
    *,
    implementation: str,
) -> jax.Array:
    return jax.nn.dot_product_attention(
        query_BTNH,
        key_BTKH,
        value_BTKH,
        mask=causal_mask(segment_ids_BT),
        implementation=cast(Literal["xla", "cudnn"], implementation),
    )


def _splash(
    query_BTNH: jax.Array,
    key_BTKH: jax.Array,
    value_BTKH: jax.Array,
    segment_ids_BT: jax.Array,
    *,
    layout: Layout | None,
    interpret: bool,
) -> jax.Array:
    on_shard = functools.partial(_splash_on_shard, interpret=interpret)
    if layout is not None:
        heads, kv_heads = (BATCH, None, Q_HEADS, None), (BATCH, None, KV_HEADS, None)
        on_shard = layout.shard_map(on_shard, (heads, kv_heads, kv_heads, (BATCH, None)), heads)
    return on_shard(query_BTNH, key_BTKH, value_BTKH, segment_ids_BT)


def _splash_on_shard(
    query_BTNH: jax.Array,
    key_BTKH: jax.Array,
    value_BTKH: jax.Array,
    segment_ids_BT: jax.Array,
    *,
    interpret: bool,
) -> jax.Array:
    num_tokens, num_heads, head_dim = query_BTNH.shape[1:]
    block = next(size for size in _BLOCKS if num_tokens % size == 0)
    mask = splash_attention_mask.CausalMask((num_tokens, num_tokens))
    kernel = splash_attention_kernel.make_splash_mha(
        splash_attention_mask.MultiHeadMask([mask] * num_heads),
        block_sizes=splash_attention_kernel.BlockSizes(
            block_q=block,
            block_kv=block,
            block_q_dkv=block,
            block_kv_dkv=block,
            block_q_dq=block,
            block_kv_dq=block,
        ),
        head_shards=1,
        q_seq_shards=1,
        residual_checkpoint_name=MIXED,
        interpret=interpret,
    )
    scale = 1 / jnp.sqrt(jnp.float32(head_dim))
    scaled_BTNH = (query_BTNH.astype(jnp.float32) * scale).astype(query_BTNH.dtype)
    q_BNTH, k_BKTH, v_BKTH = (jnp.swapaxes(x, 1, 2) for x in (scaled_BTNH, key_BTKH, value_BTKH))
    segments = splash_attention_kernel.SegmentIds(segment_ids_BT, segment_ids_BT)
    # It would return more if it were told to save what it leaves for the backward pass.
    mixed_BNTH = cast(jax.Array, jax.vmap(kernel)(q_BNTH, k_BKTH, v_BKTH, segments))
    return jnp.swapaxes(mixed_BNTH, 1, 2)
