"""Random numbers that are equal wherever they are drawn, and sums in one order."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aquila_jax.growth.draws import chosen, exactly, leaf_key, normal, tree_sum

KEY = jax.random.key(0)


def test_a_layer_drawn_alone_is_that_layer_of_all():
    whole = np.asarray(normal(KEY, (4, 5, 3), np.arange(4)))
    for layer in range(4):
        np.testing.assert_array_equal(normal(KEY, (1, 5, 3), np.array([layer]))[0], whole[layer])
    assert len(np.unique(whole.reshape(4, -1), axis=0)) == 4


def test_numbers_are_standard_normal():
    drawn = np.asarray(normal(KEY, (200_000,), None), np.float64)
    assert abs(drawn.mean()) < 0.01
    assert abs(drawn.std() - 1) < 0.01
    # A table of quantiles has no tail beyond its last slice.
    assert 3.5 < np.abs(drawn).max() < 4.4
    assert abs((np.abs(drawn) < 1).mean() - 0.6827) < 0.005


@pytest.mark.parametrize("fraction", [0.1, 0.5, 0.9])
def test_the_asked_share_is_chosen(fraction):
    share = np.asarray(chosen(KEY, (100_000,), None, fraction)).mean()
    assert abs(share - fraction) < 0.01


def test_a_leafs_key_is_its_own():
    keys = {path: leaf_key(KEY, path) for path in ("a", "b", "a: which")}
    draws = [np.asarray(normal(key, (8,), None)).tobytes() for key in keys.values()]
    assert len(set(draws)) == 3
    np.testing.assert_array_equal(
        jax.random.key_data(leaf_key(KEY, "a")), jax.random.key_data(keys["a"])
    )


@pytest.mark.parametrize("size", [1, 2, 3, 7, 8, 13])
def test_a_sum_has_one_order_in_numpy_and_jax_eager_and_jitted(size):
    x = np.random.default_rng(size).normal(size=(3, size, 2)).astype(np.float32)
    summed = tree_sum(x, 1, np)
    assert summed.shape == (3, 1, 2)
    np.testing.assert_allclose(summed[:, 0], x.astype(np.float64).sum(1), rtol=1e-5, atol=1e-6)
    for function in (tree_sum, jax.jit(tree_sum, static_argnums=(1, 2))):
        np.testing.assert_array_equal(function(jnp.asarray(x), 1, jnp), summed)


def test_rounding_before_a_sum_changes_no_value():
    values = np.array([0.0, -0.0, 1.5, -np.inf, np.inf, np.nan, 1e-45], np.float32)
    for function in (exactly, jax.jit(exactly), functools.partial(exactly)):
        np.testing.assert_array_equal(function(jnp.asarray(values)), values)
    assert exactly(values) is values
