"""Whole models from and to Hugging Face directories.

Example:
    >>> import tempfile
    >>> from aquila_jax import Transformer, preset
    >>> config = preset("toy_dense", vocab_size=64, num_layers=1)
    >>> tokens = jax.numpy.zeros((1, 8), "int32")
    >>> params = Transformer(config).init(jax.random.key(0), tokens)["params"]
    >>> with tempfile.TemporaryDirectory() as directory:
    ...     save_hf(params, config, f"{directory}/model", dtype="float32")
    ...     read, same = load_hf(f"{directory}/model")
    >>> same.embed_dim, bool((read["lm_head"]["kernel"] == params["lm_head"]["kernel"]).all())
    (96, True)
"""

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.typing import DTypeLike

from aquila_jax import axes
from aquila_jax.config import ModelConfig
from aquila_jax.errors import UserError
from aquila_jax.interop import arrays, layout
from aquila_jax.interop.directory import Directory
from aquila_jax.interop.idle_expert import as_family, idle_leaves
from aquila_jax.interop.threads import each
from aquila_jax.interop.writer import MAX_SHARD_BYTES, Writer

# Each worker of a save holds one tensor, so there are few.
_SAVING_WORKERS = 4


def load_hf(
    path: str | Path, *, dtype: DTypeLike | None = None, shardings: Mapping[str, Any] | None = None
) -> tuple[dict[str, Any], ModelConfig]:
    """The parameters and the configuration of a Hugging Face directory.

    Args:
        path: a directory with `config.json` and safetensors in one file or several.
        dtype: of the parameters; None keeps what is stored.
        shardings: a `NamedSharding` for every parameter, nested as the parameters are (as
            `Layout.params` returns it); every process reads its own devices' shards only, one
            shard in host memory at a time. None puts everything on the default device.

    Returns:
        Nested parameters as `Transformer` takes them, layers and experts stacked, and their
        configuration.

    Raises:
        UserError: the directory is damaged, its tensors are not those of its configuration, its
            architecture cannot be expressed, or `shardings` is for another one.
    """
    directory = Directory(path)
    parameters = axes.parameters(directory.config)
    placement = _flat_shardings(shardings, parameters)
    with ThreadPoolExecutor() as workers:
        params = {
            leaf: _load_leaf(directory, leaf, dtype, placement[leaf], workers)
            for leaf in parameters
        }
    return axes.unflatten(params), directory.config


def _flat_shardings(
    shardings: Mapping[str, Any] | None, parameters: Mapping[str, Any]
) -> Mapping[str, jax.sharding.Sharding | None]:
    if shardings is None:
        return dict.fromkeys(parameters)
    flat = axes.flatten(shardings)
    if differ := sorted(set(flat) ^ set(parameters)):
        raise UserError(f"shardings and the model's parameters differ in {', '.join(differ)}")
    return flat


def _load_leaf(
    directory: Directory,
    path: str,
    dtype: DTypeLike | None,
    sharding: jax.sharding.Sharding | None,
    workers: ThreadPoolExecutor,
) -> jax.Array:
    """One parameter. `jax.make_array_from_callback` would hold all of a host's shards at once."""
    target = directory.dtype(path) if dtype is None else arrays.float_dtype(dtype)
    shape = axes.parameters(directory.config)[path].shape(directory.config)
    if sharding is None:
        whole = tuple(slice(None) for _ in shape)
        return jax.block_until_ready(
            jax.device_put(_read_block(directory, path, whole, target, workers))
        )
    holders: dict[tuple[tuple[int, int], ...], list[Any]] = {}
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        bounds = tuple(
            part.indices(size)[:2] for part, size in zip(index or (), shape, strict=True)
        )
        holders.setdefault(bounds, []).append(device)
    shards = []
    for bounds, devices in holders.items():
        index = tuple(slice(*bound) for bound in bounds)
        block = _read_block(directory, path, index, target, workers)
        # Waiting keeps transfers from piling up in host memory.
        shards += jax.block_until_ready([jax.device_put(block, device) for device in devices])
    return jax.make_array_from_single_device_arrays(shape, sharding, shards)


