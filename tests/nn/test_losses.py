import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import log_softmax

from aquila_jax.nn.losses import WeightedSum, cross_entropy


def draw(scale=5.0):
    rng = np.random.default_rng(0)
    logits = (scale * rng.normal(size=(3, 4, 17))).astype(np.float32)
    return logits, rng.integers(17, size=(3, 4)), rng.random((3, 4)).astype(np.float32)


def expected_total(logits, targets, weights):
    log_probabilities = log_softmax(logits.astype(np.float64), axis=-1)
    picked = np.take_along_axis(log_probabilities, targets[..., None], axis=-1)[..., 0]
    return -(picked * weights).sum()


@pytest.mark.parametrize("scale", [1.0, 5.0, 100.0])
def test_cross_entropy_equals_scipy_in_float64(scale):
    logits, targets, weights = draw(scale)
    loss = cross_entropy(jnp.asarray(logits), jnp.asarray(targets), jnp.asarray(weights))
    assert loss.total == pytest.approx(expected_total(logits, targets, weights), rel=1e-5)
    assert loss.weight == pytest.approx(weights.sum(), rel=1e-6)
    assert loss.mean == pytest.approx(float(loss.total) / weights.sum(), rel=1e-5)


def test_targets_of_weight_zero_do_not_count():
    logits, targets, weights = draw()
    weights[1], weights[:, 2] = 0, 0
    changed = np.where(weights == 0, (targets + 3) % 17, targets)
    assert (changed != targets).any()
    losses = [
        cross_entropy(jnp.asarray(logits), jnp.asarray(t), jnp.asarray(weights))
        for t in (targets, changed)
    ]
    assert losses[0].total == losses[1].total


def test_bfloat16_logits_are_summed_in_float32():
    logits, targets, weights = draw()
    half = jnp.asarray(logits, jnp.bfloat16)
    loss = cross_entropy(half, jnp.asarray(targets), jnp.asarray(weights))
    assert loss.total.dtype == np.float32
    expected = expected_total(np.asarray(half, np.float32), targets, weights)
    assert loss.total == pytest.approx(expected, rel=1e-5)


def test_the_mean_of_nothing_is_zero():
    assert WeightedSum(jnp.zeros(()), jnp.zeros(())).mean == 0
