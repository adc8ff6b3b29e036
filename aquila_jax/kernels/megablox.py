"""JAX's megablox kernels, with tiles that fit and rows that need not divide by them.

The only file that knows where they lie.
"""

import jax
import jax.numpy as jnp

# Rows, and columns of either side, that a kernel holds at once: their buffers, twice because the
# next are fetched meanwhile, and the float32 sum fit a TPU core's default 16 MiB of VMEM.
_ROWS, _COLUMNS_16_BIT, _COLUMNS_32_BIT = 512, 1024, 512
# Fewest rows of a tile: a bfloat16 register's.
_LEAST_ROWS = 16


def multiply(
    rows_MD: jax.Array,
    weights_EDF: jax.Array,
    sizes_E: jax.Array,
    *,
    transpose: bool = False,
    interpret: bool,
) -> jax.Array:
    """Every group's rows times its matrix, or its transpose."""
    # `ops` hides the module of this name behind a function.
    from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm  # 0.2 s that others need not wait

    num_rows, padded = rows_MD.shape[0], _padded(rows_MD)
    depth, width = weights_EDF.shape[1:] if not transpose else weights_EDF.shape[:0:-1]
    out = gmm(
        padded,
        weights_EDF,
        sizes_E,
        preferred_element_type=rows_MD.dtype,
        tiling=_tiling(padded, depth, width),
        transpose_rhs=transpose,
        interpret=interpret,
    )
    return out[:num_rows]


def weigh(
    rows_MD: jax.Array, gradient_MF: jax.Array, sizes_E: jax.Array, *, interpret: bool
) -> jax.Array:
    """Every group's sum over rows of row times gradient."""
    from jax.experimental.pallas.ops.tpu.megablox.gmm import tgmm

    padded = _padded(rows_MD)
    return tgmm(
        padded.swapaxes(0, 1),
        _padded(gradient_MF),
        sizes_E,
        preferred_element_type=rows_MD.dtype,
        tiling=_tiling(padded, rows_MD.shape[1], gradient_MF.shape[1]),
        interpret=interpret,
    )


def _tiling(rows: jax.Array, depth: int, width: int) -> tuple[int, int, int]:
    most = _COLUMNS_16_BIT if rows.dtype.itemsize == 2 else _COLUMNS_32_BIT
    return _row_tile(rows.shape[0]), min(most, depth), min(most, width)


def _row_tile(num_rows: int) -> int:
    """`_ROWS`, or all rows where they are fewer, in whole registers."""
    return min(_ROWS, -(-num_rows // _LEAST_ROWS) * _LEAST_ROWS)


def _padded(rows: jax.Array) -> jax.Array:
    tile = _row_tile(rows.shape[0])
    return jnp.pad(rows, ((0, -rows.shape[0] % tile), (0, 0)))
