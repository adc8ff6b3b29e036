"""The experts themselves, on rows sorted by expert, in fixed slots, or on every token."""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from aquila_jax.axes import BATCH, EXPERT_MLP
from aquila_jax.kernels import grouped_matmul
from aquila_jax.nn.layers import gated_units, project
from aquila_jax.sharding import Layout

# Bytes of hidden units that a device may hold at once: more than the first only where they are of
# no more units than the residual has channels, since every part goes over all outputs once more.
_PART_BYTES, _MOST_PART_BYTES = 2**28, 2**30
_LANES = 128


class Weights(NamedTuple):
    """Matrices of the experts that are here, in the dtype of activations."""

    gate_EDF: jax.Array
    up_EDF: jax.Array
    down_EFD: jax.Array


class Shards(NamedTuple):
    """The matrices as one device holds them: a part of the residual's width.

    Attributes:
        gate_EDF: its rows by `embed_axes`.
        up_EDF: the same.
        down_EFD: its columns.
        embed_axes: mesh axes over which D is split, if any.
    """

    gate_EDF: jax.Array
    up_EDF: jax.Array
    down_EFD: jax.Array
    embed_axes: tuple[str, ...] = ()

    def parts(self, number: int) -> "Shards":
        """Arrays with an axis in front, along which hidden units are in so many parts."""
        gate, up = (_leading(x_EDF, number, 2) for x_EDF in (self.gate_EDF, self.up_EDF))
        return Shards(gate, up, _leading(self.down_EFD, number, 1), self.embed_axes)

    def whole(self) -> "Whole":
        """Gathered, where they are split.

        Gradients are summed over devices in the dtype of the weights.
        """
        if not self.embed_axes:
            return Whole(self.gate_EDF, self.up_EDF, self.down_EFD, is_transposed=False)
        arrays = (self.gate_EDF, self.up_EDF, self.down_EFD.swapaxes(1, 2))
        gathered = (_gather_rows(x_EDF, self.embed_axes) for x_EDF in arrays)
        return Whole(*gathered, is_transposed=True)


class Whole(NamedTuple):
    """Matrices that products read.

    Attributes:
        gate_EDF: as it is.
        up_EDF: as it is.
        down: EFD; or EDF where it was gathered by its columns, which came as rows. Either is read
            as it lies: kernels would have the other written out first.
        is_transposed: which of the two.
    """

    gate_EDF: jax.Array
    up_EDF: jax.Array
    down: jax.Array
    is_transposed: bool


def _gather_rows(x_EDF: jax.Array, mesh_axes: tuple[str, ...]) -> jax.Array:
    """All devices' rows of every matrix.

    As one matrix meanwhile, whose rows are split: of such gradients XLA for TPUs (jax 0.10) makes a
    reduce-scatter, of others an all-reduce, which moves twice as much.
    """
    num_experts, _, hidden_dim = x_EDF.shape
    x_DX = x_EDF.swapaxes(0, 1).reshape(-1, num_experts * hidden_dim)
    x_DX = lax.all_gather(x_DX, mesh_axes, tiled=True)
    return x_DX.reshape(-1, num_experts, hidden_dim).swapaxes(0, 1)


def _leading(x: jax.Array, parts: int, axis: int) -> jax.Array:
    split = x.reshape(*x.shape[:axis], parts, -1, *x.shape[axis + 1 :])
    return jnp.moveaxis(split, axis, 0)


def on_sorted_rows(
    rows_MD: Float[Array, "M D"],
    weights: Shards,
    sizes_E: Int[Array, " E"],
    gates_M: Float[Array, " M"] | None = None,
    parts: int | None = None,
) -> Float[Array, "M D"]:
    """Outputs of rows that are sorted by expert, `sizes_E` of each; those behind are undefined.

    Args:
        rows_MD: rows.
        weights: the experts' matrices.
        sizes_E: rows of every expert.
        gates_M: by what outputs are multiplied, if by anything.
        parts: into how many parts hidden units are cut, which are computed one after the other,
            and again for the backward pass, so that a part's units stand in memory and no more.
            None for as many as `_PART_BYTES` asks for; 1 without gates, whose gradients would
            ask for whole outputs.
    """

    def add(out_MD: jax.Array, part: tuple[jax.Array, ...]) -> tuple[jax.Array, None]:
        gate, up, down = part
        shards = Shards(gate, up, down, weights.embed_axes)
        return out_MD + _through_hidden(rows_MD, shards, sizes_E, gates_M), None

    if parts is None:
        parts = 1 if gates_M is None else _parts(rows_MD, weights.gate_EDF.shape[2])
    if parts == 1:
        return _through_hidden(rows_MD, weights, sizes_E, gates_M)
    cut = tuple(weights.parts(parts))[:3]
    return lax.scan(jax.checkpoint(add, prevent_cse=False), jnp.zeros_like(rows_MD), cut)[0]


