"""Validation loss by language."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax

from aquila_jax.nn import Transformer, forward_losses
from aquila_jax.nn.losses import WeightedSum

Batch = Mapping[str, Any]


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
