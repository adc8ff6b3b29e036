"""One leaf from another, rule by rule."""

import jax.numpy as jnp
import numpy as np
import pytest

from aquila_jax.growth.rules import Experts, Extend, Fresh, Mapped, Noise, Take, UpperLayer


def test_takes_layers_upper_layers_and_repeats_are_done_in_that_order():
    leaf = jnp.asarray(np.arange(6.0, dtype=np.float32).reshape(3, 2))
    rule = Mapped(
        "leaf",
        takes=[Take(1, np.array([0, 1, 0]), np.array([0.5, 1.0, 0.5]))],
        layers=np.array([0, 2]),
        upper=UpperLayer(np.array([1, 2]), np.array([[False, False, True]])),
        experts=Experts(1, np.array([[0, 1, 2], [2, 1, 0]]), None, "turned"),
    )
    expected = [[0 * 0.5, 1, 2 * 0.5], [4 * 0.5, 5, 4 * 0.5]]
    grown = np.asarray(rule.apply(leaf))
    assert grown.shape == (2, 2, 3)
    np.testing.assert_array_equal(grown[:, 0], expected)
    np.testing.assert_array_equal(grown[:, 1], np.array(expected)[:, ::-1])


@pytest.mark.parametrize(
    ("rule", "origin"),
    [
        (Mapped("leaf"), "copied"),
        (Mapped("leaf", takes=[Take(0, np.array([0, 0]))]), "copied"),
        (Mapped("leaf", experts=Experts(1, np.array([[0], [0]]), None, "equal")), "copied"),
        (Mapped("leaf", silent=np.array([False, True])), "mapped"),
        (Mapped("leaf", extend=Extend(0, 3, "mean")), "mapped"),
        (Mapped("leaf", noise=Noise(0.1, np.array([True]), "noise")), "mapped"),
        (Mapped("leaf", takes=[Take(0, np.array([0, 0]), np.array([0.5, 0.5]))]), "mapped"),
        (Mapped("leaf", upper=UpperLayer(np.array([0]), np.array([True]))), "mapped"),
        (Fresh(0.1), "fresh"),
    ],
)
def test_origins_are_told_apart(rule, origin):
    assert rule.origin == origin
    assert rule.how
