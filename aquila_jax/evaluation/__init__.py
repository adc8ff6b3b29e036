"""Measuring what a model knows."""

from aquila_jax.evaluation.certify import certify
from aquila_jax.evaluation.perplexity import validation_losses

__all__ = ["certify", "validation_losses"]
