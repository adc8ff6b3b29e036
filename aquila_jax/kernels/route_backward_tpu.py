"""The gradient of `route` on a TPU, by tiles as `route_tpu` has them."""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from aquila_jax.kernels.backend import pallas_call
from aquila_jax.kernels.spec import TINY, RouteSpec
from aquila_jax.kernels.tiles import LANES, REAL, Tiling, fill, padded, score, unfill


def route_backward_kernel(
    spec: RouteSpec,
    logits_NE: jax.Array,
    is_token_N: jax.Array,
    experts_Nk: jax.Array,
    gates_gradient_Nk: jax.Array,
    probability_gradient_BE: jax.Array,
    z_gradient: jax.Array,
    *,
    interpret: bool,
) -> jax.Array:
    """The gradient by the logits; arguments as `route_backward_reference`."""
    num_tokens, num_experts = logits_NE.shape
    tiling = Tiling.of(num_experts, num_tokens // spec.sequences)
    logits_EN, state_1N = padded(spec, tiling, logits_NE, is_token_N)
    added = tiling.num_experts - num_experts
    probability_gradient_BE = jnp.pad(probability_gradient_BE, ((0, 0), (0, added)))

    gradient_EN = pallas_call(
        functools.partial(_backward_body, spec, tiling),
        logits_EN,
        state_1N,
        fill(spec, tiling, experts_Nk, 0),
        fill(spec, tiling, gates_gradient_Nk, 0),
        jnp.broadcast_to(
            probability_gradient_BE[..., None], (*probability_gradient_BE.shape, LANES)
        ),
        z_gradient.reshape(1),
        name="route_backward",
        interpret=interpret,
        grid=(spec.sequences, tiling.tiles),
        in_specs=[
            tiling.per_token(tiling.num_experts),
            tiling.per_token(1),
            *[tiling.per_token(spec.experts_per_token)] * 2,
            tiling.per_sequence(tiling.num_experts),
            pl.BlockSpec(memory_space=pltpu.SMEM),
        ],
        out_specs=tiling.per_token(tiling.num_experts),
        out_shape=jax.ShapeDtypeStruct(logits_EN.shape, logits_NE.dtype),
        cost=pl.CostEstimate(
            flops=logits_EN.size * (3 * spec.experts_per_token + 16),
            transcendentals=logits_EN.size,
            bytes_accessed=2 * logits_NE.nbytes + 8 * experts_Nk.size,
        ),
    )
    return unfill(spec, gradient_EN[:num_experts], num_tokens)


def _backward_body(
    spec: RouteSpec,
    tiling: Tiling,
    logits_ref,
    state_ref,
    experts_ref,
    gates_gradient_ref,
    probability_gradient_ref,
    z_gradient_ref,
    gradient_ref,
) -> None:
    """One tile of tokens: the chain rule from gates and sums to logits."""

    def chunk(index: jax.Array, _: None) -> None:
        at = pl.ds(pl.multiple_of(index * tiling.chunk, tiling.chunk), tiling.chunk)
        is_real = state_ref[:, at] == REAL
        scored = score(spec, logits_ref[:, at].astype(jnp.float32))
        by_probability = jnp.tile(probability_gradient_ref[0], (1, tiling.chunk // LANES))
        by_probability = jnp.where(is_real, by_probability, 0.0)
        by_score = _gates_to_scores(
            spec, scored.scores, experts_ref[:, at], gates_gradient_ref[:, at]
        )

        def through_sum(values: jax.Array, by_values: jax.Array) -> jax.Array:
            """Values = x / sum(x): the gradient by x, times the sum."""
            return by_values - jnp.sum(values * by_values, axis=0, keepdims=True)

        by_normaliser = jnp.where(is_real, 2.0 * z_gradient_ref[0] * scored.normaliser, 0.0)
        if spec.scores == "softmax":
            by_logit = scored.softmax * through_sum(scored.softmax, by_score + by_probability)
        else:
            total = jnp.sum(scored.scores, axis=0, keepdims=True) + TINY
            by_score += through_sum(scored.probability, by_probability) * (1.0 / total)
            by_logit = by_score * scored.scores * (1.0 - scored.scores)
        by_logit += by_normaliser * scored.softmax
        gradient_ref[:, at] = by_logit.astype(gradient_ref.dtype)

    jax.lax.fori_loop(0, tiling.tile // tiling.chunk, chunk, None)


def _gates_to_scores(
    spec: RouteSpec, scores: jax.Array, experts: jax.Array, by_gate: jax.Array
) -> jax.Array:
    """[E, N] gradient by the scores that became gates [k, N]; zero where not chosen."""
    expert = jax.lax.broadcasted_iota(jnp.int32, scores.shape, 0)
    by_score = jnp.zeros_like(scores)
    is_chosen = jnp.zeros_like(scores)
    for j in range(spec.experts_per_token):
        is_pick = expert == experts[j : j + 1]
        by_score = jnp.where(is_pick, by_gate[j : j + 1], by_score)
        is_chosen = jnp.where(is_pick, 1.0, is_chosen)
    if not spec.renormalize:
        return by_score
    chosen = is_chosen * scores
    scale = 1.0 / (jnp.sum(chosen, axis=0, keepdims=True) + TINY)
    mean = jnp.sum(by_score * chosen, axis=0, keepdims=True) * scale
    return is_chosen * (by_score - mean) * scale
