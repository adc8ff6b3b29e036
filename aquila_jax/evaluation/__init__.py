"""Measuring what a model knows."""

from aquila_jax.evaluation.perplexity import validation_losses

__all__ = ["validation_losses"]
