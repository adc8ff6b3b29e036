"""Who waits for which expert, counted token by token."""

import jax.numpy as jnp
import numpy as np
import pytest

from aquila_jax.kernels import route
from aquila_jax.nn.moe.queues import capacity_of, endless, limited, renormalised

N, E, K = 40, 5, 2


def routed(choices, seed=0):
    logits = np.random.default_rng(seed).normal(size=(N, E)).astype(np.float32)
    logits[:, 1] += 1.5  # everybody's favourite
    return route(
        jnp.asarray(logits), jnp.ones(N, bool), experts_per_token=choices, renormalize=False
    )


def test_without_a_limit_every_pair_waits_and_queues_have_no_gaps():
    queues = endless(routed(K))
    for expert in range(E):
        places = np.asarray(queues.order_Nk)[np.asarray(queues.experts_Nk) == expert]
        assert sorted(places.tolist()) == list(range(int(queues.lengths_E[expert])))


@pytest.mark.parametrize("capacity", [1, 4, 9, N])
@pytest.mark.parametrize("has_spare", [False, True])
def test_with_one_first_choices_come_first_and_the_spare_serves_who_found_none(capacity, has_spare):
    found = routed(K + has_spare)
    is_token = np.arange(N) % 7 != 3
    queues = limited(found, jnp.asarray(is_token), K, capacity)
    experts = np.asarray(found.experts_Nk)
    taken, expected = np.zeros(E, int), np.full(experts.shape, -1)
    rounds = [(choice, is_token) for choice in range(K)]
    for choice, waits in rounds:
        for token in np.flatnonzero(waits):
            expert = experts[token, choice]
            if taken[expert] < capacity:
                expected[token, choice] = taken[expert]
                taken[expert] += 1
    if has_spare:
        for token in np.flatnonzero(is_token & (expected[:, :K] < 0).any(axis=1)):
            expert = experts[token, K]
            if taken[expert] < capacity:
                expected[token, K] = taken[expert]
                taken[expert] += 1
    np.testing.assert_array_equal(queues.order_Nk, expected)
    assert set(np.asarray(queues.lengths_E).tolist()) == {capacity}


@pytest.mark.parametrize("renormalize", [False, True])
def test_a_spare_choice_takes_the_weight_of_the_first_that_was_dropped(renormalize):
    found = routed(K + 1)
    before = limited(found, jnp.ones(N, bool), K, 4)
    after = renormalised(before, K, renormalize)
    order, gates = np.asarray(before.order_Nk), np.asarray(found.gates_Nk, np.float64)
    for token in range(N):
        counts = [choice for choice in range(K + 1) if choice < K or order[token, K] >= 0]
        if order[token, K] >= 0:
            counts.remove(next(choice for choice in range(K) if order[token, choice] < 0))
        weight = gates[token, counts].sum() if renormalize else 1.0
        expected = [gates[token, c] / weight if c in counts else 0.0 for c in range(K + 1)]
        np.testing.assert_allclose(after.gates_Nk[token], expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("factor", "tokens", "slots"), [(1.0, 100, 50), (1.25, 100, 63), (0.001, 100, 1), (9, 100, 100)]
)
def test_a_capacity_is_at_least_one_and_at_most_every_token(factor, tokens, slots):
    assert capacity_of(factor, tokens, 2, 4) == slots
