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

# Rows of tiles on a CPU.
_TILES = (512, 128, 32)

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


def _tiles(num_rows: int) -> list[int]:
    """Rows of tiles, largest first.

    XLA lays a matrix out anew for every product, so that few large tiles are fast, and small ones
    only spare rows: a tile is taken once more where three quarters of it are needed.
    """
    return [tile for tile in _TILES if tile <= max(num_rows, _TILES[-1])]


def _over_tiles(
    num_rows: int,
    group: tuple[jax.Array, jax.Array],
    add: Callable[[int, jax.Array, jax.Array], jax.Array],
    out: jax.Array,
) -> jax.Array:
    """`out` after `add(tile, start, out)` for every tile of a group of `(first, size)` rows.

    The last one may reach behind the group, by less than what `_padded` adds.
    """
    start, left = group
    for tile in _tiles(num_rows):
        unneeded = tile - 1 if tile == _TILES[-1] else tile // 4
        count = (left + unneeded) // tile
        begin = start

        def step(number: jax.Array, out: jax.Array, tile: int = tile, begin: Any = begin) -> Any:
            return add(tile, begin + number * tile, out)

        out = lax.fori_loop(0, count, step, out)
        start, left = start + count * tile, jnp.maximum(left - count * tile, 0)
    return out


def _padded(rows: jax.Array) -> jax.Array:
    """With room for what the last tile reads too much."""
    return jnp.pad(rows, ((0, max(_tiles(rows.shape[0])[0] // 4, _TILES[-1])), (0, 0)))


def _tiles_multiply(
    rows_MD: jax.Array, weights_EDF: jax.Array, sizes_E: jax.Array, *, transpose: bool = False
) -> jax.Array:
    """Group after group, tile after tile.

    The last tile of a group reaches into the next group's rows, which that group then writes.
    """
    num_rows = rows_MD.shape[0]
    padded = _padded(rows_MD)
    dims = (((1,), (1 if transpose else 0,)), ((), ()))

    def add_group(out: jax.Array, group: tuple[jax.Array, ...]) -> tuple[jax.Array, None]:
        weights, first, size = group

        def add_tile(tile: int, start: jax.Array, out: jax.Array) -> jax.Array:
            rows = lax.dynamic_slice_in_dim(padded, start, tile)
            product = lax.dot_general(rows, weights, dims, preferred_element_type=_wide(rows.dtype))
            return lax.dynamic_update_slice_in_dim(out, product.astype(out.dtype), start, axis=0)

        return _over_tiles(num_rows, (first, size), add_tile, out), None

    width = weights_EDF.shape[1 if transpose else 2]
    out = jnp.zeros((padded.shape[0], width), rows_MD.dtype)
    out, _ = lax.scan(add_group, out, (weights_EDF, jnp.cumsum(sizes_E) - sizes_E, sizes_E))
    return out[:num_rows]


def _tiles_weigh(rows_MD: jax.Array, gradient_MF: jax.Array, sizes_E: jax.Array) -> jax.Array:
    """Every group's sum over rows of row times gradient, tile after tile."""
    num_rows = rows_MD.shape[0]
    rows, gradients = _padded(rows_MD), _padded(gradient_MF)
    wide = _wide(rows_MD.dtype)
    contracted = (((0,), (0,)), ((), ()))

    def of_group(_: None, group: tuple[jax.Array, jax.Array]) -> tuple[None, jax.Array]:
        first, size = group

        def add_tile(tile: int, start: jax.Array, sum_DF: jax.Array) -> jax.Array:
            is_mine = (start + jnp.arange(tile) < first + size)[:, None]
            # Both: a product of 0 with another group's NaN would be NaN.
            row = jnp.where(is_mine, lax.dynamic_slice_in_dim(rows, start, tile), 0)
            gradient = jnp.where(is_mine, lax.dynamic_slice_in_dim(gradients, start, tile), 0)
            return sum_DF + lax.dot_general(row, gradient, contracted, preferred_element_type=wide)

        zeros_DF = jnp.zeros((rows.shape[1], gradients.shape[1]), wide)
        sum_DF = _over_tiles(num_rows, group, add_tile, zeros_DF)
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
