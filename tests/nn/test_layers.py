import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aquila_jax.nn.attention import causal_mask
from aquila_jax.nn.layers import rotary

from .reference import rotate

THETA = 50.0


def turned(vector, position):
    x = jnp.asarray(vector, jnp.float32)[None, None, None]
    return np.asarray(rotary(x, jnp.array([[position]]), THETA))[0, 0, 0]


def test_rotary_scores_depend_only_on_the_distance():
    query, key = np.random.default_rng(0).normal(size=(2, 8))
    scores = [turned(query, 5 + shift) @ turned(key, 2 + shift) for shift in (0, 1, 9, 30)]
    np.testing.assert_allclose(scores, scores[0], rtol=0, atol=1e-5)
    assert abs(turned(query, 6) @ turned(key, 2) - scores[0]) > 1e-2


def test_rotary_keeps_lengths_and_position_zero():
    vector = np.random.default_rng(1).normal(size=8)
    np.testing.assert_allclose(turned(vector, 0), vector, rtol=1e-6)
    assert np.linalg.norm(turned(vector, 17)) == pytest.approx(np.linalg.norm(vector), rel=1e-6)
    assert np.abs(turned(vector, 17) - vector).max() > 0.1


def test_rotary_turns_every_head_by_complex_frequencies():
    x = np.random.default_rng(2).normal(size=(2, 5, 3, 8))
    positions = np.array([[0, 1, 2, 3, 4], [0, 1, 0, 1, 2]])
    with jax.enable_x64(True):
        result = np.asarray(rotary(jnp.asarray(x), jnp.asarray(positions), THETA))
    for row in range(2):
        for head in range(3):
            expected = rotate(x[row, :, head], positions[row], THETA)
            np.testing.assert_allclose(result[row, :, head], expected, rtol=0, atol=1e-12)


def test_the_mask_shows_earlier_tokens_of_the_same_document():
    segments = np.array([[1, 1, 2, 2, 0]])
    expected = [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [0, 0, 1, 0, 0],
        [0, 0, 1, 1, 0],
        [0, 0, 0, 0, 1],
    ]
    np.testing.assert_array_equal(causal_mask(jnp.asarray(segments))[0, 0], expected)


def test_annotated_shapes_are_checked_in_these_tests():
    with pytest.raises(Exception, match="Type-check error"):
        causal_mask(jnp.zeros((2, 3, 4), jnp.int32))
