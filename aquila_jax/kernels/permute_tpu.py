"""Permute, unpermute and their gradients on a TPU: sums of gathered rows, each a kernel.

Gathering needs to know which token a row of the result comes from: `invert` tells, in one pass
over the slots.
"""

import jax
import jax.numpy as jnp

from aquila_jax.kernels.invert_tpu import invert, look_up
from aquila_jax.kernels.rows_tpu import gather_sum


def permute_kernel(
    x_ND: jax.Array, slots_Nk: jax.Array, num_rows: int, *, interpret: bool
) -> jax.Array:
    """`permute` by the kernels; arguments as `permute_reference`."""
    (token_M,) = invert(slots_Nk, num_rows=num_rows, interpret=interpret)
    (rows_MD,) = gather_sum(x_ND, token_M[:, None], None, name="permute", interpret=interpret)
    return rows_MD


def unpermute_kernel(
    rows_MD: jax.Array, slots_Nk: jax.Array, gates_Nk: jax.Array | None, *, interpret: bool
) -> jax.Array:
    """`unpermute`, and without gates the gradient of `permute`, by the kernel."""
    (y_ND,) = gather_sum(rows_MD, slots_Nk, gates_Nk, name="unpermute", interpret=interpret)
    return y_ND


def unpermute_backward_kernel(
    rows_MD: jax.Array,
    slots_Nk: jax.Array,
    gates_Nk: jax.Array,
    gradient_ND: jax.Array,
    *,
    interpret: bool,
) -> tuple[jax.Array, jax.Array]:
    """Both gradients of `unpermute` from one gather; as `unpermute_backward_reference`.

    Where a row lies its token's gradient is fetched once: times the gate it is the row's gradient,
    times the row the gate's.
    """
    token_M, gates_M = invert(slots_Nk, gates_Nk, num_rows=len(rows_MD), interpret=interpret)
    rows_gradient_MD, products_M = gather_sum(
        gradient_ND,
        token_M[:, None],
        jnp.where(token_M < 0, 0, gates_M)[:, None],
        rows_MD,
        name="unpermute_backward",
        interpret=interpret,
    )
    return rows_gradient_MD, look_up(products_M, slots_Nk, interpret=interpret)
