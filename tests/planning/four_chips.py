"""Small runs for four chips that are not here. Whoever imports it is skipped without libtpu."""

import math
from pathlib import Path
from typing import Any

import pytest

from aquila_jax import ModelConfig, axes
from aquila_jax.planning import parse_topology
from aquila_jax.sharding import MeshShape
from aquila_jax.training import TrainRun

from ..training.synthetic import TINY, Counting, tiny_run

pytest.importorskip("libtpu", reason="compiling for TPUs needs libtpu")
FOUR = parse_topology("v5e:2x2")


def run_of(model: ModelConfig = TINY, **changes: Any) -> TrainRun:
    data = Counting(batch_size=8, vocab_size=32)
    mesh = MeshShape(data=1, fsdp=4)
    settings = {"model": model, "data": data, "mesh": mesh, "dtype": "bfloat16", **changes}
    return tiny_run(Path("never-written"), steps=1000, **settings)


def bytes_in_four_shards(config: ModelConfig) -> float:
    """Of float32 parameters on one chip: what has the residual's axis is split, biases are not."""
    return 4 * sum(
        math.prod(parameter.shape(config)) / (4 if axes.EMBED in parameter.axes else 1)
        for parameter in axes.parameters(config).values()
    )
