"""One stage of a small lineage, in a process of its own that others may kill.

python -m tests.reliability.worker DIRECTORY STAGE
"""

import dataclasses
import sys
from pathlib import Path

import numpy as np

from aquila_jax import ModelConfig
from aquila_jax.data import TokenCache, write_cache
from aquila_jax.growth import ScaleOut, ScaleUp
from aquila_jax.sharding import MeshShape
from aquila_jax.training import AdamW, Cosine, Interrupted, TrainRun, train

STAGES = ("dense", "scale_up", "scale_out")
STEPS = 40
CHECKPOINT_EVERY = 3
LENGTH = 16

_DENSE = ModelConfig(
    vocab_size=32,
    embed_dim=16,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    mlp_dim=24,
    context_length=LENGTH,
)
_LARGER = dataclasses.replace(_DENSE, embed_dim=24, num_layers=3, num_heads=3, mlp_dim=40)
_MIXTURE = dataclasses.replace(_LARGER, num_experts=4, experts_per_token=2)


def write_data(directory: Path) -> None:
    """The token cache that every stage reads: documents that count upwards."""
    rng = np.random.default_rng(0)

    def documents(count: int) -> list[list[int]]:
        starts, sizes = rng.integers(32, size=count), rng.integers(3, 2 * LENGTH, size=count)
        return [
            [(start + i) % 32 for i in range(size)]
            for start, size in zip(starts.tolist(), sizes.tolist(), strict=True)
        ]

    write_cache(
        directory / "cache",
        {("train", "counting"): documents(300), ("validation", "up"): documents(40)},
        sequence_length=LENGTH,
        vocab_size=32,
        vocabulary="counting",
    )


def stage_run(directory: Path, stage: str, steps: int = STEPS) -> TrainRun:
    """The settings of one stage; its parent is the stage before."""
    number = STAGES.index(stage)
    growth = (None, ScaleUp("aki_pro"), ScaleOut())[number]
    return TrainRun(
        model_dir=str(directory / stage),
        model=(_DENSE, _LARGER, _MIXTURE)[number],
        data=TokenCache(str(directory / "cache"), batch_size=8, seed=number),
        optimizer=AdamW(Cosine(peak=1e-2, warmup_steps=2)),
        steps=steps,
        name=stage,
        init_from=str(directory / STAGES[number - 1]) if growth else "",
        growth=growth,
        mesh=MeshShape(data=1, fsdp=2),
        dtype="float32",
        eval_every=10,
        eval_batches=1,
        checkpoint_every=CHECKPOINT_EVERY,
        log_every=1,
    )


def main() -> int:
    """Train one stage to its end, or until it is stopped."""
    try:
        train(stage_run(Path(sys.argv[1]), sys.argv[2]))
    except Interrupted as stop:
        return 128 + stop.signum
    return 0


if __name__ == "__main__":
    sys.exit(main())