def _parts(rows_MD: jax.Array, hidden_dim: int) -> int:
    """The fewest parts that are small enough, of whole tiles of matrix products."""
    num_rows, embed_dim = rows_MD.shape
    number = 1
    while hidden_dim % (2 * number * _LANES) == 0:
        units = hidden_dim // number
        size = num_rows * units * rows_MD.dtype.itemsize
        if size <= (_PART_BYTES if units > embed_dim else _MOST_PART_BYTES):
            break
        number *= 2
    return number


def _through_hidden(
    rows_MD: jax.Array, weights: Shards, sizes_E: jax.Array, gates_M: jax.Array | None
) -> jax.Array:
    gate_EDF, up_EDF, down, is_transposed = weights.whole()

    # Activated units are computed again for the backward pass: cheap, and as large as what is kept.
    @jax.checkpoint
    def read_out(gate_MF: jax.Array, up_MF: jax.Array, down: jax.Array) -> jax.Array:
        hidden_MF = _weighted(nn.silu(gate_MF) * up_MF, gates_M)
        return grouped_matmul(hidden_MF, down, sizes_E, transpose=is_transposed)

    gate_MF = grouped_matmul(rows_MD, gate_EDF, sizes_E)
    up_MF = grouped_matmul(rows_MD, up_EDF, sizes_E)
    return read_out(gate_MF, up_MF, down)


def _weighted(hidden: jax.Array, gates: jax.Array | None) -> jax.Array:
    return hidden if gates is None else (hidden * gates[..., None]).astype(hidden.dtype)


def on_slots(
    rows_MD: Float[Array, "M D"], weights: Shards, gates_M: Float[Array, " M"] | None = None
) -> Float[Array, "M D"]:
    """Outputs of rows of which every expert has equally many, those of one after the other.

    Weighted by `gates_M` where they are given.
    """
    gate_EDF, up_EDF, down, is_transposed = weights.whole()
    num_experts, embed_dim, _ = gate_EDF.shape
    rows_ECD = rows_MD.reshape(num_experts, -1, embed_dim)
    gates_EC = None if gates_M is None else gates_M.reshape(num_experts, -1)

    @jax.checkpoint
    def read_out(gate_ECF: jax.Array, up_ECF: jax.Array, down: jax.Array) -> jax.Array:
        hidden_ECF = _weighted(nn.silu(gate_ECF) * up_ECF, gates_EC)
        if is_transposed:
            return jnp.einsum("ECF,EDF->ECD", hidden_ECF, down)
        return jnp.einsum("ECF,EFD->ECD", hidden_ECF, down)

    gate_ECF = jnp.einsum("ECD,EDF->ECF", rows_ECD, gate_EDF)
    up_ECF = jnp.einsum("ECD,EDF->ECF", rows_ECD, up_EDF)
    return read_out(gate_ECF, up_ECF, down).reshape(rows_MD.shape)


def on_all_tokens(
    x_BTD: Float[Array, "B T D"],
    gates_BTE: Float[Array, "B T E"],
    weights: Weights,
    layout: Layout | None,
) -> Float[Array, "B T D"]:
    """The experts' outputs, weighted and summed: every expert on every token, one after the other.

    In turn rather than at once: the hidden units of one expert fit in a cache, those of all do
    not, and they are computed again for the backward pass rather than stored.
    """

    @jax.checkpoint
    def add_expert(sum_BTD: jax.Array, expert: tuple[jax.Array, ...]) -> tuple[jax.Array, None]:
        gate_DF, up_DF, down_FD, gate_BT = expert
        hidden_BTF = gated_units(x_BTD, gate_DF, up_DF, layout) * gate_BT[..., None]
        if layout is not None:
            hidden_BTF = layout.constrain(hidden_BTF, BATCH, None, EXPERT_MLP)
        return sum_BTD + project(hidden_BTF, down_FD, layout), None

    gates_EBT = jnp.moveaxis(gates_BTE.astype(x_BTD.dtype), -1, 0)
    out_BTD, _ = jax.lax.scan(add_expert, jnp.zeros_like(x_BTD), (*weights, gates_EBT))
    return out_BTD
