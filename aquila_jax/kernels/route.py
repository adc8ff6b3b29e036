"""Route: router logits to chosen experts, gates, auxiliary sums, and places in expert order."""

import dataclasses
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from aquila_jax.errors import UserError
from aquila_jax.kernels.backend import Backend, check

Scores = Literal["softmax", "sigmoid"]

# DeepSeek-V3's guard against k sigmoids that all underflow; far below what moves a softmax.
_TINY = 1e-20


class Routed(NamedTuple):
    """Where tokens go, and the sums of which the auxiliary losses are made.

    N tokens in B sequences of equal length; N k pairs (token, choice), a token's best first.
    Sums leave padding out; `counts_E`, `experts_Nk` and `slots_Nk` have it, because its rows lie
    among the others. Float outputs are float32 (float64 for float64 logits).

    Attributes:
        gates_Nk: weight of each choice. Differentiable.
        experts_Nk: int32 expert of each choice, in [0, E) whatever the logits.
        slots_Nk: int32 place of each pair when pairs are sorted by expert and, for one expert,
            by token: a permutation of 0 .. N k - 1.
        counts_E: int32 pairs of each expert, those of padding too: the group sizes of a grouped
            matmul over rows in expert order.
        real_counts_BE: int32 pairs of each expert in each sequence, without padding.
        probability_sum_BE: the sum over a sequence's tokens of the probability of each expert
            (sigmoid scores are divided by their sum over experts). Differentiable.
        z_sum: the sum over tokens of logsumexp(logits)^2. Differentiable.
        not_finite: int32 number of tokens whose logsumexp(logits) is NaN or infinite.
    """

    gates_Nk: jax.Array
    experts_Nk: jax.Array
    slots_Nk: jax.Array
    counts_E: jax.Array
    real_counts_BE: jax.Array
    probability_sum_BE: jax.Array
    z_sum: jax.Array
    not_finite: jax.Array


@dataclasses.dataclass(frozen=True)
class Spec:
    """The static settings of one call of `route`; see there."""

    experts_per_token: int
    renormalize: bool
    scores: Scores
    sequences: int
    backend: Backend


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
    spec = Spec(experts_per_token, renormalize, scores, sequences, backend)
    return _route(spec, logits_NE, is_token_N, bias_E)


def _value(
    spec: Spec, logits_NE: jax.Array, is_token_N: jax.Array, bias_E: jax.Array | None
) -> Routed:
    return route_reference(spec, logits_NE, is_token_N, bias_E)


def _forward(
    spec: Spec, logits_NE: jax.Array, is_token_N: jax.Array, bias_E: jax.Array | None
) -> tuple[Routed, Any]:
    routed = _value(spec, logits_NE, is_token_N, bias_E)
    return routed, (logits_NE, is_token_N, routed.experts_Nk)


def _backward(spec: Spec, residuals: Any, cotangents: Routed) -> tuple[Any, None, None]:
    logits_NE, is_token_N, experts_Nk = residuals
    return route_backward_reference(spec, logits_NE, is_token_N, experts_Nk, cotangents), None, None


_route = jax.custom_vjp(_value, nondiff_argnums=(0,))
_route.defvjp(_forward, _backward)


def route_reference(
    spec: Spec, logits_NE: jax.Array, is_token_N: jax.Array, bias_E: jax.Array | None
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
    spec: Spec,
    logits_NE: jax.Array,
    is_token_N: jax.Array,
    experts_Nk: jax.Array,
    cotangents: Routed,
) -> jax.Array:
    """The gradient by the logits [N, E], in their dtype; what was chosen is a constant."""
    _, pull = jax.vjp(lambda logits: _weigh(spec, logits, is_token_N, experts_Nk), logits_NE)
    (gradient_NE,) = pull(
        _Weighed(cotangents.gates_Nk, cotangents.probability_sum_BE, cotangents.z_sum)
    )
    return gradient_NE


class _Weighed(NamedTuple):
    """The part of `Routed` that has a gradient."""

    gates_Nk: jax.Array
    probability_sum_BE: jax.Array
    z_sum: jax.Array


def _wide(x: jax.Array) -> jax.Array:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _scores(spec: Spec, logits_NE: jax.Array) -> jax.Array:
    logits_NE = _wide(logits_NE)
    return (
        jax.nn.softmax(logits_NE, axis=1) if spec.scores == "softmax" else jax.nn.sigmoid(logits_NE)
    )


def _choose(spec: Spec, logits_NE: jax.Array, bias_E: jax.Array | None) -> jax.Array:
    # Scores grow with logits, so these choose as well, and where scores would round to a tie.
    keys_NE = _wide(logits_NE) if bias_E is None else _scores(spec, logits_NE) + bias_E
    lowest = jnp.finfo(keys_NE.dtype).min
    keys_NE = jnp.where(keys_NE > lowest, keys_NE, lowest)
    # top_k has 0 above -0, and they are equal.
    keys_NE = jnp.where(keys_NE == 0, jnp.zeros_like(keys_NE), keys_NE)
    _, experts_Nk = jax.lax.top_k(keys_NE, spec.experts_per_token)
    return experts_Nk


def _weigh(
    spec: Spec, logits_NE: jax.Array, is_token_N: jax.Array, experts_Nk: jax.Array
) -> _Weighed:
    scores_NE = _scores(spec, logits_NE)
    gates_Nk = jnp.take_along_axis(scores_NE, experts_Nk, axis=1)
    if spec.renormalize:
        gates_Nk /= gates_Nk.sum(axis=1, keepdims=True) + _TINY
    probability_NE = scores_NE
    if spec.scores == "sigmoid":
        probability_NE /= scores_NE.sum(axis=1, keepdims=True) + _TINY
    normaliser_N = jax.nn.logsumexp(_wide(logits_NE), axis=1)
    # Not products with 0 or 1: padding may hold NaN.
    return _Weighed(
        gates_Nk=gates_Nk,
        probability_sum_BE=_per_sequence(spec, jnp.where(is_token_N[:, None], probability_NE, 0)),
        z_sum=jnp.sum(jnp.where(is_token_N, normaliser_N, 0) ** 2),
    )


def _per_sequence(spec: Spec, x_NE: jax.Array) -> jax.Array:
    length = x_NE.shape[0] // spec.sequences
    return x_NE.reshape(spec.sequences, length, x_NE.shape[1]).sum(axis=1)
