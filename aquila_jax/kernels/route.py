"""Route: router logits to chosen experts, gates, auxiliary sums, and places in expert order."""

import functools
from typing import Any, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from aquila_jax.errors import UserError
from aquila_jax.kernels.backend import Backend, check, dispatch
from aquila_jax.kernels.route_backward_tpu import route_backward_kernel
from aquila_jax.kernels.route_tpu import route_kernel
from aquila_jax.kernels.spec import TINY, Routed, RouteSpec, Scores


def route(
    logits_NE: Float[Array, "N E"],
    is_token_N: Bool[Array, " N"],
    *,
    experts_per_token: int,
    renormalize: bool,
    scores: Scores = "softmax",
    bias_E: Float[Array, " E"] | None = None,
    sequences: int = 1,
    backend: Backend = "auto",
) -> Routed:
    """Choose k experts for every token; gradients flow to the logits alone.

    The k largest logits are chosen, or with a bias the k largest `scores + bias_E` (aux-loss-free
    balancing, arXiv 2408.15664: the bias chooses and does not weigh). Equal ones are taken in the
    order of experts. A NaN or -inf counts as the lowest finite number when choosing, so choices
    are always valid; gates and sums of such a token are what arithmetic gives, and `not_finite`
    counts it.

    Args:
        logits_NE: router logits, bfloat16 or float32; computed in float32.
        is_token_N: false on padding, which is routed but left out of the sums.
        experts_per_token: k.
        renormalize: divide the k gates by their sum.
        scores: what gates are made of: the softmax over all experts, or each logit's sigmoid.
        bias_E: added to the scores where experts are chosen.
        sequences: B, of which the N tokens are made, one after the other.
        backend: see `aquila_jax.kernels.backend.Backend`.

    Raises:
        UserError: k is not in 1 .. E, B does not divide N, or a setting's name is unknown.
    """
    num_tokens, num_experts = logits_NE.shape
    if not 1 <= experts_per_token <= num_experts:
        raise UserError(
            f"experts_per_token must be between 1 and the {num_experts} experts, "
            f"not {experts_per_token}"
        )
    if sequences < 1 or num_tokens % sequences:
        raise UserError(f"{num_tokens} tokens are not {sequences} sequences of equal length")
    if scores not in get_args(Scores):
        raise UserError(f"scores must be one of {', '.join(get_args(Scores))}, not {scores!r}")
    check(backend)
    spec = RouteSpec(experts_per_token, renormalize, scores, sequences, bias_E is not None, backend)
    return _route(spec, logits_NE, is_token_N, bias_E)


def _value(
    spec: RouteSpec, logits_NE: jax.Array, is_token_N: jax.Array, bias_E: jax.Array | None
) -> Routed:
    return dispatch(
        spec.backend,
        functools.partial(route_reference, spec),
        functools.partial(route_kernel, spec),
        logits_NE,
        is_token_N,
        bias_E,
    )


def _forward(
    spec: RouteSpec, logits_NE: jax.Array, is_token_N: jax.Array, bias_E: jax.Array | None
) -> tuple[Routed, Any]:
    routed = _value(spec, logits_NE, is_token_N, bias_E)
    return routed, (logits_NE, is_token_N, routed.experts_Nk)


def _backward(spec: RouteSpec, residuals: Any, cotangents: Routed) -> tuple[Any, None, None]:
    logits_NE, is_token_N, experts_Nk = residuals
    gradient_NE = dispatch(
        spec.backend,
        functools.partial(route_backward_reference, spec),
        functools.partial(route_backward_kernel, spec),
        logits_NE,
        is_token_N,
        experts_Nk,
        cotangents.gates_Nk,
        cotangents.probability_sum_BE,
        cotangents.z_sum,
    )
    return gradient_NE, None, None


_route = jax.custom_vjp(_value, nondiff_argnums=(0,))
_route.defvjp(_forward, _backward)


