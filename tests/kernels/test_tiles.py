"""Tokens in tiles and back, and scores of a tile against float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aquila_jax.kernels import tiles
from aquila_jax.kernels.spec import RouteSpec, Scores


def spec(sequences: int = 1, scores: Scores = "softmax") -> RouteSpec:
    return RouteSpec(2, True, scores, sequences, False, "auto")


@pytest.mark.parametrize("num_experts", [1, 8, 60, 128, 384])
@pytest.mark.parametrize("length", [0, 1, 127, 129, 9000])
def test_tiles_cover_a_sequence_in_whole_chunks_and_registers(num_experts, length):
    tiling = tiles.Tiling.of(num_experts, length)
    assert tiling.num_experts >= num_experts
    assert tiling.num_experts % tiles.SUBLANES == 0
    assert tiling.tile % tiling.chunk == 0
    assert tiling.chunk % tiles.LANES == 0
    assert tiling.tile * (tiling.tiles - 1) < max(length, 1) <= tiling.tile * tiling.tiles


@pytest.mark.parametrize(("sequences", "length"), [(1, 5), (3, 130), (2, 128)])
def test_filling_up_and_back_is_the_same(sequences, length):
    x = jnp.arange(sequences * length * 2, dtype=jnp.int32).reshape(-1, 2)
    tiling = tiles.Tiling.of(8, length)
    filled = tiles.fill(spec(sequences), tiling, x, -7)
    assert filled.shape == (2, sequences * tiling.tiles * tiling.tile)
    assert (np.asarray(filled) == -7).sum() == filled.size - x.size
    np.testing.assert_array_equal(tiles.unfill(spec(sequences), filled, len(x)), x)


def test_what_fills_up_is_absent_and_experts_that_are_not_there_are_never_chosen():
    logits, is_token = jnp.zeros((3, 5)), jnp.asarray([True, False, True])
    logits_EN, state_1N = tiles.padded(spec(), tiles.Tiling.of(5, 3), logits, is_token)
    assert np.isneginf(logits_EN[5:]).all()
    assert np.isfinite(logits_EN[:5]).all()
    state = np.asarray(state_1N)[0]
    assert state[:3].tolist() == [tiles.REAL, tiles.PADDING, tiles.REAL]
    assert set(state[3:].tolist()) == {tiles.ABSENT}


@pytest.mark.parametrize("scores", ["softmax", "sigmoid"])
def test_scores_equal_their_formulas_in_float64(scores):
    logits = np.random.default_rng(0).normal(scale=3, size=(8, 16))
    found = tiles.score(spec(scores=scores), jnp.asarray(logits, jnp.float32))
    softmax = np.exp(logits) / np.exp(logits).sum(0)
    sigmoid = 1 / (1 + np.exp(-logits))
    expected = softmax if scores == "softmax" else sigmoid
    np.testing.assert_allclose(found.scores, expected, rtol=2e-6)
    np.testing.assert_allclose(found.probability, expected / expected.sum(0), rtol=2e-6)
    np.testing.assert_allclose(found.softmax, softmax, rtol=2e-6)
    np.testing.assert_allclose(found.normaliser[0], np.log(np.exp(logits).sum(0)), rtol=1e-5)


def test_what_is_not_a_number_is_the_lowest():
    x = jnp.asarray([jnp.nan, -jnp.inf, 3.0, jnp.inf])
    lowest = float(jnp.finfo(jnp.float32).min)
    assert tiles.finite(x).tolist() == [lowest, lowest, 3.0, jnp.inf]
    assert jax.jit(tiles.finite)(x).tolist() == tiles.finite(x).tolist()
