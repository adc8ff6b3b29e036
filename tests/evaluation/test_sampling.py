import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aquila_jax.errors import UserError
from aquila_jax.evaluation.sampling import Sampling, choose, restrict

PROBABILITIES = np.array([[0.1, 0.5, 0.05, 0.3, 0.05]])
LOGITS = jnp.log(jnp.asarray(PROBABILITIES, jnp.float32))


def kept(**options):
    return np.flatnonzero(np.isfinite(restrict(LOGITS, Sampling(1.0, **options))[0])).tolist()


def test_top_k_and_top_p_leave_the_likeliest():
    assert kept(top_k=2) == [1, 3]
    assert kept(top_p=0.7) == [1, 3]
    assert kept(top_p=0.85) == [0, 1, 3]
    assert kept(top_p=1e-6) == [1]
    assert kept(top_k=2, top_p=0.6) == [1]  # of the two that stay, the first has 0.625
    assert kept() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_have_the_probabilities_they_should(temperature):
    count = 20_000
    rows = jnp.arange(count)
    drawn = choose(jnp.tile(LOGITS, (count, 1)), Sampling(temperature), rows, jnp.asarray(0))
    expected = PROBABILITIES[0] ** (1 / temperature)
    expected /= expected.sum()
    found = np.bincount(np.asarray(drawn), minlength=5) / count
    # Four standard deviations of a share.
    np.testing.assert_allclose(found, expected, atol=4 * 0.5 / np.sqrt(count))


def test_draws_differ_by_seed_row_and_step_and_by_nothing_else():
    logits = jnp.zeros((50, 1000))

    def draw(seed=0, first_row=0, step=0):
        rows = first_row + jnp.arange(50)
        return np.asarray(choose(logits, Sampling(1.0, seed=seed), rows, jnp.asarray(step)))

    base = draw()
    np.testing.assert_array_equal(draw(), base)
    np.testing.assert_array_equal(draw(first_row=10)[:40], base[10:])
    for other in (draw(seed=1), draw(step=1), base[::-1]):
        assert np.mean(other == base) < 0.2


def test_greedy_takes_the_first_of_equals():
    logits = jnp.asarray([[0.0, 2.0, 2.0], [3.0, 1.0, 3.0]])
    assert jax.jit(choose, static_argnums=1)(logits, Sampling(), jnp.arange(2), 0).tolist() == [
        1,
        0,
    ]


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": -1.0},
        {"temperature": 1.0, "top_k": -1},
        {"temperature": 1.0, "top_p": 0.0},
        {"top_k": 3},
        {"top_p": 0.5},
    ],
)
def test_values_out_of_range_are_refused(options):
    with pytest.raises(UserError):
        Sampling(**options)
