"""`permute` and `unpermute` against their definitions, row by row in float64."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aquila_jax.errors import UserError
from aquila_jax.kernels import permute, unpermute
from tests.kernels import by_hand

N, K, D = 7, 3, 5


def draw(num_rows=None, dtype=np.float32):
    """Values, and slots: a permutation, or scattered with some pairs dropped on either side."""
    rng = np.random.default_rng(0)
    places = rng.permutation(N * K)
    if num_rows is not None:
        places = rng.permutation(np.arange(-3, num_rows + 4))[: N * K]
    x = jnp.asarray(rng.normal(size=(N, D)), dtype)
    rows = jnp.asarray(rng.normal(size=(num_rows or N * K, D)), dtype)
    gates = jnp.asarray(rng.normal(size=(N, K)), jnp.float32)
    return x, rows, jnp.asarray(places.reshape(N, K), jnp.int32), gates


@pytest.mark.parametrize("num_rows", [None, 18, 30])
@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
def test_both_equal_their_definitions(num_rows, dtype):
    x, rows, slots, gates = draw(num_rows, dtype)
    permuted = permute(x, slots, num_rows=num_rows)
    expected = by_hand.permute(np.asarray(x, np.float64), slots, num_rows or N * K)
    np.testing.assert_array_equal(np.asarray(permuted, np.float64), expected)
    combined = unpermute(rows, slots, gates)
    expected = by_hand.unpermute(rows, slots, gates)
    rtol = 2e-6 if dtype == np.float32 else 2**-8
    np.testing.assert_allclose(np.asarray(combined, np.float64), expected, rtol, 1e-6)
    assert permuted.dtype == combined.dtype == dtype


@pytest.mark.parametrize("num_rows", [None, 18, 30])
def test_gradients_are_the_transposes(num_rows):
    """Both are linear in each argument: the gradient's inner products are known exactly."""
    x, rows, slots, gates = draw(num_rows)
    rng = np.random.default_rng(1)
    by_rows, by_x = rng.normal(size=rows.shape), rng.normal(size=x.shape)
    gradient = jax.grad(lambda x: jnp.sum(permute(x, slots, num_rows=num_rows) * by_rows))(x)
    expected = by_hand.unpermute(by_rows, slots, np.ones((N, K)))
    np.testing.assert_allclose(gradient, expected, rtol=1e-5, atol=1e-6)

    rows_gradient, gates_gradient = jax.grad(
        lambda rows, gates: jnp.sum(unpermute(rows, slots, gates) * by_x), argnums=(0, 1)
    )(rows, gates)
    expected = np.zeros(rows.shape)
    for choice in range(K):
        weighed = by_x * np.asarray(gates, np.float64)[:, choice, None]
        expected += by_hand.permute(weighed, slots[:, choice, None], len(rows))
    np.testing.assert_allclose(rows_gradient, expected, rtol=1e-6, atol=1e-7)
    for choice in range(K):
        only = np.eye(K)[choice] * np.ones((N, 1))
        taken = by_hand.unpermute(rows, slots, only)
        np.testing.assert_allclose(gates_gradient[:, choice], (taken * by_x).sum(1), 1e-5, 1e-6)


@pytest.mark.parametrize("num_rows", [None, 18, 30])
def test_without_gates_rows_are_added_up(num_rows):
    _, rows, slots, _ = draw(num_rows)
    combined, pull_back = jax.vjp(lambda rows: unpermute(rows, slots, None), rows)
    ones = np.ones((N, K))
    np.testing.assert_allclose(combined, by_hand.unpermute(rows, slots, ones), 2e-6, 1e-6)
    bar = np.random.default_rng(1).normal(size=(N, D)).astype(np.float32)
    expected = by_hand.permute(np.asarray(bar, np.float64), slots, len(rows))
    np.testing.assert_array_equal(pull_back(jnp.asarray(bar))[0], expected)


def test_rows_that_no_pair_has_are_never_read():
    _, rows, slots, gates = draw(30)
    unused = np.setdiff1d(np.arange(30), np.asarray(slots))
    poisoned = rows.at[unused].set(jnp.nan)
    np.testing.assert_array_equal(unpermute(poisoned, slots, gates), unpermute(rows, slots, gates))


def test_no_tokens():
    slots, gates = jnp.zeros((0, K), jnp.int32), jnp.zeros((0, K))
    assert permute(jnp.ones((0, D)), slots).shape == (0, D)
    assert (permute(jnp.ones((0, D)), slots, num_rows=4) == jnp.zeros((4, D))).all()
    assert unpermute(jnp.ones((4, D)), slots, gates).shape == (0, D)


def test_no_rows():
    x, _, slots, gates = draw(18)
    assert permute(x, slots, num_rows=0).shape == (0, D)
    value, pull = jax.vjp(lambda gates: unpermute(jnp.ones((0, D)), slots, gates), gates)
    assert (value == 0).all()
    assert (pull(value + 1)[0] == 0).all()


def test_mistakes_are_told():
    _, _, slots, _ = draw()
    with pytest.raises(UserError, match="num_rows must not be negative, not -1"):
        permute(jnp.ones((N, D)), slots, num_rows=-1)
    with pytest.raises(UserError, match="no kernel backend"):
        inspect.unwrap(permute)(jnp.ones((N, D)), slots, backend="cuda")
