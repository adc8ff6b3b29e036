"""Training: what a run is, how it begins, steps, saves and is measured."""

from aquila_jax.training.evaluate import evaluate
from aquila_jax.training.guard import Guard
from aquila_jax.training.loop import Interrupted, grow, train
from aquila_jax.training.optimizer import AdamW, Cosine, WarmupStableDecay
from aquila_jax.training.parent import model_of
from aquila_jax.training.run import TrainRun, check
from aquila_jax.training.step import RouterLosses

__all__ = [
    "AdamW",
    "Cosine",
    "Guard",
    "Interrupted",
    "RouterLosses",
    "TrainRun",
    "WarmupStableDecay",
    "check",
    "evaluate",
    "grow",
    "model_of",
    "train",
]