def route_reference(
    spec: RouteSpec, logits_NE: jax.Array, is_token_N: jax.Array, bias_E: jax.Array | None
) -> Routed:
    """`route` in plain JAX."""
    num_experts = logits_NE.shape[1]
    experts_Nk = _choose(spec, logits_NE, bias_E)
    weighed = _weigh(spec, logits_NE, is_token_N, experts_Nk)

    # A token chooses an expert at most once, so its pairs need no order among themselves.
    chosen_NE = jax.nn.one_hot(experts_Nk, num_experts, dtype=jnp.int32).sum(axis=1)
    earlier_NE = jnp.cumsum(chosen_NE, axis=0) - chosen_NE
    counts_E = chosen_NE.sum(axis=0)
    first_E = jnp.cumsum(counts_E) - counts_E
    real_NE = chosen_NE * is_token_N[:, None]
    normaliser_N = jax.nn.logsumexp(_wide(logits_NE), axis=1)
    return Routed(
        gates_Nk=weighed.gates_Nk,
        experts_Nk=experts_Nk,
        slots_Nk=jnp.take_along_axis(earlier_NE + first_E, experts_Nk, axis=1),
        counts_E=counts_E,
        real_counts_BE=_per_sequence(spec, real_NE),
        probability_sum_BE=weighed.probability_sum_BE,
        z_sum=weighed.z_sum,
        not_finite=jnp.sum(is_token_N & ~jnp.isfinite(normaliser_N), dtype=jnp.int32),
    )


def route_backward_reference(
    spec: RouteSpec,
    logits_NE: jax.Array,
    is_token_N: jax.Array,
    experts_Nk: jax.Array,
    gates_gradient_Nk: jax.Array,
    probability_gradient_BE: jax.Array,
    z_gradient: jax.Array,
) -> jax.Array:
    """The gradient by the logits [N, E], in their dtype; what was chosen is a constant."""
    _, pull = jax.vjp(lambda logits: _weigh(spec, logits, is_token_N, experts_Nk), logits_NE)
    (gradient_NE,) = pull(_Weighed(gates_gradient_Nk, probability_gradient_BE, z_gradient))
    return gradient_NE


class _Weighed(NamedTuple):
    """The part of `Routed` that has a gradient."""

    gates_Nk: jax.Array
    probability_sum_BE: jax.Array
    z_sum: jax.Array


def _wide(x: jax.Array) -> jax.Array:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _scores(spec: RouteSpec, logits_NE: jax.Array) -> jax.Array:
    logits_NE = _wide(logits_NE)
    return (
        jax.nn.softmax(logits_NE, axis=1) if spec.scores == "softmax" else jax.nn.sigmoid(logits_NE)
    )


def _choose(spec: RouteSpec, logits_NE: jax.Array, bias_E: jax.Array | None) -> jax.Array:
    # Scores grow with logits, so these choose as well, and where scores would round to a tie.
    keys_NE = _wide(logits_NE) if bias_E is None else _scores(spec, logits_NE) + bias_E
    lowest = jnp.finfo(keys_NE.dtype).min
    keys_NE = jnp.where(keys_NE > lowest, keys_NE, lowest)
    # top_k has 0 above -0, and they are equal.
    keys_NE = jnp.where(keys_NE == 0, jnp.zeros_like(keys_NE), keys_NE)
    _, experts_Nk = jax.lax.top_k(keys_NE, spec.experts_per_token)
    return experts_Nk


def _weigh(
    spec: RouteSpec, logits_NE: jax.Array, is_token_N: jax.Array, experts_Nk: jax.Array
) -> _Weighed:
    scores_NE = _scores(spec, logits_NE)
    gates_Nk = jnp.take_along_axis(scores_NE, experts_Nk, axis=1)
    if spec.renormalize:
        gates_Nk /= gates_Nk.sum(axis=1, keepdims=True) + TINY
    probability_NE = scores_NE
    if spec.scores == "sigmoid":
        probability_NE /= scores_NE.sum(axis=1, keepdims=True) + TINY
    normaliser_N = jax.nn.logsumexp(_wide(logits_NE), axis=1)
    # Not products with 0 or 1: padding may hold NaN.
    return _Weighed(
        gates_Nk=gates_Nk,
        probability_sum_BE=_per_sequence(spec, jnp.where(is_token_N[:, None], probability_NE, 0)),
        z_sum=jnp.sum(jnp.where(is_token_N, normaliser_N, 0) ** 2),
    )


def _per_sequence(spec: RouteSpec, x_NE: jax.Array) -> jax.Array:
    length = x_NE.shape[0] // spec.sequences
    return x_NE.reshape(spec.sequences, length, x_NE.shape[1]).sum(axis=1)
