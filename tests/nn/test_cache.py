"""Logits with a cache equal those of whole texts."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aquila_jax import RopeScaling
from aquila_jax.nn import Transformer
from aquila_jax.nn.cache import extend, prefill, unroll

MIXTURE = {"num_experts": 4, "experts_per_token": 2}
CHANGES = {
    "dense": {},
    "biases apart, tied": {"qkv_bias": False, "tie_embeddings": True},
    "normed queries, scaled positions": {
        "qk_norm": True,
        "rope_scaling": RopeScaling("llama3", 8.0, 1.0, 4.0, 32),
    },
    "mixture": {**MIXTURE, "expert_mlp_dim": 7, "shared_mlp_dim": 9},
    "every second": {**MIXTURE, "num_layers": 4, "moe_every": 2},
    "every third, one query head a group": {
        **MIXTURE, "num_layers": 6, "moe_every": 3, "num_heads": 2
    },
}  # fmt: skip
PROMPTS = np.array([5, 1, 3])
NUM_NEW = 4
# The softmax over a prompt is float32 in every model.
SOFTMAX_ROUNDING = 2e-6


def cached_logits(config, params, texts, *, left: bool, dtype, chunk=1, unrolled=False):
    """Logits `[B, NUM_NEW, V]` of each text's last tokens, prompts padded on one side."""
    params = unroll(params, config) if unrolled else params
    params = jax.tree.map(jnp.asarray, params)
    model, width = Transformer(config, dtype=dtype, unrolled=unrolled), int(PROMPTS.max())
    prompts = np.full((len(texts), width), 7, np.int32)
    is_token = np.zeros(prompts.shape, bool)
    for row, (text, length) in enumerate(zip(texts, PROMPTS, strict=True)):
        at = slice(width - length, width) if left else slice(0, length)
        prompts[row, at], is_token[row, at] = text[:length], True
    read = jax.jit(lambda *a: prefill(model, params, *a, capacity=width + NUM_NEW + 2))
    go_on = jax.jit(lambda *a: extend(model, params, *a))
    _, cache = read(jnp.asarray(prompts), jnp.asarray(is_token))
    found = []
    for step in range(0, NUM_NEW, chunk):
        new = np.stack(
            [text[n + step : n + step + chunk] for text, n in zip(texts, PROMPTS, strict=True)]
        )
        logits, cache = go_on(jnp.asarray(new), cache)
        found.append(logits)
    return np.concatenate(found, axis=1)


def whole_logits(config, params, texts, model_logits, dtype):
    logits = model_logits(config, params, jnp.asarray(texts), dtype=dtype)
    return np.stack([row[n : n + NUM_NEW] for row, n in zip(logits, PROMPTS, strict=True)])


@pytest.mark.parametrize(
    ("name", "left"),
    [*((name, True) for name in CHANGES), ("dense", False), ("every second", False)],
)
def test_cached_logits_equal_those_of_whole_texts_unrolled_and_scanned(
    tiny, random_params, model_logits, name, left
):
    config = dataclasses.replace(tiny, **CHANGES[name])
    params = random_params(config)
    texts = np.random.default_rng(3).integers(config.vocab_size, size=(3, 9), dtype=np.int32)
    expected = whole_logits(config, params, texts, model_logits, np.float32)
    found = cached_logits(config, params, texts, left=left, dtype=np.float32, unrolled=left)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("chunk", [1, 2])
def test_in_float64_they_are_closer(tiny, random_params, reference_logits, chunk):
    config = dataclasses.replace(tiny, **CHANGES["every second"], qk_norm=True)
    params = random_params(config, dtype=np.float64)
    texts = np.random.default_rng(4).integers(config.vocab_size, size=(3, 9), dtype=np.int32)
    expected = np.stack(
        [
            reference_logits(config, params, text[None])[0, n : n + NUM_NEW]
            for text, n in zip(texts, PROMPTS, strict=True)
        ]
    )
    with jax.enable_x64(True):
        found = cached_logits(config, params, texts, left=False, dtype=np.float64, chunk=chunk)
    np.testing.assert_allclose(found, expected, rtol=0, atol=SOFTMAX_ROUNDING)
