from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from aquila_jax import UserError, axes, preset
from aquila_jax.training import AdamW, Cosine, WarmupStableDecay


def test_cosine_warms_up_linearly_and_ends_at_its_fraction():
    schedule = Cosine(peak=2.0, warmup_steps=10, end_fraction=0.1).build(110)
    rates = [float(jnp.asarray(schedule(step))) for step in (0, 5, 10, 60, 110)]
    # Half-way through the decay the cosine is half-way between peak and end.
    np.testing.assert_allclose(rates, [0.0, 1.0, 2.0, (2.0 + 0.2) / 2, 0.2], rtol=1e-6)


def test_warmup_stable_decay_has_a_plateau_and_a_linear_end():
    schedule = WarmupStableDecay(
        peak=1.0, warmup_steps=10, decay_fraction=0.2, end_fraction=0.0
    ).build(100)
    rates = [float(jnp.asarray(schedule(step))) for step in (0, 5, 10, 50, 80, 90, 100)]
    np.testing.assert_allclose(rates, [0.0, 0.5, 1.0, 1.0, 1.0, 0.5, 0.0], atol=1e-6)


@pytest.mark.parametrize("schedule", [Cosine(1.0, 10), WarmupStableDecay(1.0, 10)])
def test_a_warmup_longer_than_the_run_is_refused(schedule):
    with pytest.raises(UserError, match=r"warmup_steps \(10\).* 10 steps"):
        schedule.build(10)


def _one_update(optimizer: Any, params: Any, gradients: Any) -> Any:
    state = optimizer.init(params)
    updates, _ = optimizer.update(gradients, state, params)
    return optax.apply_updates(params, updates)


def test_only_matrices_decay():
    table = axes.parameters(preset("toy_dense"))
    flat = {path: jnp.ones((2, 2)) for path in table}
    params = axes.unflatten(flat)
    zeros = axes.unflatten({path: jnp.zeros((2, 2)) for path in table})
    # The cosine's rate at step 0 is 0 with a warm-up, so there is none.
    optimizer = AdamW(Cosine(peak=0.1, warmup_steps=0), weight_decay=0.5).build(10, table)
    moved = axes.flatten(_one_update(optimizer, params, zeros))
    for path in table:
        is_matrix = not path.endswith(("/scale", "_bias"))
        np.testing.assert_allclose(moved[path], 1 - 0.1 * 0.5 if is_matrix else 1.0, rtol=1e-6)


def test_adamw_equals_its_definition_after_clipping():
    table = {"w": axes.Parameter((axes.EMBED,), (axes.EMBED,))}
    spec = AdamW(
        Cosine(peak=0.1, warmup_steps=0), b1=0.8, b2=0.9, eps=1e-3, weight_decay=0.2,
        max_gradient_norm=1.0,
    )  # fmt: skip
    weight, gradient = np.array([1.0, -2.0]), np.array([3.0, 4.0])
    got = _one_update(spec.build(10, table), {"w": jnp.array(weight)}, {"w": jnp.array(gradient)})
    clipped = gradient / 5.0
    # After one step the bias-corrected moments are the gradient and its square.
    direction = clipped / (np.sqrt(clipped**2) + 1e-3) + 0.2 * weight
    np.testing.assert_allclose(got["w"], weight - 0.1 * direction, rtol=1e-5)


def as_bound(value: Any) -> Any:
    """As gin binds it: whatever was written."""
    return value


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Cosine(as_bound("fast"), 10), "peak must be a number, at least 0, not 'fast'"),
        (lambda: Cosine(-1e-3, 10), "peak must be a number, at least 0, not -0.001"),
        (
            lambda: Cosine(1e-3, as_bound(2.5)),
            "warmup_steps must be a whole number, at least 0, not 2.5",
        ),
        (lambda: WarmupStableDecay(1.0, 1, decay_fraction=1.1), "decay_fraction must be a number"),
        (lambda: AdamW(Cosine(1.0, 1), b2=1), "b2 must be a number, at least 0, below 1, not 1"),
        (lambda: AdamW(Cosine(1.0, 1), weight_decay=float("nan")), "weight_decay must be a number"),
    ],
)
def test_settings_that_mean_nothing_are_refused(make: Any, says: str):
    with pytest.raises(UserError, match=says):
        make()
