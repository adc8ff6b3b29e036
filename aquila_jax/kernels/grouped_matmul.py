"""Grouped matrix product: every group of rows times the matrix of its group.

The one place that chooses whose: megablox on a TPU, a loop over tiles on a CPU, `ragged_dot`
elsewhere. XLA lowers `ragged_dot` on a CPU to one dense product over all groups, which costs as
many times too much as there are groups.
"""

import functools
import itertools
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

# Rows of tiles on a CPU. XLA lays a matrix out anew for every product, so that a group wants to be
# one tile, of few rows too many; every size is compiled.
_TILES = (32, 64, 96, 128, 160, 224, 288, 384, 512)

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


def _tiles(num_rows: int) -> tuple[int, ...]:
    """Rows of tiles, smallest first; all fit into the rows there are."""
    return tuple(tile for tile in _TILES if tile <= num_rows) or (num_rows,)


def _over_tiles(
    tiles: tuple[int, ...],
    group: tuple[jax.Array, jax.Array],
    out: jax.Array,
    begin: Callable[[int, jax.Array, jax.Array], jax.Array],
    go_on: Callable[[int, jax.Array, jax.Array], jax.Array],
) -> jax.Array:
    """`out` after all tiles of a group of `(first, size)` rows, in as few products as can be.

    `begin(tile, start, out)` is called once, with the smallest tile that has room for what largest
    ones leave over, and may reach behind the group; `go_on` then for each of the largest. Neither
    is called for a group of no rows.
    """
    (first, size), largest = group, tiles[-1]
    num_largest = jnp.maximum(size - 1, 0) // largest
    left, start = size - num_largest * largest, first + num_largest * largest
    for fewer, tile in itertools.pairwise((0, *tiles)):
        # A loop of one step or none: a conditional would copy `out`. The step's number is among
        # what it computes, or XLA would compute that ahead of all loops.
        def step(number: jax.Array, out: jax.Array, tile: int = tile) -> jax.Array:
            return begin(tile, start + number * tile, out)

        is_this = (fewer < left) & (left <= tile)
        out = lax.fori_loop(0, is_this.astype(jnp.int32), step, out)
    return lax.fori_loop(
        0, num_largest, lambda number, out: go_on(largest, first + number * largest, out), out
    )


def _tiles_multiply(
    rows_MD: jax.Array, weights_EDF: jax.Array, sizes_E: jax.Array, *, transpose: bool = False
) -> jax.Array:
    """Group after group, tile after tile.

    What a tile writes behind its group is the next group's, which comes later, or nobody's.
    """
    num_rows = rows_MD.shape[0]
    tiles = _tiles(num_rows)
    dims = (((1,), (1 if transpose else 0,)), ((), ()))

    def add_group(out: jax.Array, group: tuple[jax.Array, ...]) -> tuple[jax.Array, None]:
        weights, first, size = group

        def add_tile(tile: int, start: jax.Array, out: jax.Array) -> jax.Array:
            # Near the end a tile reaches back instead, where rows are done already.
            at = jnp.minimum(start, num_rows - tile)
            is_done = (at + jnp.arange(tile) < start)[:, None]
            rows, done = (lax.dynamic_slice_in_dim(x, at, tile) for x in (rows_MD, out))
            product = lax.dot_general(rows, weights, dims, preferred_element_type=_wide(rows.dtype))
            tile_out = jnp.where(is_done, done, product.astype(out.dtype))
            return lax.dynamic_update_slice_in_dim(out, tile_out, at, axis=0)

        return _over_tiles(tiles, (first, size), out, add_tile, add_tile), None

    out = jnp.zeros((num_rows, weights_EDF.shape[1 if transpose else 2]), rows_MD.dtype)
    return lax.scan(add_group, out, (weights_EDF, jnp.cumsum(sizes_E) - sizes_E, sizes_E))[0]


def _tiles_weigh(rows_MD: jax.Array, gradient_MF: jax.Array, sizes_E: jax.Array) -> jax.Array:
    """Every group's sum over rows of row times gradient, tile after tile."""
    num_rows, num_groups = rows_MD.shape[0], sizes_E.shape[0]
    tiles, wide = _tiles(num_rows), _wide(rows_MD.dtype)
    contracted = (((0,), (0,)), ((), ()))

    def add_group(out_EDF: jax.Array, group: tuple[jax.Array, ...]) -> tuple[jax.Array, None]:
        number, first, size = group

        def of_tile(tile: int, start: jax.Array) -> jax.Array:
            at = jnp.minimum(start, num_rows - tile)
            places = at + jnp.arange(tile)
            is_mine = ((start <= places) & (places < first + size))[:, None]
            # Both: a product of 0 with another group's NaN would be NaN.
            row = jnp.where(is_mine, lax.dynamic_slice_in_dim(rows_MD, at, tile), 0)
            gradient = jnp.where(is_mine, lax.dynamic_slice_in_dim(gradient_MF, at, tile), 0)
            return lax.dot_general(row, gradient, contracted, preferred_element_type=wide)

        def begin(tile: int, start: jax.Array, out_EDF: jax.Array) -> jax.Array:
            return lax.dynamic_update_index_in_dim(out_EDF, of_tile(tile, start), number, axis=0)

        def go_on(tile: int, start: jax.Array, out_EDF: jax.Array) -> jax.Array:
            sum_DF = lax.dynamic_index_in_dim(out_EDF, number, keepdims=False)
            sum_DF += of_tile(tile, start)
            return lax.dynamic_update_index_in_dim(out_EDF, sum_DF, number, axis=0)

        return _over_tiles(tiles, (first, size), out_EDF, begin, go_on), None

    out_EDF = jnp.zeros((num_groups, rows_MD.shape[1], gradient_MF.shape[1]), wide)
    groups = (jnp.arange(num_groups), jnp.cumsum(sizes_E) - sizes_E, sizes_E)
    return lax.scan(add_group, out_EDF, groups)[0].astype(rows_MD.dtype)


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
