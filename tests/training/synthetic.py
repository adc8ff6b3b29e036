"""A run small enough for seconds: a two-"language" stream of arithmetic sequences."""

import dataclasses
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from aquila_jax import ModelConfig
from aquila_jax.training import AdamW, Cosine, TrainRun
from aquila_jax.training.checkpoints import open_existing
from aquila_jax.training.run import build

TINY = ModelConfig(
    vocab_size=32,
    embed_dim=16,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    mlp_dim=24,
    context_length=16,
)
WIDER = dataclasses.replace(TINY, embed_dim=24, num_layers=3, num_heads=3, mlp_dim=40)
MIXTURE = dataclasses.replace(WIDER, num_experts=4, experts_per_token=2)


@dataclasses.dataclass(frozen=True)
class Counting:
    """Rows that count upwards modulo the vocabulary from a random start, two documents a row."""

    batch_size: int = 8
    sequence_length: int = 16
    vocab_size: int = 32
    seed: int = 0
    tokenizer_path: str = ""

    def prepare(self) -> None:
        pass

    def identity(self) -> dict[str, str]:
        return {"vocabulary": str(self.vocab_size), "order": str(self.seed)}

    def train_batches(
        self, start: int = 0, *, rows: Sequence[int] | None = None
    ) -> Iterator[dict[str, np.ndarray]]:
        number = start
        while True:
            batch = self._batch(np.random.default_rng((self.seed, number)), 1)
            taken = slice(None) if rows is None else list(rows)
            yield {name: array[taken] for name, array in batch.items()}
            number += 1

    def validation_batches(self, num_batches: int) -> dict[str, list[dict[str, np.ndarray]]]:
        return {
            language: [
                self._batch(np.random.default_rng((99, number)), stride)
                for number in range(num_batches)
            ]
            for language, stride in (("up", 1), ("twos", 2))
        }

    def _batch(self, rng: np.random.Generator, stride: int) -> dict[str, np.ndarray]:
        half = self.sequence_length // 2
        first = rng.integers(0, self.vocab_size, (self.batch_size, 2, 1))
        targets = (first + stride * np.arange(half)) % self.vocab_size
        tokens = np.concatenate([np.zeros_like(first), targets[..., :-1]], axis=-1)
        rows = (self.batch_size, self.sequence_length)
        return {
            "tokens": tokens.reshape(rows).astype(np.int32),
            "targets": targets.reshape(rows).astype(np.int32),
            "segment_ids": np.tile(np.repeat([1, 2], half), (rows[0], 1)).astype(np.int32),
            "positions": np.tile(np.arange(half), (rows[0], 2)).astype(np.int32),
            "loss_weights": np.ones(rows, np.float32),
        }


def tiny_run(model_dir: Path, **changes: Any) -> TrainRun:
    settings = {
        "model": TINY,
        "data": Counting(),
        "optimizer": AdamW(Cosine(peak=1e-2, warmup_steps=2)),
        "steps": 6,
        "dtype": "float32",
        "eval_every": 3,
        "eval_batches": 1,
        "checkpoint_every": 3,
        "log_every": 1,
        **changes,
    }
    return TrainRun(model_dir=str(model_dir), **settings)


class StopAt:
    """Data that sends its own process a signal when batch number `number` is fetched."""

    def __init__(self, number, signum):
        self.number, self.signum, self.inner = number, signum, Counting()
        self.batch_size, self.sequence_length = 8, 16
        self.vocab_size = 32
        self.tokenizer_path = ""

    def prepare(self):
        pass

    def identity(self):
        return self.inner.identity()

    def validation_batches(self, num_batches):
        return self.inner.validation_batches(num_batches)

    def train_batches(self, start=0):
        for number, batch in enumerate(self.inner.train_batches(start), start):
            if number == self.number:
                os.kill(os.getpid(), self.signum)
            yield batch


def losses(model_dir: Path) -> list[tuple[int, float]]:
    """Steps and training losses, as logged."""
    rows = [json.loads(line) for line in (model_dir / "metrics.jsonl").open()]
    return [(row["step"], row["loss"]) for row in rows if row["split"] == "train"]


def final_params(run: TrainRun) -> Any:
    """NumPy parameters of a run's newest checkpoint."""
    checkpoints = open_existing(run.path)
    abstract = build(run, 10).abstract.params
    params = checkpoints.restore_params(checkpoints.latest_step or 0, abstract)
    return jax.tree.map(np.asarray, params)


def assert_equal(tree: Any, other: Any) -> None:
    jax.tree.map(np.testing.assert_array_equal, tree, other)
