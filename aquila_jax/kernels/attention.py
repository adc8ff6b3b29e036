"""Causal attention over packed rows, and the one place that chooses how it is computed.

On a TPU by splash attention, which skips what a causal mask hides and never builds the mask; on a
GPU by cuDNN; anywhere else, and wherever those do not fit, by XLA, in blocks of queries that leave
out most of what the mask hides.
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

# Without a kernel: queries of a block at least, and blocks of a row at most, as each is compiled.
_LEAST_QUERIES = 128
_MOST_BLOCKS = 8


def causal_mask(segment_ids_BT: Int[Array, "B T"]) -> Bool[Array, "B 1 T T"]:
    """Which key (last axis) each query may see: an earlier or equal token of its document."""
    return _sees_earlier(segment_ids_BT, segment_ids_BT)[:, None]


def _sees_earlier(
    last_BT: Int[Array, "B T"], segment_ids_BS: Int[Array, "B S"]
) -> Bool[Array, "B T S"]:
    """The same of a row's last T tokens among all its S."""
    same_document = last_BT[:, :, None] == segment_ids_BS[:, None, :]
    num_last, num_tokens = same_document.shape[1:]
    earlier = jnp.tril(jnp.ones((num_last, num_tokens), dtype=bool), num_tokens - num_last)
    return same_document & earlier


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
    if chosen == "cudnn":
        return _cudnn(*operands)
    if chosen == "xla":
        return _in_blocks(*operands)
    return jax.lax.platform_dependent(*operands, tpu=splash, default=_in_blocks)


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


def _cudnn(
    query_BTNH: jax.Array, key_BTKH: jax.Array, value_BTKH: jax.Array, segment_ids_BT: jax.Array
) -> jax.Array:
    mask = causal_mask(segment_ids_BT)
    return jax.nn.dot_product_attention(
        query_BTNH, key_BTKH, value_BTKH, mask=mask, implementation="cudnn"
    )


def _in_blocks(
    query_BTNH: jax.Array, key_BTKH: jax.Array, value_BTKH: jax.Array, segment_ids_BT: jax.Array
) -> jax.Array:
    """Each block of queries with the keys up to its own last one."""
    num_tokens, num_kv_heads = key_BTKH.shape[1:3]
    # Heads first, and a group's queries as rows of one matrix: XLA then multiplies in place.
    grouped_BTKGH = query_BTNH.reshape(*query_BTNH.shape[:2], num_kv_heads, -1, key_BTKH.shape[-1])
    query_BKGTH = grouped_BTKGH.transpose(0, 2, 3, 1, 4)
    key_BKTH, value_BKTH = key_BTKH.swapaxes(1, 2), value_BTKH.swapaxes(1, 2)
    length = max(_LEAST_QUERIES, -(-num_tokens // _MOST_BLOCKS))
    mixed = []
    for start in range(0, num_tokens, length):
        end = min(start + length, num_tokens)
        operands = query_BKGTH[..., start:end, :], key_BKTH[:, :, :end], value_BKTH[:, :, :end]
        segments = segment_ids_BT[:, start:end], segment_ids_BT[:, :end]
        mixed.append(_block(*operands, *segments))
    mixed_BKGTH = jnp.concatenate(mixed, axis=3)
    return mixed_BKGTH.transpose(0, 3, 1, 2, 4).reshape(query_BTNH.shape)


# Scores are computed again for the backward pass: as numbers they grow with the square of a row's
# length. Layers are scanned, where nothing undoes that.
@functools.partial(jax.checkpoint, prevent_cse=False)
def _block(
    query_BKGTH: jax.Array,
    key_BKSH: jax.Array,
    value_BKSH: jax.Array,
    segment_ids_BT: jax.Array,
    segment_ids_BS: jax.Array,
) -> jax.Array:
    sees_BTS = _sees_earlier(segment_ids_BT, segment_ids_BS)
    batch, num_kv_heads, group, length, head_dim = query_BKGTH.shape
    wide = jnp.promote_types(query_BKGTH.dtype, jnp.float32)
    rows_BKRH = query_BKGTH.reshape(batch, num_kv_heads, group * length, head_dim)
    scores_BKRS = jnp.einsum("BKRH,BKSH->BKRS", rows_BKRH, key_BKSH, preferred_element_type=wide)
    scores_BKGTS = scores_BKRS.reshape(batch, num_kv_heads, group, length, -1)
    scaled_BKGTS = scores_BKGTS / jnp.sqrt(jnp.asarray(head_dim, wide))
    seen_BKGTS = jnp.where(sees_BTS[:, None, None], scaled_BKGTS, jnp.finfo(wide).min)
    highest_BKGT1 = jax.lax.stop_gradient(seen_BKGTS.max(axis=-1, keepdims=True))
    weights_BKGTS = jnp.exp(seen_BKGTS - highest_BKGT1)
    weights_BKRS = weights_BKGTS.reshape(scores_BKRS.shape).astype(value_BKSH.dtype)
    # Divided by their sum after mixing: H numbers for a row in place of S.
    mixed_BKRH = jnp.einsum(
        "BKRS,BKSH->BKRH", weights_BKRS, value_BKSH, preferred_element_type=wide
    )
    mixed_BKGTH = mixed_BKRH.reshape(query_BKGTH.shape)
    return (mixed_BKGTH / weights_BKGTS.sum(axis=-1)[..., None]).astype(query_BKGTH.dtype)


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
