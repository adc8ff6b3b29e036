"""Grouped matrix product: every group of rows times the matrix of its group.

The one place that chooses whose: megablox on a TPU, a loop over tiles on a CPU, `ragged_dot`
elsewhere. XLA lowers `ragged_dot` on a CPU to one dense product over all groups, which costs as
many times too much as there are groups.
"""

import functools
import logging
from collections.abc import Callable
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from aquila_jax.errors import UserError
from aquila_jax.kernels.megablox import multiply as megablox_multiply
from aquila_jax.kernels.megablox import weigh as megablox_weigh

GroupedBackend = Literal["auto", "ragged", "tiles", "megablox", "interpret"]
"""How to compute; `interpret` carries megablox's kernels out on a CPU, to test them."""

# Rows of a tile on a CPU: enough for its matrix units, few enough to waste little of small groups.
_SMALLEST_TILE, _LARGEST_TILE = 16, 128

_MEGABLOX_DTYPES = (jnp.bfloat16, jnp.float32)


def grouped_matmul(
    rows_MD: Float[Array, "M D"],
    weights_EDF: Float[Array, "E _ _"],
    sizes_E: Int[Array, " E"],
    *,
    transpose: bool = False,
    backend: GroupedBackend = "auto",
) -> Float[Array, "M F"]:
    """Row m of group e is `rows_MD[m] @ weights_EDF[e]`; differentiable by rows and weights.

    Products are summed in float32 (float64 for float64) and returned in the rows' dtype. Rows
    behind the last group are not specified, in the value as in the gradient, and may be NaN: read
    none of them (`unpermute` does not). The gradient of a matrix without rows is zero.

    Args:
        rows_MD: rows, those of a group one after the other and the groups in order.
        weights_EDF: a matrix for every group, in the rows' dtype.
        sizes_E: int32 rows of every group; may be zero; their sum is at most M.
        transpose: whether matrices are given transposed, `[E, F, D]`; so is their gradient.
        backend: which library's; "auto" chooses by the platform that is compiled for.

    Raises:
        UserError: there is no such backend.
    """
    if backend not in get_args(GroupedBackend):
        choices = ", ".join(get_args(GroupedBackend))
        raise UserError(f"there is no grouped matmul {backend!r}: choose one of {choices}")
    _log_once(backend)
    return _grouped_matmul(backend, transpose, rows_MD, weights_EDF, sizes_E)


def _dispatch(backend: GroupedBackend, kind: int, *operands: jax.Array) -> jax.Array:
    """One of the three products of `_BACKENDS` by the chosen library."""
    if not operands[0].shape[0]:
        backend = "ragged"  # Tiles of no rows are no tiles.
    if backend != "auto":
        return _BACKENDS[backend][kind](*operands)
    tpu = "megablox" if operands[0].dtype in _MEGABLOX_DTYPES else "ragged"
    return lax.platform_dependent(
        *operands,
        tpu=_BACKENDS[tpu][kind],
        cpu=_BACKENDS["tiles"][kind],
        default=_BACKENDS["ragged"][kind],
    )


def _value(
    backend: GroupedBackend,
    transpose: bool,
    rows_MD: jax.Array,
    weights: jax.Array,
    sizes_E: jax.Array,
) -> jax.Array:
    return _dispatch(backend, int(transpose), rows_MD, weights, sizes_E)


def _forward(
    backend: GroupedBackend,
    transpose: bool,
    rows_MD: jax.Array,
    weights: jax.Array,
    sizes_E: jax.Array,
) -> tuple[jax.Array, Any]:
    operands = (rows_MD, weights, sizes_E)
    return _value(backend, transpose, *operands), operands


def _backward(
    backend: GroupedBackend, transpose: bool, residuals: Any, gradient_MF: jax.Array
) -> tuple[jax.Array, jax.Array, None]:
    rows_MD, weights, sizes_E = residuals
    rows_gradient_MD = _dispatch(backend, int(not transpose), gradient_MF, weights, sizes_E)
    sides = (gradient_MF, rows_MD) if transpose else (rows_MD, gradient_MF)
    return rows_gradient_MD, _dispatch(backend, 2, *sides, sizes_E), None


_grouped_matmul = jax.custom_vjp(_value, nondiff_argnums=(0, 1))
_grouped_matmul.defvjp(_forward, _backward)


@functools.cache
def _log_once(backend: GroupedBackend) -> None:
    chosen = backend
    if backend == "auto":
        where = "megablox on a TPU, tiles on a CPU, ragged_dot elsewhere"
        chosen = f"{where}; here: {jax.default_backend()}"
    logging.getLogger(__name__).info("grouped matrix products: %s", chosen)


def _wide(dtype: jnp.dtype) -> jnp.dtype:
    return jnp.promote_types(dtype, jnp.float32)


