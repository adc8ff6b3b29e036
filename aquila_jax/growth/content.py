"""Digests of what a model holds, taken whole or slice by slice while it streams by."""

import hashlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from aquila_jax import axes
from aquila_jax.config import ModelConfig


class Content:
    """Gathers the digests of a model's slices, in any order, from several threads.

    A slice is one layer of a leaf, one expert of one layer, or a leaf that has neither. Its bytes
    are taken with outputs before inputs, which is how checkpoints lie on disk: a tensor that is
    read or written can be hashed where it is.

    Args:
        config: the architecture.
    """

    def __init__(self, config: ModelConfig) -> None:
        self._config = config
        self._digests: dict[tuple[str, tuple[int, ...]], bytes] = {}

    def add(self, path: str, index: tuple[int, ...], found: bytes) -> None:
        """Note the `digest` of the slice of leaf `path` at `index` of its layers and experts."""
        self._digests[path, index] = found

    def get(self, path: str, index: tuple[int, ...]) -> bytes | None:
        """What was noted."""
        return self._digests.get((path, index))

    def hexdigest(self, dtypes: Mapping[str, Any]) -> str:
        """The model's digest, 16 hexadecimal digits: paths, shapes, dtypes and all values.

        Args:
            dtypes: of every leaf, by path.

        Raises:
            KeyError: a slice is missing.
        """
        whole = hashlib.sha256()
        for path, parameter in sorted(axes.parameters(self._config).items()):
            shape = parameter.shape(self._config)
            whole.update(f"{path} {shape} {np.dtype(dtypes[path])}".encode())
            for index in np.ndindex(shape[: len(axes.stack_axes(parameter))]):
                whole.update(self._digests[path, index])
        return whole.hexdigest()[:16]


def digest(content: np.ndarray) -> bytes:
    """SHA-256 of the bytes of an array of any shape in C order; no copy where they lie so."""
    # NumPy copies types that it was taught, as bfloat16, one by one.
    flat = np.ascontiguousarray(content.view(f"u{content.itemsize}")).reshape(-1)
    return hashlib.sha256(flat.view(np.uint8).data).digest()


def outputs_first(slice_: np.ndarray, parameter: axes.Parameter) -> np.ndarray:
    """A view of a slice of a leaf, `[inputs, outputs]` to `[outputs, inputs]`, as files lie."""
    if not axes.is_matrix(parameter):
        return slice_
    inputs = range(len(parameter.reads))
    return slice_.transpose(*range(len(inputs), slice_.ndim), *inputs)


def content_hash(params: Mapping[str, Any], config: ModelConfig) -> str:
    """A digest of every leaf's path, shape, dtype and values, whatever the order of the dicts.

    Growth from disk to disk takes the same one while it streams. Copies leaf by leaf to the host;
    what several hosts hold together comes slice by slice, and all of them must call this.

    Args:
        params: nested parameters of `config`.
        config: the architecture.
    """
    content, dtypes = Content(config), {}
    for path, leaf in axes.flatten(params).items():
        parameter = axes.parameters(config)[path]
        is_spread = isinstance(leaf, jax.Array) and not leaf.is_fully_addressable
        values = leaf if is_spread else np.asarray(leaf)
        dtypes[path] = values.dtype
        for index in np.ndindex(values.shape[: len(axes.stack_axes(parameter))]):
            part = values[index]
            if is_spread:
                part = multihost_utils.process_allgather(part, tiled=True)
            content.add(path, index, digest(outputs_first(np.asarray(part), parameter)))
    return content.hexdigest(dtypes)
