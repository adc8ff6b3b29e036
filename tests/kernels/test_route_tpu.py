"""The kernels of `route`, carried out by the TPU interpreter, against the float64 reference."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aquila_jax.kernels import route
from tests.kernels.interpreter import interpreted


def adversarial(kind, num_tokens, num_experts, seed=0):
    """float32 logits that hold the float64 reference and the kernel to the same choices."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(scale=2, size=(num_tokens, num_experts))
    if kind == "ties":
        logits = np.round(logits)
    elif kind == "equal":
        logits[:] = 0.25
    elif kind == "one expert":
        logits[:, num_experts // 2] = 40
    elif kind == "empty experts":
        logits[:, ::2] = -40
    elif kind == "large":
        logits *= 1e3
    return logits.astype(np.float32)


def call(logits, is_token, weights, backend, settings):
    """Everything that `route` gives, and a gradient by all that has one."""
    settings = dict(settings)
    by_gates, by_sums = weights

    def objective(logits):
        routed = route(logits, is_token, backend=backend, **settings)
        sums = jnp.sum(routed.probability_sum_BE * by_sums) + 0.01 * routed.z_sum
        return jnp.sum(routed.gates_Nk * by_gates) + sums, routed

    gradient, routed = jax.jit(jax.grad(objective, has_aux=True))(logits)
    return routed, gradient


def compare(logits, is_token, *, rtol=1e-5, dtype=jnp.float32, **settings):
    num_tokens, num_experts = logits.shape
    k, sequences = settings["experts_per_token"], settings.get("sequences", 1)
    rng = np.random.default_rng(1)
    by_gates = rng.normal(size=(num_tokens, k)).astype(np.float32)
    by_sums = rng.normal(size=(sequences, num_experts)).astype(np.float32)
    narrow = jnp.asarray(logits, dtype)
    with interpreted():
        routed, gradient = jax.block_until_ready(
            call(narrow, jnp.asarray(is_token), (by_gates, by_sums), "pallas", settings)
        )
    with jax.enable_x64(True):
        wide = jnp.asarray(np.asarray(narrow, np.float64))
        expected, expected_gradient = jax.tree.map(
            np.asarray,
            call(wide, jnp.asarray(is_token), (by_gates, by_sums), "reference", settings),
        )
    for name in ("experts_Nk", "slots_Nk", "counts_E", "real_counts_BE", "not_finite"):
        np.testing.assert_array_equal(getattr(routed, name), getattr(expected, name), name)
    for name in ("gates_Nk", "probability_sum_BE", "z_sum"):
        got, want = getattr(routed, name), getattr(expected, name)
        np.testing.assert_allclose(got, want, rtol=rtol, atol=1e-6, err_msg=name)
    assert gradient.dtype == dtype
    scale = np.abs(expected_gradient).max()
    got, want = np.asarray(gradient, np.float64) / scale, expected_gradient / scale
    np.testing.assert_allclose(got, want, rtol if dtype == jnp.float32 else 2**-8, 2e-6)
    return routed


def tokens(num_tokens, seed=2):
    return np.random.default_rng(seed).random(num_tokens) < 0.8


@pytest.mark.parametrize(
    ("kind", "num_experts", "k"),
    [
        ("ties", 128, 8),
        ("equal", 8, 2),
        ("one expert", 16, 4),
        ("empty experts", 8, 2),
        ("large", 8, 3),
    ],
)
def test_equals_the_reference_however_tokens_fall(kind, num_experts, k):
    logits = adversarial(kind, 150, num_experts)
    compare(logits, tokens(150), experts_per_token=k, renormalize=True)


@pytest.mark.parametrize(
    ("num_experts", "k", "num_tokens", "sequences", "scores", "renormalize"),
    [
        (2, 1, 5, 1, "softmax", False),
        (2, 2, 130, 2, "sigmoid", True),
        (5, 3, 1, 1, "sigmoid", False),
        (12, 4, 384, 3, "softmax", True),
        (64, 6, 257, 1, "softmax", False),
        (256, 8, 70, 1, "sigmoid", True),
    ],
)
def test_equals_the_reference_at_any_size(
    num_experts, k, num_tokens, sequences, scores, renormalize
):
    compare(
        adversarial("random", num_tokens, num_experts),
        tokens(num_tokens),
        experts_per_token=k,
        sequences=sequences,
        scores=scores,
        renormalize=renormalize,
    )


def test_many_tiles_carry_what_experts_have_received():
    routed = compare(
        adversarial("ties", 2 * 8192 + 100, 4),
        tokens(2 * 8192 + 100),
        experts_per_token=2,
        renormalize=True,
        rtol=3e-5,
    )
    assert routed.counts_E.sum() == 2 * (2 * 8192 + 100)


def test_a_bias_chooses_and_does_not_weigh():
    bias = jnp.asarray([0.4, 0, -9, 0, 0.1, 0, 0, 0, 0, 0.2], jnp.float32)
    routed = compare(
        adversarial("random", 140, 10),
        tokens(140),
        experts_per_token=2,
        renormalize=True,
        scores="sigmoid",
        bias_E=bias,
    )
    assert not (np.asarray(routed.experts_Nk) == 2).any()


def test_bfloat16_logits_are_computed_in_float32():
    compare(
        adversarial("random", 140, 16),
        tokens(140),
        experts_per_token=2,
        renormalize=True,
        dtype=jnp.bfloat16,
    )


def test_logits_that_are_not_finite_leave_valid_choices_and_other_tokens_alone():
    logits = adversarial("random", 9, 10)
    logits[1], logits[2, 3], logits[4, 0], logits[5, 1:] = np.nan, np.nan, np.inf, -np.inf
    call = functools.partial(
        jax.jit(route, static_argnames=("experts_per_token", "renormalize", "backend")),
        jnp.asarray(logits),
        jnp.ones(9, bool),
        experts_per_token=3,
        renormalize=True,
    )
    with interpreted():
        routed = jax.block_until_ready(call(backend="pallas"))
    expected = call(backend="reference")
    for name in ("experts_Nk", "slots_Nk", "counts_E", "not_finite"):
        np.testing.assert_array_equal(getattr(routed, name), getattr(expected, name), name)
    fine = np.array([0, 3, 5, 6, 7, 8])
    np.testing.assert_allclose(routed.gates_Nk[fine], expected.gates_Nk[fine], rtol=1e-6)
    assert np.isnan(np.asarray(routed.gates_Nk)[[1, 2, 4]]).all()


def test_no_tokens_are_routed_nowhere():
    with interpreted():
        routed = route(
            jnp.zeros((0, 4)),
            jnp.zeros(0, bool),
            experts_per_token=2,
            renormalize=True,
            backend="pallas",
        )
        jax.block_until_ready(routed)
    assert routed.slots_Nk.shape == (0, 2)
    assert routed.counts_E.tolist() == [0, 0, 0, 0]
