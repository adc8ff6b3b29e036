"""Validation loss by language, by token and by byte."""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import numpy as np

from aquila_jax.data.pretrained_tokenizer import Tokenizer
from aquila_jax.nn import Transformer, forward_losses
from aquila_jax.nn.losses import WeightedSum

Batch = Mapping[str, Any]

# Of a language, in which bytes are counted: decoding more would hold a large run up.
_COUNTED = 1 << 20


def make_eval_step(model: Transformer) -> Callable[[Any, Batch], WeightedSum]:
    """The summed loss of one batch, as a jitted function of parameters and batch.

    A mixture drops nothing in it, whatever it does in training.
    """
    model = model.clone(dispatch=model.dispatch.without_drops())

    def eval_step(params: Any, batch: Batch) -> WeightedSum:
        return forward_losses(model, params, batch)[0]

    return jax.jit(eval_step)


def validation_losses(
    eval_step: Callable[[Any, Batch], WeightedSum],
    params: Any,
    batches: Mapping[str, Iterable[Batch]],
) -> dict[str, float]:
    """Loss in nats per token of every language, and "mean", their plain average.

    Args:
        eval_step: from `make_eval_step`.
        params: the model's parameters.
        batches: for every language, the batches to measure on.
    """
    losses = {}
    for language, language_batches in batches.items():
        sums = [eval_step(params, batch) for batch in language_batches]
        total = sum(float(part.total) for part in sums)
        losses[language] = total / sum(float(part.weight) for part in sums)
    return {**losses, "mean": sum(losses.values()) / len(losses)}


def bytes_per_token(
    tokenizer: Tokenizer, batches: Mapping[str, Iterable[Batch]]
) -> dict[str, float]:
    """How much text a token of every language stands for, in bytes of UTF-8.

    Counted over the tokens that are scored, ends of documents among them (of no bytes), and over
    the first million of a language. Of a letter that the end of a row cuts, every half counts as
    one byte.

    Args:
        tokenizer: that the batches were made with.
        batches: for every language, batches of NumPy arrays with `targets`, `segment_ids` and
            `loss_weights`, `[B, T]`.
    """
    return {
        language: _bytes_per_token(tokenizer, language_batches)
        for language, language_batches in batches.items()
    }


def bits_per_byte(nats_per_token: float, bytes_per_token: float) -> float:
    """A loss that compares models with different tokenizers."""
    return nats_per_token / bytes_per_token / math.log(2)


def _bytes_per_token(tokenizer: Tokenizer, batches: Iterable[Batch]) -> float:
    silent = {tokenizer.eos_id, tokenizer.bos_id, tokenizer.pad_id}
    num_bytes = num_tokens = 0
    for row in (row for batch in batches for row in zip(*_columns(batch), strict=True)):
        if num_tokens >= _COUNTED:
            break
        targets, segments, weights = row
        for segment in np.unique(segments[weights > 0]):
            ids = targets[(segments == segment) & (weights > 0)].tolist()
            text = tokenizer.decode([i for i in ids if i not in silent])
            num_bytes += len(text.replace("\ufffd", "?").encode())
            num_tokens += len(ids)
    return num_bytes / num_tokens


def _columns(batch: Batch) -> list[np.ndarray]:
    return [np.asarray(batch[name]) for name in ("targets", "segment_ids", "loss_weights")]
