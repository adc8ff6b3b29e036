"""Models from one place to another without a change: tensor by tensor where the source allows."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from aquila_jax import accounting, axes
from aquila_jax.config import ModelConfig
from aquila_jax.data.gguf_tokenizer import as_files
from aquila_jax.errors import UserError
from aquila_jax.interop import layout
from aquila_jax.interop.directory import Directory
from aquila_jax.interop.gguf_file import find_gguf, load_gguf
from aquila_jax.interop.growing import Source
from aquila_jax.interop.huggingface import load_hf
from aquila_jax.interop.idle_expert import WithIdleExpert, as_family
from aquila_jax.interop.threads import each
from aquila_jax.interop.writer import MAX_SHARD_BYTES, Writer

# Tensors under way at once.
_WORKERS = 2


class Loaded:
    """A model in memory, read as one on disk is.

    Attributes:
        config: the architecture.
        whole_leaves: that nothing is gained by reading the layers of a leaf in a row.
        companions: the directory whose tokenizer goes with the model.

    Args:
        params: nested parameters of `config`.
        config: the architecture.
        companions: the directory whose tokenizer goes with the model; None without one.
    """

    whole_leaves = False

    def __init__(
        self, params: Mapping[str, Any], config: ModelConfig, companions: Path | None = None
    ) -> None:
        self.config, self.companions = config, companions
        self._leaves = {path: np.asarray(leaf) for path, leaf in axes.flatten(params).items()}

    def dtype(self, path: str) -> np.dtype:
        """The dtype of a leaf."""
        return self._leaves[path].dtype

    def read(self, path: str, layer: int | None = None, expert: int | None = None) -> np.ndarray:
        """One layer of a leaf, or one expert of one layer."""
        return self._leaves[path][layout.Slice(path, layer, expert).index]

    def release(self, path: str, layer: int | None = None, expert: int | None = None) -> None:
        """Nothing: the model stays in memory."""


def is_gguf(path: Path) -> bool:
    """Whether a path is to be read as GGUF: such a file, or a directory of them alone."""
    if path.is_dir():
        return any(path.glob("*.gguf")) and not any(path.glob("*.safetensors"))
    return path.suffix == ".gguf"


def open_source(path: str | Path) -> Source:
    """A Hugging Face directory, to be read tensor by tensor, or a GGUF file, loaded whole.

    Args:
        path: a Hugging Face directory, a GGUF file, or a directory that holds one.

    Raises:
        UserError: there is none of them, or it is damaged or not supported.
    """
    path = Path(path)
    if not is_gguf(path):
        return Directory(path)
    return Loaded(*load_gguf(path), companions=path if path.is_dir() else path.parent)


def load_any(
    path: str | Path, *, dtype: DTypeLike | None = None
) -> tuple[dict[str, Any], ModelConfig]:
    """`load_hf` of a Hugging Face directory, or `load_gguf` of a GGUF file.

    Args:
        path: a Hugging Face directory, a GGUF file, or a directory that holds one.
        dtype: of the parameters; None keeps what is stored, which is float32 for GGUF.

    Returns:
        Nested parameters on the default device, and their configuration.

    Raises:
        UserError: as `load_hf` and `load_gguf`.
    """
    load = load_gguf if is_gguf(Path(path)) else load_hf
    return load(path, dtype=dtype)


def convert_files(
    source: str | Path | Source,
    target: str | Path,
    *,
    dtype: DTypeLike | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    family: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> ModelConfig:
    """Write a model as a new Hugging Face directory, in memory for a few tensors at a time.

    `target` appears whole or not at all, with the source's tokenizer files in it; those inside a
    GGUF file are written out, where none lie beside it and their kind is known. A GGUF source is
    dequantized whole, in float32.

    Args:
        source: a Hugging Face directory, a GGUF file, or anything that is read like one.
        target: the directory to make; it must not exist.
        dtype: of the tensors written; None is the narrowest that holds the source's exactly.
        max_shard_bytes: how large the tensors of one file may be together.
        family: to write the model as; None is the smallest that can say it. See `save_hf`.
        progress: called with the bytes written so far and in all, after every tensor.

    Returns:
        The architecture that was written.

    Raises:
        UserError: the source is damaged, or the target exists, cannot be expressed or cannot be
            written. The source is only read.
    """
    opened = open_source(source) if isinstance(source, str | Path) else source
    written = as_family(opened.config, family)
    if written != opened.config:
        opened = WithIdleExpert(opened, written)
    if dtype is None:
        dtype = _exact_dtype(opened)
    writer = Writer(
        target,
        opened.config,
        dtype=dtype,
        max_shard_bytes=max_shard_bytes,
        copy_from=opened.companions,
    )
    inside = _tokenizer_inside(source)
    with writer:
        _copy_tensors(opened, writer, np.dtype(dtype), progress or (lambda done, total: None))
        for name, content in inside.items():
            writer.add_file(name, content)
    return opened.config


def _copy_tensors(
    opened: Source, writer: Writer, dtype: np.dtype, progress: Callable[[int, int], None]
) -> None:
    items = list(layout.slices(opened.config).values())
    if opened.whole_leaves:
        items.sort(key=lambda item: item.path)

    def write(item: layout.Slice) -> int:
        array = opened.read(item.path, item.layer, item.expert)
        writer.write(item.path, array, layer=item.layer, experts=item.expert)
        opened.release(item.path, item.layer, item.expert)
        return array.size * dtype.itemsize

    total, done = num_bytes(opened.config, dtype), 0
    for written in each(write, ((item,) for item in items), _WORKERS):
        done += written
        progress(done, total)


def num_bytes(config: ModelConfig, dtype: np.dtype) -> int:
    """The bytes of all parameters in one dtype."""
    return accounting.num_parameters(config) * dtype.itemsize


def _exact_dtype(source: Source) -> np.dtype:
    """The narrowest dtype that holds every leaf exactly."""
    if source.whole_leaves:
        # Asking for a leaf's dtype reads it; a run keeps all of them in one.
        return source.dtype("token_embedder/embedding")
    return np.dtype(
        jnp.result_type(*{source.dtype(path) for path in axes.parameters(source.config)})
    )


def _tokenizer_inside(source: str | Path | Source) -> Mapping[str, bytes]:
    """The files of a GGUF file's own tokenizer; none where another lies beside it."""
    if not isinstance(source, str | Path) or not is_gguf(Path(source)):
        return {}
    file = find_gguf(Path(source))
    if any(file.parent.glob("tokenizer*")):
        return {}
    try:
        return as_files(file)
    except UserError:  # of a kind that is not read; the weights are
        return {}
