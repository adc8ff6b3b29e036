"""Directories of random weights to read and to write, and how what took how long is told."""

import os
import platform
import statistics
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np

from aquila_jax import ModelConfig, axes
from aquila_jax.interop import Writer, slices
from aquila_jax.interop.layout import slice_shape

# Llama's shape, small enough to be written many times.
SMALL = ModelConfig(
    vocab_size=8192,
    embed_dim=1024,
    num_layers=16,
    num_heads=16,
    num_kv_heads=4,
    head_dim=64,
    mlp_dim=4096,
    qkv_bias=False,
)
# As good as one file.
UNLIMITED = 10**12


def make(
    path: Path,
    config: ModelConfig,
    dtype: str,
    *,
    deviation: float = 1.0,
    max_shard_bytes: int = UNLIMITED,
) -> None:
    """A Hugging Face directory of normal weights, made tensor by tensor."""
    rng, parameters = np.random.default_rng(0), axes.parameters(config)
    with Writer(path, config, dtype=dtype, max_shard_bytes=max_shard_bytes) as writer:
        for item in slices(config).values():
            shape = slice_shape(parameters[item.path], config)
            values = deviation * rng.standard_normal(shape, np.float32)
            writer.write(item.path, values, layer=item.layer, experts=item.expert)


def machine() -> str:
    """Where something was measured, in words."""
    return (
        f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores, "
        f"Python {platform.python_version()}, jax {jax.__version__}"
    )


def spread(values: Sequence[float]) -> str:
    """The median, and half the range."""
    return f"{statistics.median(values):.2f} ± {(max(values) - min(values)) / 2:.2f}"
