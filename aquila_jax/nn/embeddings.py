"""Tokens' rows of the embedding table, which a mesh holds in parts of its width."""

import functools

import jax
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from aquila_jax.axes import BATCH, VOCAB
from aquila_jax.config import ModelConfig
from aquila_jax.sharding import Layout

# Columns of a part that is worth looking up in: a TPU's registers are as wide.
_LEAST_COLUMNS = 128


def embed(
    embedding_VD: Float[Array, "V D"],
    tokens_BT: Int[Array, "B T"],
    dtype: DTypeLike,
    config: ModelConfig,
    layout: Layout | None,
) -> Float[Array, "B T D"]:
    """`embedding_VD[tokens_BT]` in `dtype`.

    On a mesh, devices that share the width look each other's tokens up in what they hold, and
    exchange what they found, so that neither the table nor its gradient stands whole on a device.
    Parts that are too narrow for that are joined first, over the last of the mesh axes.
    """
    if layout is None or layout.mesh.size == 1 or layout.shards(VOCAB) > 1:
        return embedding_VD[tokens_BT].astype(dtype)
    exchanged, gathered = _axes(config, layout)
    if tokens_BT.shape[0] % layout.batch_shards or not set(exchanged) <= set(
        layout.mesh_axes(BATCH)
    ):
        return embedding_VD[tokens_BT].astype(dtype)
    return layout.shard_map(
        functools.partial(_on_shards, dtype, exchanged, gathered),
        (layout.parameter_spec("token_embedder/embedding", config), (BATCH, None)),
        (BATCH, None, None),
    )(embedding_VD, tokens_BT)


def _axes(config: ModelConfig, layout: Layout) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Mesh axes over which to exchange rows, and those after them, to gather the table over."""
    width = layout.width_axes(config)
    columns, number = config.embed_dim, 0
    for name in width:
        columns //= layout.mesh.shape[name]
        if columns < _LEAST_COLUMNS:
            break
        number += 1
    return width[:number], width[number:]


def _on_shards(
    dtype: DTypeLike,
    exchanged: tuple[str, ...],
    gathered: tuple[str, ...],
    embedding_VD: jax.Array,
    tokens_BT: jax.Array,
) -> jax.Array:
    # Rows are cast when found: gradients of a token's many places add up in the dtype of the table.
    if gathered:
        embedding_VD = lax.all_gather(embedding_VD, gathered, axis=1, tiled=True)
    if exchanged:
        tokens_BT = lax.all_gather(tokens_BT, exchanged, tiled=True)
    found_BTD = embedding_VD[tokens_BT].astype(dtype)
    return lax.all_to_all(found_BTD, exchanged, 0, 2, tiled=True) if exchanged else found_BTD
