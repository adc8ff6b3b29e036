"""Permute: tokens' rows into expert order; unpermute: the weighted combine back."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from aquila_jax.errors import UserError
from aquila_jax.kernels.backend import Backend, check, dispatch
from aquila_jax.kernels.permute_tpu import (
    permute_kernel,
    unpermute_backward_kernel,
    unpermute_kernel,
)


def permute(
    x_ND: Float[Array, "N D"],
    slots_Nk: Int[Array, "N k"],
    *,
    num_rows: int | None = None,
    backend: Backend = "auto",
) -> Float[Array, "M D"]:
    """Row `slots_Nk[n, j]` of the result is token n: gathered, not multiplied.

    Differentiable by `x_ND`; the gradient of a token is the sum over its rows.

    Args:
        x_ND: tokens, bfloat16 or float32.
        slots_Nk: int32 places of the pairs (token, choice), each place at most once. A pair whose
            place is not in [0, M) has no row: it is dropped.
        num_rows: M. None says that the slots are a permutation of 0 .. N k - 1; otherwise rows
            that no pair has are zero.
        backend: see `aquila_jax.kernels.backend.Backend`.

    Raises:
        UserError: M is negative, or there is no such backend.
    """
    if num_rows is not None and num_rows < 0:
        raise UserError(f"num_rows must not be negative, not {num_rows}")
    check(backend)
    num_rows = slots_Nk.size if num_rows is None else num_rows
    return _permute(num_rows, backend, x_ND, slots_Nk)


def unpermute(
    rows_MD: Float[Array, "M D"],
    slots_Nk: Int[Array, "N k"],
    gates_Nk: Float[Array, "N k"] | None,
    *,
    backend: Backend = "auto",
) -> Float[Array, "N D"]:
    """Token n is the sum over j of `gates_Nk[n, j] * rows_MD[slots_Nk[n, j]]`.

    The products and their sum are float32, in the order of j; the result is in the dtype of the
    rows. Differentiable by rows and gates. Rows that no pair has are never read.

    Args:
        rows_MD: rows in expert order, bfloat16 or float32.
        slots_Nk: int32 places of the pairs, each at most once. A place that is not in [0, M) adds
            nothing, and its gate has no gradient.
        gates_Nk: float32 weights; None where rows are weighted already. The gradient then needs no
            rows.
        backend: see `aquila_jax.kernels.backend.Backend`.

    Raises:
        UserError: there is no such backend.
    """
    check(backend)
    if gates_Nk is None:
        return _add_up(rows_MD.shape[0], backend, rows_MD, slots_Nk)
    return _unpermute(backend, rows_MD, slots_Nk, gates_Nk)


def permute_reference(x_ND: jax.Array, slots_Nk: jax.Array, num_rows: int) -> jax.Array:
    """`permute` in plain JAX: the inverse of the slots, then a gather."""
    num_tokens = x_ND.shape[0]
    tokens_N1 = jnp.arange(num_tokens, dtype=jnp.int32)[:, None]
    return _taken(x_ND, _inverse(slots_Nk, tokens_N1, num_rows, absent=num_tokens))


def unpermute_reference(
    rows_MD: jax.Array, slots_Nk: jax.Array, gates_Nk: jax.Array | None
) -> jax.Array:
    """`unpermute` in plain JAX, one choice after the other; without gates, the plain sum."""
    wide = jnp.promote_types(rows_MD.dtype, jnp.float32)
    out_ND = jnp.zeros((slots_Nk.shape[0], rows_MD.shape[1]), wide)
    for choice in range(slots_Nk.shape[1]):
        taken_ND = _rows_of(rows_MD, slots_Nk[:, choice]).astype(wide)
        out_ND += taken_ND if gates_Nk is None else gates_Nk[:, choice, None] * taken_ND
    return out_ND.astype(rows_MD.dtype)


def unpermute_backward_reference(
    rows_MD: jax.Array, slots_Nk: jax.Array, gates_Nk: jax.Array, gradient_ND: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Gradients of `unpermute` by rows and gates, from that of its result."""
    num_tokens, num_choices = slots_Nk.shape
    wide = jnp.promote_types(rows_MD.dtype, jnp.float32)
    pairs_Nk = jnp.arange(slots_Nk.size, dtype=jnp.int32).reshape(num_tokens, num_choices)
    pair_M = _inverse(slots_Nk, pairs_Nk, rows_MD.shape[0], absent=slots_Nk.size)
    gates_M = gates_Nk.reshape(-1).at[pair_M].get(mode="fill", fill_value=0)
    taken_MD = _taken(gradient_ND, pair_M // num_choices)
    rows_gradient_MD = (gates_M[:, None] * taken_MD.astype(wide)).astype(rows_MD.dtype)
    gates_gradient_Nk = [
        jnp.sum(gradient_ND.astype(wide) * _rows_of(rows_MD, slots_N), axis=1)
        for slots_N in slots_Nk.T
    ]
    return rows_gradient_MD, jnp.stack(gates_gradient_Nk, axis=1).astype(gates_Nk.dtype)


def _inverse(slots_Nk: jax.Array, held: jax.Array, num_rows: int, *, absent: int) -> jax.Array:
    """int32 [M]: what each row has of `held`, [N, k] or [N, 1]; `absent` where it has no pair."""
    # Indices below zero would count from the end; no index at or past it counts.
    slots_Nk = jnp.where(slots_Nk < 0, num_rows, slots_Nk)
    held_M = jnp.full(num_rows, absent, jnp.int32)
    return held_M.at[slots_Nk].set(held, mode="drop", unique_indices=True)


def _rows_of(rows_MD: jax.Array, slots_N: jax.Array) -> jax.Array:
    """Rows at the slots, zero where there is none."""
    return _taken(rows_MD, jnp.where(slots_N < 0, rows_MD.shape[0], slots_N))


def _taken(x_ND: jax.Array, rows_M: jax.Array) -> jax.Array:
    """Rows of x, zero for an index at or past their number."""
    if not x_ND.shape[0]:
        return jnp.zeros((*rows_M.shape, x_ND.shape[1]), x_ND.dtype)
    return x_ND.at[rows_M].get(mode="fill", fill_value=0)


def _fit(backend: Backend, x: jax.Array, slots_Nk: jax.Array, num_rows: int) -> Backend:
    """The backend; the reference where kernels have nothing to fetch, or another dtype."""
    is_fit = x.size and slots_Nk.size and num_rows and x.dtype in (jnp.bfloat16, jnp.float32)
    return backend if is_fit else "reference"


def _permute_value(
    num_rows: int, backend: Backend, x_ND: jax.Array, slots_Nk: jax.Array
) -> jax.Array:
    return dispatch(
        _fit(backend, x_ND, slots_Nk, num_rows),
        functools.partial(permute_reference, num_rows=num_rows),
        functools.partial(permute_kernel, num_rows=num_rows),
        x_ND,
        slots_Nk,
    )


def _permute_forward(
    num_rows: int, backend: Backend, x_ND: jax.Array, slots_Nk: jax.Array
) -> tuple[jax.Array, Any]:
    return _permute_value(num_rows, backend, x_ND, slots_Nk), slots_Nk


def _permute_backward(
    num_rows: int, backend: Backend, slots_Nk: jax.Array, gradient_MD: jax.Array
) -> tuple[jax.Array, None]:
    return _add_up_value(num_rows, backend, gradient_MD, slots_Nk), None


def _add_up_value(
    num_rows: int, backend: Backend, rows_MD: jax.Array, slots_Nk: jax.Array
) -> jax.Array:
    return dispatch(
        _fit(backend, rows_MD, slots_Nk, num_rows),
        functools.partial(unpermute_reference, gates_Nk=None),
        functools.partial(unpermute_kernel, gates_Nk=None),
        rows_MD,
        slots_Nk,
    )


def _add_up_forward(
    num_rows: int, backend: Backend, rows_MD: jax.Array, slots_Nk: jax.Array
) -> tuple[jax.Array, Any]:
    return _add_up_value(num_rows, backend, rows_MD, slots_Nk), slots_Nk


def _add_up_backward(
    num_rows: int, backend: Backend, slots_Nk: jax.Array, gradient_ND: jax.Array
) -> tuple[jax.Array, None]:
    return _permute_value(num_rows, backend, gradient_ND, slots_Nk), None


# Each is the other's transpose.
_permute = jax.custom_vjp(_permute_value, nondiff_argnums=(0, 1))
_permute.defvjp(_permute_forward, _permute_backward)
_add_up = jax.custom_vjp(_add_up_value, nondiff_argnums=(0, 1))
_add_up.defvjp(_add_up_forward, _add_up_backward)


def _unpermute_value(
    backend: Backend, rows_MD: jax.Array, slots_Nk: jax.Array, gates_Nk: jax.Array
) -> jax.Array:
    return dispatch(
        _fit(backend, rows_MD, slots_Nk, len(rows_MD)),
        unpermute_reference,
        unpermute_kernel,
        rows_MD,
        slots_Nk,
        gates_Nk,
    )


def _unpermute_forward(
    backend: Backend, rows_MD: jax.Array, slots_Nk: jax.Array, gates_Nk: jax.Array
) -> tuple[jax.Array, Any]:
    value_ND = _unpermute_value(backend, rows_MD, slots_Nk, gates_Nk)
    return value_ND, (rows_MD, slots_Nk, gates_Nk)


def _unpermute_backward(
    backend: Backend, residuals: Any, gradient_ND: jax.Array
) -> tuple[jax.Array, None, jax.Array]:
    rows_MD, slots_Nk, gates_Nk = residuals
    rows_gradient_MD, gates_gradient_Nk = dispatch(
        _fit(backend, rows_MD, slots_Nk, len(rows_MD)),
        unpermute_backward_reference,
        unpermute_backward_kernel,
        rows_MD,
        slots_Nk,
        gates_Nk,
        gradient_ND,
    )
    return rows_gradient_MD, None, gates_gradient_Nk


_unpermute = jax.custom_vjp(_unpermute_value, nondiff_argnums=(0,))
_unpermute.defvjp(_unpermute_forward, _unpermute_backward)
