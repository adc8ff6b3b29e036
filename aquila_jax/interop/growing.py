"""Growth from disk to disk, one tensor at a time."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np

from aquila_jax import axes, files
from aquila_jax.config import ModelConfig
from aquila_jax.errors import UserError
from aquila_jax.growth import Certificate, ScaleOut, ScaleUp
from aquila_jax.growth.compose import Plan
from aquila_jax.growth.content import Content, digest, outputs_first
from aquila_jax.growth.rules import Mapped
from aquila_jax.interop import arrays
from aquila_jax.interop.directory import Directory
from aquila_jax.interop.layout import Slice, slices
from aquila_jax.interop.threads import each
from aquila_jax.interop.writer import MAX_SHARD_BYTES, Writer

CERTIFICATE_FILE = "certificate.json"

# Tensors under way at once; each holds a few copies of its own.
_WORKERS = 2


class Source(Protocol):
    """A model on disk, read by slices; `Directory` is one."""

    @property
    def config(self) -> ModelConfig:
        """Its architecture."""
        ...

    @property
    def whole_leaves(self) -> bool:
        """Whether reading one layer of a leaf reads them all, so that it is best read in a row."""
        ...

    @property
    def companions(self) -> Path | None:
        """The directory whose tokenizer and chat template go with the model; None without one."""
        ...

    def dtype(self, path: str) -> np.dtype:
        """The dtype of a leaf."""
        ...

    def read(self, path: str, layer: int | None = None, expert: int | None = None) -> np.ndarray:
        """One layer of a leaf, or one expert of one layer, in our layout."""
        ...

    def release(self, path: str, layer: int | None = None, expert: int | None = None) -> None:
        """Let go of what was read."""
        ...


def grow_files(
    source: str | Path | Source,
    target: str | Path,
    target_config: ModelConfig,
    growth: ScaleUp | ScaleOut,
    *,
    dtype: str | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    progress: Callable[[int, int], None] | None = None,
) -> Certificate:
    """Grow a model on disk into a new Hugging Face directory, tensor by tensor.

    The same bits as `scale_up` or `scale_out` of the loaded model would give, in memory for a few
    tensors whatever the model's size. `target` appears whole or not at all, with `certificate.json`
    and the source's tokenizer files in it.

    Args:
        source: a Hugging Face directory, or anything that is read like one.
        target: the directory to make; it must not exist.
        target_config: the grown architecture.
        growth: what to do; `growth.seed` gives the random numbers.
        dtype: of the tensors written; None keeps the source's.
        max_shard_bytes: how large the tensors of one file may be together.
        progress: called with the bytes written so far and in all, after every tensor.

    Returns:
        The growth's certificate, with the content hashes of both models, taken on the way.

    Raises:
        UserError: the source is damaged or holds NaN or Inf, the target cannot be reached from
            it, exists, cannot be expressed or cannot be written. The source is only read.
    """
    opened: Source = Directory(source) if isinstance(source, str | Path) else source
    plan, certificate = growth.plan(opened.config, target_config)
    if dtype is None:
        dtype = np.dtype(opened.dtype("token_embedder/embedding")).name
    certificate = dataclasses.replace(certificate, dtype=dtype)
    tensors = _Tensors(opened, plan, target_config, jax.random.key(growth.seed))
    items = list(_work(plan, opened.config, target_config))
    if opened.whole_leaves:
        items.sort(key=lambda item: item[0].path)
    content = Content(target_config)
    options = {"dtype": dtype, "max_shard_bytes": max_shard_bytes, "copy_from": opened.companions}
    writer = Writer(target, target_config, **options, content=content)
    total, done = sum(certificate.num_bytes(leaf) for leaf in certificate.leaves), 0
    with writer:
        for written in _write_all(items, tensors, writer):
            done += written * writer.dtype.itemsize
            if progress is not None:
                progress(done, total)
        leaf_dtypes = dict.fromkeys(axes.parameters(target_config), dtype)
        hashes = {
            "source_hash": tensors.source_hash(),
            "target_hash": content.hexdigest(leaf_dtypes),
        }
        certificate = dataclasses.replace(certificate, **hashes)
        writer.add_file(CERTIFICATE_FILE, files.json_bytes(certificate.to_dict()))
    return certificate


def _write_all(
    items: Sequence[tuple[Slice, range | None]], tensors: "_Tensors", writer: Writer
) -> Iterator[int]:
    """Builds and writes everything; yields how many elements each layer of a leaf had."""

    def write(item: Slice, equal: range | None) -> int:
        written = 0
        for expert, array, known in tensors.build(item, is_copied=equal is not None):
            numbers = expert if equal is None else equal
            known = known if array.dtype == writer.dtype else None
            writer.write(item.path, array, layer=item.layer, experts=numbers, digest=known)
            written += array.size * (1 if equal is None else len(equal))
        return written

    return each(write, items, _WORKERS)


def _work(
    plan: Plan, source: ModelConfig, target: ModelConfig
) -> Iterator[tuple[Slice, range | None]]:
    """Layers of leaves to build, in the order of the files, with the experts that are equal.

    Experts of one layer of a leaf are built together; where they are equal they are built once.
    """
    for item in slices(target).values():
        if item.expert:
            continue  # built with expert 0
        rule, equal = plan[item.path], None
        if isinstance(rule, Mapped) and rule.experts is not None and not rule.is_random:
            size = axes.parameters(source)[rule.source].shape(source)[rule.experts.dim]
            equal = range(target.num_experts) if rule.experts.are_copies(size) else None
        yield Slice(item.path, item.layer), equal


class _Tensors:
    """Builds slices of the target from slices of the source."""

    def __init__(self, source: Source, plan: Plan, target: ModelConfig, key: jax.Array) -> None:
        self._source, self._plan, self._target, self._key = source, plan, target, key
        self._source_parameters = axes.parameters(source.config)
        self._parameters = axes.parameters(target)
        self._content = Content(source.config)
        self._dtypes: dict[str, np.dtype] = {}

    def source_hash(self) -> str:
        """The source's `content_hash`; reads what no leaf of the target was built from."""
        for path, parameter in self._source_parameters.items():
            stacked = axes.stack_axes(parameter)
            for index in np.ndindex(parameter.shape(self._source.config)[: len(stacked)]):
                if self._content.get(path, index) is None:
                    number = dict(zip(stacked, index, strict=True))
                    expert = number.pop(axes.EXPERTS, None)
                    self._finite(Slice(path, next(iter(number.values()), None), expert))
        return self._content.hexdigest(self._dtypes)

    def build(
        self, item: Slice, *, is_copied: bool
    ) -> Iterator[tuple[int | None, np.ndarray, bytes | None]]:
        """One layer of a leaf, by expert where it has experts and they differ.

        With the array comes its digest, where it is one that was read.
        """
        rule, parameter = self._plan[item.path], self._parameters[item.path]
        used: list[tuple[Slice, np.ndarray]] = []
        rows = None if item.layer is None else np.array([item.layer])
        if isinstance(rule, Mapped):
            if is_copied:
                rule = dataclasses.replace(rule, experts=None)
            read = self._reader(rule.source, used)
            leaf = rule.build(read, item.path, self._key, rows, np)
        else:
            shape = parameter.shape(self._target)
            shape = shape if rows is None else (1, *shape[1:])
            dtype = self._dtype("token_embedder/embedding")
            leaf = np.asarray(rule.draw(shape, dtype, item.path, self._key, rows))
        leaf = np.asarray(leaf if rows is None else leaf[0])
        if is_copied or axes.EXPERTS not in axes.stack_axes(parameter):
            yield None, leaf, self._known_digest(leaf, used)
        else:
            yield from ((expert, one, None) for expert, one in enumerate(leaf))
        # What was built may be a view of what was read, and has been written by now.
        for part, _ in used:
            self._source.release(part.path, part.layer, part.expert)

    def _reader(
        self, path: str, used: list[tuple[Slice, np.ndarray]]
    ) -> Callable[[np.ndarray | None], np.ndarray]:
        """Reads layers of a source leaf, stacked, its experts too, and notes them in `used`."""
        stacked = axes.stack_axes(self._source_parameters[path])

        def read_slice(item: Slice) -> np.ndarray:
            used.append((item, self._finite(item)))
            return used[-1][1]

        def read_one(layer: int | None) -> np.ndarray:
            if axes.EXPERTS not in stacked:
                return read_slice(Slice(path, layer))
            experts = range(self._source.config.num_experts)
            return np.stack([read_slice(Slice(path, layer, expert)) for expert in experts])

        def read(layers: np.ndarray | None) -> np.ndarray:
            if layers is None:
                return read_one(None)
            if len(layers) == 1:
                return read_one(int(layers[0]))[None]
            return np.stack([read_one(int(layer)) for layer in layers])

        return read

    def _finite(self, item: Slice) -> np.ndarray:
        """A slice, hashed, and refused where it holds NaN or Inf: growth would spread it."""
        array = self._source.read(item.path, item.layer, item.expert)
        if not is_finite(array):
            where = "" if item.layer is None else f" of layer {item.layer}"
            where += "" if item.expert is None else f", expert {item.expert}"
            raise UserError(
                f"{item.path}{where} holds NaN or Inf: the source is damaged; grow from an earlier "
                "one"
            )
        if self._content.get(item.path, item.index) is None:
            ordered = outputs_first(array, self._source_parameters[item.path])
            # A leaf whose tensors are of two types is one of the wider.
            wide = arrays.convert(ordered, self._dtype(item.path))
            self._content.add(item.path, item.index, digest(wide))
        return array

    def _dtype(self, path: str) -> np.dtype:
        """The dtype of a source leaf, asked for once: some sources read the leaf for it."""
        if path not in self._dtypes:
            self._dtypes[path] = self._source.dtype(path)
        return self._dtypes[path]

    def _known_digest(
        self, leaf: np.ndarray, used: Sequence[tuple[Slice, np.ndarray]]
    ) -> bytes | None:
        """The digest of a leaf that is a slice that was read, where it lies."""
        for item, array in used:
            same = leaf.__array_interface__["data"] == array.__array_interface__["data"]
            layout = (array.shape, array.strides, array.dtype)
            if same and (leaf.shape, leaf.strides, leaf.dtype) == layout:
                return self._content.get(item.path, item.index)
        return None


def is_finite(array: np.ndarray) -> bool:
    """Whether no element of an array of any shape is NaN or infinite.

    float16, bfloat16 and float32 are seen by their exponents, without a conversion.
    """
    masks: dict[str, tuple[Any, int]] = {
        "float16": (np.uint16, 0x7C00),
        "bfloat16": (np.uint16, 0x7F80),
        "float32": (np.uint32, 0x7F800000),
    }
    if array.dtype.name not in masks:
        return bool(np.isfinite(array).all())
    integer, exponent = masks[array.dtype.name]
    # A transposed view is read in the order it lies in memory.
    flat = array.ravel(order="K").view(integer)
    step = 1 << 20
    return not any(
        ((flat[start : start + step] & integer(exponent)) == exponent).any()
        for start in range(0, flat.size, step)
    )
