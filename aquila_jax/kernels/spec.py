"""What `route` is asked for and what it gives, known to the reference and to the kernels."""

import dataclasses
from typing import Literal, NamedTuple

import jax

from aquila_jax.kernels.backend import Backend

Scores = Literal["softmax", "sigmoid"]

# DeepSeek-V3's guard against k sigmoids that all underflow; far below what moves a softmax.
TINY = 1e-20


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
class RouteSpec:
    """The static settings of one call of `route`; see there."""

    experts_per_token: int
    renormalize: bool
    scores: Scores
    sequences: int
    has_bias: bool
    backend: Backend
