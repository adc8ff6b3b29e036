"""Losses in chunks of the vocabulary equal those of whole logits, in value and gradient."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aquila_jax.nn.losses import cross_entropy
from aquila_jax.nn.vocabulary_chunks import Head, token_losses, token_scores
from aquila_jax.sharding import Layout, MeshShape


def draw(config, rows=4, tokens=6):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(rows, tokens, config.embed_dim)).astype(np.float32)
    shape = (config.embed_dim, config.vocab_size)
    kernel = rng.normal(size=shape[::-1] if config.tie_embeddings else shape).astype(np.float32)
    targets = rng.integers(config.vocab_size, size=(rows, tokens)).astype(np.int32)
    # Ids at the ends of the vocabulary, and of chunks.
    targets[0, :4] = [0, config.vocab_size - 1, 7, 8]
    weights = rng.random((rows, tokens)).astype(np.float32)
    return x, kernel, jnp.asarray(targets), jnp.asarray(weights)


def value_and_gradients(head, x, kernel, targets, weights):
    def total(x, kernel):
        return jnp.sum(token_losses(head, x, kernel, targets) * weights)

    return jax.jit(jax.value_and_grad(total, argnums=(0, 1)))(x, kernel)


def expected(config, x, kernel, targets, weights):
    def total(x, kernel):
        logits = x @ (kernel.T if config.tie_embeddings else kernel)
        return cross_entropy(logits, targets, weights).total

    return jax.jit(jax.value_and_grad(total, argnums=(0, 1)))(x, kernel)


def assert_close(found, wanted, atol=2e-5):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=atol), found, wanted)


@pytest.mark.parametrize("chunk", [None, 61, 60, 31, 8, 1], ids=str)
@pytest.mark.parametrize("tied", [False, True])
def test_chunks_equal_whole_logits(tiny, chunk, tied):
    config = dataclasses.replace(tiny, tie_embeddings=tied)
    arrays = draw(config)
    assert_close(value_and_gradients(Head(config, chunk=chunk), *arrays), expected(config, *arrays))


@pytest.mark.parametrize(
    ("sizes", "vocab_size"),
    [
        ({"fsdp": 2, "model": 2}, 64),
        # An odd vocabulary: the width is split over both, and chunks go round.
        ({"fsdp": 2, "model": 2}, 61),
        ({"data": 1, "model": 4, "slices": 2}, 61),
    ],
    ids=str,
)
@pytest.mark.parametrize("chunk", [None, 8], ids=str)
@pytest.mark.parametrize("tied", [False, True])
def test_chunks_on_a_mesh_equal_whole_logits(tiny, sizes, vocab_size, chunk, tied):
    config = dataclasses.replace(tiny, vocab_size=vocab_size, tie_embeddings=tied)
    layout = Layout(MeshShape(**sizes).build())
    head = Head(config, layout, chunk)
    x, kernel, targets, weights = draw(config)
    spec = jax.sharding.NamedSharding(layout.mesh, layout.parameter_spec(head.path, config))
    placed = jax.device_put((x, targets), layout.batch())
    found = value_and_gradients(head, placed[0], jax.device_put(kernel, spec), placed[1], weights)
    assert_close(found, expected(config, x, kernel, targets, weights))


@pytest.mark.parametrize("sizes", [None, {"fsdp": 2, "model": 2}], ids=str)
@pytest.mark.parametrize("vocab_size", [64, 61])
@pytest.mark.parametrize("chunk", [None, 8], ids=str)
def test_scores_tell_what_is_likeliest(tiny, sizes, vocab_size, chunk):
    config = dataclasses.replace(tiny, vocab_size=vocab_size)
    layout = None if sizes is None else Layout(MeshShape(**sizes).build())
    x, kernel, targets, _ = draw(config)
    # Whole numbers, whose sums are exact in any order; and two tokens, far from each other, that
    # no logit tells apart: of equal ones each is the likeliest.
    x, kernel = np.round(4 * x) / 8, np.round(4 * kernel) / 8
    kernel[:, 3] = kernel[:, 50] = 2 * kernel[:, 50]
    best = np.einsum("btd,dv->btv", x, kernel).argmax(axis=-1)
    targets = np.where(np.arange(targets.size).reshape(targets.shape) % 2, best, targets)
    targets = np.where(best == 3, 50, targets).astype(np.int32)
    assert (best == 3).any()
    scores = jax.jit(lambda *a: token_scores(Head(config, layout, chunk), *a))
    losses, is_best = scores(x, kernel, targets)
    weights = np.ones(targets.shape, np.float32)
    wanted, _ = expected(config, x, kernel, jnp.asarray(targets), jnp.asarray(weights))
    np.testing.assert_allclose(losses.sum(), wanted, rtol=1e-5)
    np.testing.assert_array_equal(is_best, (targets == best) | (best == 3))


def test_no_array_is_as_large_as_the_logits(tiny):
    config = dataclasses.replace(tiny, vocab_size=4096)
    arrays = draw(config)
    logits = 4 * arrays[2].size * config.vocab_size
    sizes = {}
    for chunk in (None, 128):
        head = Head(config, chunk=chunk)

        def total(x, kernel, head=head):
            return token_losses(head, x, kernel, arrays[2]).sum()

        grad = jax.grad(total, argnums=(0, 1))
        memory: Any = jax.jit(grad).lower(*arrays[:2]).compile().memory_analysis()
        sizes[chunk] = memory.temp_size_in_bytes
    assert sizes[None] > logits > 3 * sizes[128]


def test_products_in_bfloat16_keep_sums_in_float32(tiny):
    config = dataclasses.replace(tiny, vocab_size=2000)
    x, kernel, targets, weights = draw(config)
    x, kernel = (np.asarray(jnp.asarray(a, jnp.bfloat16), np.float32) for a in (x, kernel))
    loss, gradients = value_and_gradients(
        Head(config, chunk=128), jnp.asarray(x, jnp.bfloat16), kernel, targets, weights
    )
    wanted, wanted_gradients = expected(config, x, kernel, targets, weights)
    assert loss.dtype == np.float32
    assert loss == pytest.approx(float(wanted), rel=1e-5)
    assert gradients[1].dtype == np.float32
    for found, exact in zip(gradients, wanted_gradients, strict=True):
        error = np.linalg.norm(np.asarray(found, np.float32) - exact)
        assert error < 4e-3 * np.linalg.norm(exact)
