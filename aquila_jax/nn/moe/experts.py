"""The experts themselves, on rows sorted by expert, in fixed slots, or on every token."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from aquila_jax.axes import BATCH, EXPERT_MLP
from aquila_jax.kernels import grouped_matmul
from aquila_jax.nn.layers import project, swiglu
from aquila_jax.sharding import Layout

# Bytes of hidden units that a device may hold at once: more than the first only where they are of
# no more units than the residual has channels, since every part goes over all outputs once more.
_PART_BYTES, _MOST_PART_BYTES = 2**28, 2**30
_LANES = 128
# Rows of a tile of matrix products on a TPU.
_ROW_TILE = 512


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

    @property
    def transposes_down(self) -> bool:
        """Whether `whole` has the down matrices as EDF.

        What is gathered by its columns comes as rows, and is read as it lies: kernels would have
        the other written out first.
        """
        return bool(self.embed_axes)

    def whole(self) -> "Whole":
        """Gathered, where they are split.

        Gradients are summed over devices in the dtype of the weights.
        """
        if not self.embed_axes:
            return Whole(self.gate_EDF, self.up_EDF, self.down_EFD)
        arrays = (self.gate_EDF, self.up_EDF, self.down_EFD.swapaxes(1, 2))
        return Whole(*(_gather_rows(x_EDF, self.embed_axes) for x_EDF in arrays))


class Whole(NamedTuple):
    """Matrices that products read.

    Attributes:
        gate_EDF: as it is.
        up_EDF: as it is.
        down: EFD; or, where it was gathered by its columns, EDF.
    """

    gate_EDF: jax.Array
    up_EDF: jax.Array
    down: jax.Array


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

    With gates, hidden units are computed in parts, one after the other, and again for the backward
    pass, so that a part's units stand in memory and no more. Without, whose gradients ask for whole
    outputs, that is done only where no backward pass follows: the rows are then in parts.

    Args:
        rows_MD: rows.
        weights: the experts' matrices.
        sizes_E: rows of every expert.
        gates_M: by what outputs are multiplied, if by anything.
        parts: how many; None for as many as `_PART_BYTES` asks for.
    """
    through = functools.partial(_through_hidden, weights.transposes_down)
    if parts is None:
        divide = _row_parts if gates_M is None else _parts
        parts = divide(rows_MD, weights.gate_EDF.shape[2])
    if parts == 1:
        return through(rows_MD, weights.whole(), sizes_E, gates_M)
    if gates_M is None:
        return _unweighted(parts, weights.transposes_down, rows_MD, weights.whole(), sizes_E)

    def add(out_MD: jax.Array, part: tuple[jax.Array, ...]) -> tuple[jax.Array, None]:
        gate, up, down = part
        whole = Shards(gate, up, down, weights.embed_axes).whole()
        return out_MD + through(rows_MD, whole, sizes_E, gates_M), None

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


def _row_parts(rows_MD: jax.Array, hidden_dim: int) -> int:
    """The same of rows."""
    num_rows, number = rows_MD.shape[0], 1
    size = num_rows * hidden_dim * rows_MD.dtype.itemsize
    while size > number * _PART_BYTES and num_rows % (2 * number * _ROW_TILE) == 0:
        number *= 2
    return number


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _unweighted(
    parts: int, transposes_down: bool, rows_MD: jax.Array, whole: Whole, sizes_E: jax.Array
) -> jax.Array:
    num_rows, embed_dim = rows_MD.shape
    per_part, ends_E = num_rows // parts, jnp.cumsum(sizes_E)

    def of_part(part: tuple[jax.Array, jax.Array]) -> jax.Array:
        first, some_MD = part
        here_E = jnp.diff(jnp.clip(ends_E - first, 0, per_part), prepend=0)
        return _through_hidden(transposes_down, some_MD, whole, here_E)

    cut = jnp.arange(parts) * per_part, rows_MD.reshape(parts, per_part, embed_dim)
    return lax.map(of_part, cut).reshape(rows_MD.shape)


def _unweighted_forward(
    parts: int, transposes_down: bool, rows_MD: jax.Array, whole: Whole, sizes_E: jax.Array
) -> tuple[jax.Array, Any]:
    def at_once(rows_MD: jax.Array, whole: Whole) -> jax.Array:
        return _through_hidden(transposes_down, rows_MD, whole, sizes_E)

    return jax.vjp(at_once, rows_MD, whole)


def _unweighted_backward(
    parts: int, transposes_down: bool, pull: Any, gradient_MD: jax.Array
) -> tuple[jax.Array, Whole, None]:
    return (*pull(gradient_MD), None)


_unweighted.defvjp(_unweighted_forward, _unweighted_backward)


def _through_hidden(
    transposes_down: bool,
    rows_MD: jax.Array,
    weights: Whole,
    sizes_E: jax.Array,
    gates_M: jax.Array | None = None,
) -> jax.Array:
    # Activated units are computed again for the backward pass: cheap, and as large as what is kept.
    @jax.checkpoint
    def read_out(gate_MF: jax.Array, up_MF: jax.Array, down: jax.Array) -> jax.Array:
        hidden_MF = _weighted(swiglu(gate_MF, up_MF), gates_M)
        return grouped_matmul(hidden_MF, down, sizes_E, transpose=transposes_down)

    gate_MF = grouped_matmul(rows_MD, weights.gate_EDF, sizes_E)
    up_MF = grouped_matmul(rows_MD, weights.up_EDF, sizes_E)
    return read_out(gate_MF, up_MF, weights.down)


def _weighted(hidden: jax.Array, gates: jax.Array | None) -> jax.Array:
    return hidden if gates is None else (hidden * gates[..., None]).astype(hidden.dtype)


def on_slots(
    rows_MD: Float[Array, "M D"], weights: Shards, gates_M: Float[Array, " M"] | None = None
) -> Float[Array, "M D"]:
    """Outputs of rows of which every expert has equally many, those of one after the other.

    Weighted by `gates_M` where they are given.
    """
    whole = weights.whole()
    num_experts, embed_dim, _ = whole.gate_EDF.shape
    rows_ECD = rows_MD.reshape(num_experts, -1, embed_dim)
    gates_EC = None if gates_M is None else gates_M.reshape(num_experts, -1)

    @jax.checkpoint
    def read_out(gate_ECF: jax.Array, up_ECF: jax.Array, down: jax.Array) -> jax.Array:
        hidden_ECF = _weighted(swiglu(gate_ECF, up_ECF), gates_EC)
        if weights.transposes_down:
            return jnp.einsum("ECF,EDF->ECD", hidden_ECF, down)
        return jnp.einsum("ECF,EFD->ECD", hidden_ECF, down)

    gate_ECF = jnp.einsum("ECD,EDF->ECF", rows_ECD, whole.gate_EDF)
    up_ECF = jnp.einsum("ECD,EDF->ECF", rows_ECD, whole.up_EDF)
    return read_out(gate_ECF, up_ECF, whole.down).reshape(rows_MD.shape)


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
        units_BTF = swiglu(project(x_BTD, gate_DF, layout), project(x_BTD, up_DF, layout))
        hidden_BTF = units_BTF * gate_BT[..., None]
        if layout is not None:
            hidden_BTF = layout.constrain(hidden_BTF, BATCH, None, EXPERT_MLP)
        return sum_BTD + project(hidden_BTF, down_FD, layout), None

    gates_EBT = jnp.moveaxis(gates_BTE.astype(x_BTD.dtype), -1, 0)
    out_BTD, _ = jax.lax.scan(add_expert, jnp.zeros_like(x_BTD), (*weights, gates_EBT))
    return out_BTD
