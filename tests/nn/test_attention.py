"""Attention to cached and new tokens at once, against attention to all of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aquila_jax.kernels.attention import attend
from aquila_jax.nn.attention import attend_cached

B, CACHED, T, K, H = 2, 5, 4, 2, 6


def draw(groups, dtype=np.float32):
    rng = np.random.default_rng(groups)
    query = rng.normal(size=(B, T, groups * K, H)).astype(dtype)
    key, value = rng.normal(size=(2, B, CACHED + T, K, H)).astype(dtype)
    return tuple(map(jnp.asarray, (query, key, value)))


@pytest.mark.parametrize("groups", [1, 3])
def test_it_is_attention_to_all_tokens(groups):
    query, key, value = draw(groups)
    # The second row's cache holds two tokens that no one may see any longer.
    seen = np.ones((B, T, CACHED), bool)
    seen[1, :, :2] = False
    whole = np.ones((B, CACHED + T), np.int32)
    whole[1, :2] = 0
    found = attend_cached(
        query, (key[:, :CACHED], value[:, :CACHED]), (key[:, CACHED:], value[:, CACHED:]),
        jnp.asarray(seen), jnp.ones((B, T), jnp.int32),
    )  # fmt: skip
    padded = jnp.concatenate([jnp.zeros((B, CACHED, groups * K, H)), query], axis=1)
    expected = attend(padded, key, value, jnp.asarray(whole), backend="xla")[:, CACHED:]
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-6)


def test_new_tokens_do_not_see_later_ones_nor_other_documents():
    query, key, value = draw(1)
    segments = jnp.asarray([[1, 1, 2, 2]] * B, jnp.int32)
    sees = jnp.asarray(np.tile([[True], [True], [False], [False]], (B, 1, CACHED)))

    def mixed(value):
        cached, new = (key[:, :CACHED], value[:, :CACHED]), (key[:, CACHED:], value[:, CACHED:])
        return attend_cached(query, cached, new, sees, segments)

    def influence(query_at):
        gradient = jax.grad(lambda value: jnp.abs(mixed(value)[:, query_at]).sum())(value)
        return (np.abs(np.asarray(gradient)).max(axis=(0, 2, 3)) > 0).tolist()

    cached = [True] * CACHED
    assert influence(0) == [*cached, True, False, False, False]
    assert influence(1) == [*cached, True, True, False, False]
    assert influence(2) == [*[False] * CACHED, False, False, True, False]
    assert influence(3) == [*[False] * CACHED, False, False, True, True]


def test_scores_of_bfloat16_are_summed_in_float32():
    query, key, value = draw(2, jnp.bfloat16)
    arguments = (
        (key[:, :CACHED], value[:, :CACHED]), (key[:, CACHED:], value[:, CACHED:]),
        jnp.ones((B, T, CACHED), bool), jnp.ones((B, T), jnp.int32),
    )  # fmt: skip
    found = attend_cached(query, *arguments)
    wide = jax.tree.map(
        lambda x: x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x, (query, *arguments)
    )
    assert found.dtype == jnp.bfloat16
    np.testing.assert_allclose(found.astype(jnp.float32), attend_cached(*wide), rtol=0, atol=2**-6)