def _read_block(
    directory: Directory,
    path: str,
    index: tuple[slice, ...],
    dtype: np.dtype,
    workers: ThreadPoolExecutor,
) -> np.ndarray:
    """A block of a leaf, assembled from the layers and experts it needs."""
    parameter = axes.parameters(directory.config)[path]
    shape = parameter.shape(directory.config)
    spans = [range(size)[part] for size, part in zip(shape, index, strict=True)]
    num_stacked = len(axes.stack_axes(parameter))
    stacked, rest = spans[:num_stacked], index[num_stacked:]
    block = arrays.empty([len(span) for span in spans], dtype)

    def fill(position: tuple[int, ...]) -> None:
        source = directory.read(path, *(span[i] for span, i in zip(stacked, position, strict=True)))
        part, source = block[position], source[rest]
        if source.dtype == dtype:
            arrays.copy(part, source)
        else:
            arrays.convert(arrays.contiguous(source), dtype, out=part)

    list(workers.map(fill, np.ndindex(*(len(span) for span in stacked))))
    return block


def save_hf(
    params: Mapping[str, Any],
    config: ModelConfig,
    path: str | Path,
    *,
    dtype: DTypeLike = "bfloat16",
    max_shard_bytes: int = MAX_SHARD_BYTES,
    copy_from: str | Path | None = None,
    family: str | None = None,
) -> None:
    """Write a model as a Hugging Face directory that is whole or absent.

    The family is the smallest that can express the configuration: llama, qwen2 with biases of
    query, key and value, qwen3 with norms of heads, mistral where heads do not divide the width;
    of mixtures mixtral, qwen3_moe with norms of heads, qwen2_moe with a shared expert that is
    weighed, and aquilamoe with biases alone, which `transformers` itself does not know.

    Args:
        params: nested parameters of `config`, NumPy or JAX arrays.
        config: their configuration.
        path: the directory to make; it must not exist.
        dtype: of the tensors: float32, bfloat16 or float16.
        max_shard_bytes: how large the tensors of one file may be together.
        copy_from: a directory to copy tokenizer, generation configuration and chat template from.
        family: to write the model as; None is the smallest. "qwen2_moe" takes mixtures with biases
            alone, too, with a shared expert of zeros and of width 1 beside theirs: so
            `transformers` itself loads them.

    Raises:
        UserError: `path` exists, cannot be written or has too little space, `params` are not
            those of `config`, or no family can express it, or not `family`.
    """
    flat = {name: _on_host(leaf) for name, leaf in axes.flatten(params).items()}
    _check_params(flat, config)
    written = as_family(config, family)
    for name, shape in idle_leaves(config, written).items():
        flat[name] = np.zeros(shape, np.float32)
    config = written
    writer = Writer(path, config, dtype=dtype, max_shard_bytes=max_shard_bytes, copy_from=copy_from)

    def write(item: layout.Slice) -> None:
        array = np.asarray(flat[item.path][item.index])
        writer.write(item.path, array, layer=item.layer, experts=item.expert)

    items = ((item,) for item in layout.slices(config).values())
    with writer:
        for _ in each(write, items, _SAVING_WORKERS):
            pass


def _on_host(leaf: Any) -> Any:
    """A leaf that is cheap to slice: host arrays as NumPy, arrays of devices as they are."""
    if not isinstance(leaf, jax.Array):
        return np.asarray(leaf)
    devices = leaf.devices()
    is_local = len(devices) == 1 and next(iter(devices)).platform == "cpu"
    return np.asarray(leaf) if is_local else leaf


def _check_params(flat: Mapping[str, Any], config: ModelConfig) -> None:
    """The leaves and shapes are those of the configuration, and all of them are within reach."""
    parameters = axes.parameters(config)
    if differ := sorted(set(flat) ^ set(parameters)):
        raise UserError(f"the parameters and those of their config differ in {', '.join(differ)}")
    for name, parameter in parameters.items():
        leaf = flat[name]
        if tuple(leaf.shape) != parameter.shape(config):
            raise UserError(
                f"{name} has shape {tuple(leaf.shape)}, but its config says "
                f"{parameter.shape(config)} for axes {parameter.axes}"
            )
        if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
            raise UserError(
                f"{name} is spread over several hosts, and saving works on one: replicate it or "
                "restore the checkpoint on one host first"
            )
