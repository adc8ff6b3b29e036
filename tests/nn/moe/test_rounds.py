"""A sum over rounds, against the same sum written out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aquila_jax.nn.moe.rounds import sum_of_rounds


def one_round(number, arrays, places):
    """Rows `number` and those after it, by a matrix; what it gives depends on the round."""
    x, weights = arrays
    picked = x[(places + number) % len(x)]
    return jnp.tanh(picked @ weights["w"]) * (number + 1)


def draw():
    rng = np.random.default_rng(0)
    arrays = rng.normal(size=(6, 3)), {"w": rng.normal(size=(3, 4))}
    return arrays, np.array([4, 0, 1], np.int32), rng.normal(size=(3, 4))


@pytest.mark.parametrize("rounds", [0, 1, 3])
def test_value_and_gradients_are_those_of_the_rounds_one_by_one(rounds):
    arrays, places, by = draw()

    def number(add_up):
        return lambda arrays: jnp.sum(add_up(arrays) * by)

    def written_out(arrays):
        zeros = jnp.zeros_like(by)
        return sum((one_round(number, arrays, places) for number in range(rounds)), zeros)

    def looped(arrays, rounds):
        return number(lambda arrays: sum_of_rounds(one_round, rounds, arrays, places))(arrays)

    with jax.enable_x64(True):
        arrays = jax.tree.map(jnp.asarray, arrays)
        # The number of rounds is an argument: nothing in the program knows it.
        found = jax.jit(jax.value_and_grad(looped))(arrays, jnp.int32(rounds))
        expected = jax.value_and_grad(number(written_out))(arrays)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-13, atol=1e-13), found, expected
    )


def test_the_backward_pass_keeps_what_goes_in_and_no_round():
    arrays, places, _ = draw()
    arrays = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), arrays)
    _, pull = jax.vjp(lambda a: sum_of_rounds(one_round, jnp.int32(5), a, places), arrays)
    kept = sorted(leaf.shape for leaf in jax.tree.leaves(pull) if np.ndim(leaf))
    assert kept == [(3,), (3, 4), (6, 3)]