def _ragged_multiply(
    rows_MD: jax.Array, weights_EDF: jax.Array, sizes_E: jax.Array, *, transpose: bool = False
) -> jax.Array:
    weights = weights_EDF.swapaxes(1, 2) if transpose else weights_EDF
    wide = _wide(rows_MD.dtype)
    out = lax.ragged_dot(rows_MD, weights, sizes_E, preferred_element_type=wide)
    return out.astype(rows_MD.dtype)


_ROWS_CONTRACTED = lax.RaggedDotDimensionNumbers((((0,), (0,)), ((), ())), [0], [])


def _ragged_weigh(rows_MD: jax.Array, gradient_MF: jax.Array, sizes_E: jax.Array) -> jax.Array:
    wide = _wide(rows_MD.dtype)
    out_EDF = lax.ragged_dot_general(
        rows_MD, gradient_MF, sizes_E, _ROWS_CONTRACTED, preferred_element_type=wide
    )
    return out_EDF.astype(rows_MD.dtype)


def _tile(num_rows: int, num_groups: int) -> int:
    """Rows of a tile: about a quarter of an average group, a power of two."""
    quarter = max(num_rows // (4 * num_groups), 1)
    return min(max(1 << (quarter.bit_length() - 1), _SMALLEST_TILE), _LARGEST_TILE)


def _tiles_multiply(
    rows_MD: jax.Array, weights_EDF: jax.Array, sizes_E: jax.Array, *, transpose: bool = False
) -> jax.Array:
    """Group after group, tile after tile.

    The last tile of a group reaches into the next group's rows, which that group then writes.
    """
    tile = _tile(rows_MD.shape[0], weights_EDF.shape[0])
    padded = jnp.pad(rows_MD, ((0, tile), (0, 0)))
    dims = (((1,), (1 if transpose else 0,)), ((), ()))

    def add_group(out: jax.Array, group: tuple[jax.Array, ...]) -> tuple[jax.Array, None]:
        weights, first, size = group

        def add_tile(number: jax.Array, out: jax.Array) -> jax.Array:
            start = first + number * tile
            rows = lax.dynamic_slice_in_dim(padded, start, tile)
            product = lax.dot_general(rows, weights, dims, preferred_element_type=_wide(rows.dtype))
            return lax.dynamic_update_slice_in_dim(out, product.astype(out.dtype), start, axis=0)

        return lax.fori_loop(0, -(-size // tile), add_tile, out), None

    width = weights_EDF.shape[1 if transpose else 2]
    out = jnp.zeros((padded.shape[0], width), rows_MD.dtype)
    out, _ = lax.scan(add_group, out, (weights_EDF, jnp.cumsum(sizes_E) - sizes_E, sizes_E))
    return out[: rows_MD.shape[0]]


def _tiles_weigh(rows_MD: jax.Array, gradient_MF: jax.Array, sizes_E: jax.Array) -> jax.Array:
    """Every group's sum over rows of row times gradient, tile after tile."""
    tile = _tile(rows_MD.shape[0], sizes_E.shape[0])
    rows, gradients = (jnp.pad(x, ((0, tile), (0, 0))) for x in (rows_MD, gradient_MF))
    wide = _wide(rows_MD.dtype)

    def of_group(_: None, group: tuple[jax.Array, jax.Array]) -> tuple[None, jax.Array]:
        first, size = group

        def add_tile(number: jax.Array, sum_DF: jax.Array) -> jax.Array:
            start = first + number * tile
            is_mine = (number * tile + jnp.arange(tile) < size)[:, None]
            # Both: a product of 0 with another group's NaN would be NaN.
            row = jnp.where(is_mine, lax.dynamic_slice_in_dim(rows, start, tile), 0)
            gradient = jnp.where(is_mine, lax.dynamic_slice_in_dim(gradients, start, tile), 0)
            contracted = (((0,), (0,)), ((), ()))
            return sum_DF + lax.dot_general(row, gradient, contracted, preferred_element_type=wide)

        zeros_DF = jnp.zeros((rows.shape[1], gradients.shape[1]), wide)
        sum_DF = lax.fori_loop(0, -(-size // tile), add_tile, zeros_DF)
        return None, sum_DF.astype(rows_MD.dtype)

    return lax.scan(of_group, None, (jnp.cumsum(sizes_E) - sizes_E, sizes_E))[1]


def _three(
    multiply: Callable[..., jax.Array], weigh: Callable[..., jax.Array], **settings: Any
) -> tuple[Callable[..., jax.Array], ...]:
    """The product, that with transposed matrices (the rows' gradient), and the matrices' one."""
    return (
        functools.partial(multiply, **settings),
        functools.partial(multiply, transpose=True, **settings),
        functools.partial(weigh, **settings),
    )


_BACKENDS = {
    "ragged": _three(_ragged_multiply, _ragged_weigh),
    "tiles": _three(_tiles_multiply, _tiles_weigh),
    "megablox": _three(megablox_multiply, megablox_weigh, interpret=False),
    "interpret": _three(megablox_multiply, megablox_weigh, interpret=True),
}
