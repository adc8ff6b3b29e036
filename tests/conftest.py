"""Eight CPU devices, exact matrix products, annotations checked, and one tiny decoder for all.

Strict dtype promotion is left off, because `jnp.promote_types` refuses to work under it; rank
promotion is left on, because biases, gains and gates broadcast on purpose.
"""

import importlib.metadata
import os

os.environ["JAX_PLATFORMS"] = "cpu"
# Collectives of several CPU devices wait on XLA's threads: with a thread a device, all may wait.
os.environ.setdefault("NPROC", "16")
# Tests compile much and compute little, so the compiler is told to hurry, and where programs are
# kept (`make test` says where), small ones are too: other processes compile the same.
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ["XLA_FLAGS"] = " ".join(
    [
        os.environ.get("XLA_FLAGS", ""),
        "--xla_force_host_platform_device_count=8",
        "--xla_backend_optimization_level=0",
        "--xla_llvm_disable_expensive_passes=true",
        # XLA ends the process over a flag that it does not know, and newer ones lack this.
        "--xla_cpu_use_fusion_emitters=false"
        if importlib.metadata.version("jaxlib").startswith("0.10.")
        else "",
    ]
)

import functools
from collections.abc import Callable
from typing import Any

import jax
import jaxtyping
import numpy as np
import pytest

# Shapes in annotations are checked at run time, in tests only. Before anything imports these.
jaxtyping.install_import_hook(
    ["aquila_jax.nn", "aquila_jax.growth", "aquila_jax.kernels"], "beartype.beartype"
)
jax.config.update("jax_default_matmul_precision", "highest")


# What takes long: of two workers one would be left idle if it came last.
_LONG = (
    "tests/multihost/",
    "tests/reliability/",
    "tests/training/",
    "tests/kernels/",
    "tests/growth/",
    "tests/test_sharding.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with it, in that order."""

    def place(item: pytest.Item) -> int:
        prefixes = (item.nodeid.startswith(prefix) for prefix in _LONG)
        return next((at for at, is_it in enumerate(prefixes) if is_it), len(_LONG))

    items.sort(key=place)


@pytest.fixture(scope="session")
def tiny():
    """A dense decoder whose sizes are all different, with two query heads in each KV group."""
    from aquila_jax.config import ModelConfig

    return ModelConfig(
        vocab_size=61,
        embed_dim=12,
        num_layers=3,
        num_heads=4,
        num_kv_heads=2,
        head_dim=6,
        mlp_dim=20,
        context_length=32,
        rope_theta=100.0,
    )


@pytest.fixture(scope="session")
def random_params() -> Callable[..., dict[str, Any]]:
    """NumPy parameters with nothing at its initial value: gains are not 1, biases not 0."""
    from aquila_jax import axes

    def draw(config, seed: int = 0, dtype: Any = np.float32) -> dict[str, Any]:
        rng = np.random.default_rng(seed)
        leaves = {}
        for path, parameter in axes.parameters(config).items():
            values = rng.normal(size=parameter.shape(config))
            if parameter.is_gain:
                values = 1 + 0.3 * values
            elif not parameter.reads:
                values = 0.3 * values
            elif "embedding" not in path:
                values = values / np.sqrt(parameter.fan_in(config))
            leaves[path] = values.astype(dtype)
        return axes.unflatten(leaves)

    return draw


@pytest.fixture(scope="session")
def random_batch() -> Callable[..., dict[str, jax.Array]]:
    """Packed rows of 10 tokens: a document, a longer one, and two tokens of padding."""

    def draw(config, rows: int = 2, seed: int = 0) -> dict[str, jax.Array]:
        rng = np.random.default_rng(seed)
        segments = np.tile(np.array([1] * 3 + [2] * 5 + [0] * 2, np.int32), (rows, 1))
        positions = np.tile(np.array([*range(3), *range(5), *range(2)], np.int32), (rows, 1))
        tokens, targets = rng.integers(config.vocab_size, size=(2, rows, 10), dtype=np.int32)
        batch = {
            "tokens": tokens,
            "targets": targets,
            "segment_ids": segments,
            "positions": positions,
            "loss_weights": (segments > 0).astype(np.float32),
        }
        return jax.tree.map(jax.numpy.asarray, batch)

    return draw


@pytest.fixture(scope="session")
def model_logits() -> Callable[..., jax.Array]:
    """The library's decoder, compiled once for every configuration."""
    from aquila_jax.nn import Transformer

    @functools.cache
    def compiled(config, dtype):
        return jax.jit(Transformer(config, dtype=dtype).apply)

    def run(config, params, tokens, *packing, dtype: Any = np.float32) -> jax.Array:
        return compiled(config, dtype)({"params": params}, tokens, *packing)

    return run


@pytest.fixture(scope="session")
def reference_logits() -> Callable[..., np.ndarray]:
    """The decoder written a second time, in float64 NumPy."""
    from tests.nn.reference import decoder

    return decoder


@pytest.fixture(scope="session")
def pretrained():
    """SmolLM2-135M, where it is installed."""
    from tests import pretrained

    return pretrained.load()
