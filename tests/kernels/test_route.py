"""`route` against its definition, token by token in float64."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aquila_jax.errors import UserError
from aquila_jax.kernels import route
from tests.kernels import by_hand


def draw(num_tokens=24, num_experts=6, seed=0, ties=False):
    rng = np.random.default_rng(seed)
    logits = rng.normal(scale=2, size=(num_tokens, num_experts))
    logits = np.round(logits) if ties else logits
    return logits.astype(np.float32), rng.random(num_tokens) < 0.8


def assert_equal_to_by_hand(routed, expected, rtol=1e-6):
    np.testing.assert_array_equal(routed.experts_Nk, expected.experts)
    np.testing.assert_array_equal(routed.slots_Nk, expected.slots)
    np.testing.assert_array_equal(routed.counts_E, expected.counts)
    np.testing.assert_array_equal(routed.real_counts_BE, expected.real_counts)
    np.testing.assert_allclose(routed.gates_Nk, expected.gates, rtol=rtol, atol=1e-30)
    np.testing.assert_allclose(routed.probability_sum_BE, expected.probability_sum, rtol=rtol)
    np.testing.assert_allclose(routed.z_sum, expected.z_sum, rtol=rtol)
    assert routed.not_finite == 0


@pytest.mark.parametrize("scores", ["softmax", "sigmoid"])
@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize(("k", "renormalize"), [(1, False), (2, True), (6, True), (3, False)])
def test_equals_its_definition(k, renormalize, ties, scores):
    logits, is_token = draw(ties=ties)
    settings = {"renormalize": renormalize, "scores": scores, "sequences": 3}
    routed = route(jnp.asarray(logits), jnp.asarray(is_token), experts_per_token=k, **settings)
    assert_equal_to_by_hand(routed, by_hand.route(logits, is_token, k, **settings))


@pytest.mark.parametrize("scores", ["softmax", "sigmoid"])
def test_a_bias_chooses_and_does_not_weigh(scores):
    logits, is_token = draw()
    bias = np.array([3, 0, -3, 0, 0.05, 0], np.float32)
    settings = {"renormalize": True, "scores": scores}
    routed = route(
        jnp.asarray(logits),
        jnp.asarray(is_token),
        experts_per_token=2,
        bias_E=jnp.asarray(bias),
        **settings,
    )
    assert (np.asarray(routed.experts_Nk[:, 0]) == 0).all()
    assert not (np.asarray(routed.experts_Nk) == 2).any()
    assert_equal_to_by_hand(routed, by_hand.route(logits, is_token, 2, bias=bias, **settings))


@pytest.mark.parametrize("scores", ["softmax", "sigmoid"])
@pytest.mark.parametrize("renormalize", [True, False])
def test_gradients_equal_differences_of_the_definition(renormalize, scores):
    logits, is_token = draw(num_tokens=6)
    rng = np.random.default_rng(1)
    by_gates, by_sums = rng.normal(size=(6, 2)), rng.normal(size=(2, 6))
    settings = {"renormalize": renormalize, "scores": scores, "sequences": 2}

    def objective(logits):
        routed = route(logits, jnp.asarray(is_token), experts_per_token=2, **settings)
        sums = jnp.sum(routed.probability_sum_BE * by_sums) + 0.3 * routed.z_sum
        return jnp.sum(routed.gates_Nk * by_gates) + sums

    def difference(n, e, step=1e-6):
        values = []
        for sign in (1, -1):
            moved = logits.astype(np.float64)
            moved[n, e] += sign * step
            routed = by_hand.route(moved, is_token, 2, experts=experts, **settings)
            sums = (routed.probability_sum * by_sums).sum() + 0.3 * routed.z_sum
            values.append((routed.gates * by_gates).sum() + sums)
        return (values[0] - values[1]) / (2 * step)

    experts = by_hand.route(logits, is_token, 2).experts
    expected = [[difference(n, e) for e in range(6)] for n in range(6)]
    gradient = jax.grad(objective)(jnp.asarray(logits))
    np.testing.assert_allclose(gradient, expected, rtol=2e-5, atol=2e-6)


def test_logits_that_are_not_finite_leave_valid_choices_and_other_tokens_alone():
    logits, _ = draw(num_tokens=5, num_experts=4)
    logits[1] = np.nan
    logits[2, 3], logits[3, 0], logits[4, 1:] = np.nan, np.inf, -np.inf
    is_token = jnp.asarray([True, True, True, True, True])
    routed = route(jnp.asarray(logits), is_token, experts_per_token=3, renormalize=True)
    experts = np.asarray(routed.experts_Nk)
    np.testing.assert_array_equal(experts[1], [0, 1, 2])
    assert 3 not in experts[2]
    np.testing.assert_array_equal([experts[3, 0], *experts[4]], [0, 0, 1, 2])
    assert sorted(np.asarray(routed.slots_Nk).ravel()) == list(range(15))
    assert routed.not_finite == 3
    assert np.isfinite(np.asarray(routed.gates_Nk)[[0, 4]]).all()
    padded = route(jnp.asarray(logits), ~is_token, experts_per_token=3, renormalize=True)
    assert padded.not_finite == padded.z_sum == padded.probability_sum_BE.sum() == 0


def test_bfloat16_logits_are_computed_in_float32():
    logits, is_token = draw()
    narrow = jnp.asarray(logits, jnp.bfloat16)
    routed = route(narrow, jnp.asarray(is_token), experts_per_token=2, renormalize=True)
    assert_equal_to_by_hand(routed, by_hand.route(narrow.astype(np.float32), is_token, 2))
    assert routed.gates_Nk.dtype == jnp.float32
    gradient = jax.grad(
        lambda x: route(x, jnp.asarray(is_token), experts_per_token=2, renormalize=True).z_sum
    )(narrow)
    assert gradient.dtype == jnp.bfloat16


def test_no_tokens_are_routed_nowhere():
    routed = route(jnp.zeros((0, 4)), jnp.zeros(0, bool), experts_per_token=2, renormalize=True)
    assert routed.slots_Nk.shape == (0, 2)
    assert routed.counts_E.tolist() == [0, 0, 0, 0]
    assert routed.z_sum == 0


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"experts_per_token": 5}, "between 1 and the 4 experts, not 5"),
        ({"experts_per_token": 0}, "between 1 and the 4 experts, not 0"),
        ({"sequences": 4}, "6 tokens are not 4 sequences"),
        ({"scores": "tanh"}, "softmax, sigmoid, not 'tanh'"),
        ({"backend": "cuda"}, "no kernel backend 'cuda'"),
    ],
)
def test_mistakes_are_told(settings, words):
    settings = {"experts_per_token": 2, "renormalize": True, **settings}
    with pytest.raises(UserError, match=words):
        inspect.unwrap(route)(jnp.zeros((6, 4)), jnp.ones(6, bool), **settings)
