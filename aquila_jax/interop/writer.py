"""A Hugging Face directory, written slice by slice in any order, and whole or absent."""

import contextlib
import errno
import os
import shutil
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from jax.typing import DTypeLike

from aquila_jax import axes, files
from aquila_jax.config import ModelConfig
from aquila_jax.errors import UserError
from aquila_jax.growth.content import Content
from aquila_jax.growth.content import digest as digest_of
from aquila_jax.interop import arrays, layout
from aquila_jax.interop.directory import INDEX_FILE, SINGLE_FILE
from aquila_jax.interop.families import CONFIG_FILE, to_hub
from aquila_jax.interop.safetensors_format import plan_file

MAX_SHARD_BYTES = 5 * 10**9

# Bytes after which what was written goes to disk, while the next tensors are computed.
_FLUSH_BYTES = 1 << 28

# What goes with the weights and does not change when a model grows.
COMPANIONS = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "*.model",
    "generation_config.json",
    "chat_template*",
)


class _Shard:
    """One file of the directory being written.

    Attributes:
        name: the file's name.
        header: its first bytes.
        size: its length in the end.
        missing: how many of its tensors are not written yet.
    """

    def __init__(self, name: str, header: bytes, size: int, num_tensors: int) -> None:
        self.name = name
        self.header = header
        self.size = size
        self.missing = num_tensors
        self._descriptor = -1

    def create(self, directory: Path) -> None:
        """Make the file, as long as it will be, with its header."""
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
        self._descriptor = os.open(directory / self.name, flags, 0o666)
        os.ftruncate(self._descriptor, self.size)
        self.put(np.frombuffer(self.header, np.uint8), 0)

    def put(self, content: np.ndarray, offset: int) -> None:
        """Write a C-contiguous array at `offset`."""
        rest = memoryview(content.reshape(-1).view(np.uint8).data)
        while rest:
            done = os.pwrite(self._descriptor, rest, offset)
            rest, offset = rest[done:], offset + done

    def flush(self) -> None:
        """Make what was written so far durable."""
        os.fdatasync(self._descriptor)

    def finish(self) -> None:
        """Make the content durable."""
        if self._descriptor >= 0:
            os.fsync(self._descriptor)
            self.close()

    def close(self) -> None:
        """Let go of the file."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


class Writer:
    """Writes a model into a new Hugging Face directory with one tensor in memory at a time.

    Names, shapes and dtypes follow from the configuration, so every file begins complete but for
    its tensors, and slices may come in any order, from several threads at once. Everything is
    written into a hidden directory beside `path`, which is renamed to `path` when the block ends
    with every tensor written, and removed when it ends otherwise.

    Examples:
        >>> with Writer(path, config, dtype="bfloat16") as writer:  # doctest: +SKIP
        ...     for item in layout.slices(config).values():
        ...         writer.write(item.path, leaf(item), layer=item.layer, experts=item.expert)

    Args:
        path: the directory to make; it must not exist.
        config: the architecture.
        dtype: of the tensors: float32, bfloat16 or float16.
        max_shard_bytes: how large the tensors of one file may be together; one that is larger
            gets a file of its own.
        copy_from: a directory whose tokenizer, generation configuration and chat template are
            copied, and whose `config.json` says which tokens begin, end and pad a text.
        content: takes the digests of what is written; None where nobody asks for them.

    Raises:
        UserError: `path` exists, is being written by another process or cannot be written, the
            space does not suffice, no Hugging Face family can express `config`, or an argument is
            none of the above. Raised at the latest at the end of the block.
        ValueError: the block ended without an error but before every tensor was written.
    """

    def __init__(
        self,
        path: str | Path,
        config: ModelConfig,
        *,
        dtype: DTypeLike = "bfloat16",
        max_shard_bytes: int = MAX_SHARD_BYTES,
        copy_from: str | Path | None = None,
        content: Content | None = None,
    ) -> None:
        self._directory = files.NewDirectory(path)
        self.path = self._directory.path
        self.config = config
        self.dtype = arrays.float_dtype(dtype)
        self._copy_from = None if copy_from is None else Path(copy_from)
        if self._copy_from is not None and not self._copy_from.is_dir():
            raise UserError(f"copy_from {self._copy_from} is no directory")
        if max_shard_bytes < 1:
            raise UserError(f"max_shard_bytes must be positive, not {max_shard_bytes}")
        self._hub = to_hub(config, self.dtype.name, self._copy_from)
        self._parameters = axes.parameters(config)
        self._shards, self._places = self._plan(max_shard_bytes)
        self._partial = self._directory.partial
        self._content = content
        self._unwritten = set(self._places)
        self._lock = threading.Lock()
        self._syncing: list[Future[None]] = []
        self._unflushed = 0
        # The disk is busy while the next tensors are computed.
        self._background = ThreadPoolExecutor(1)

    def write(
        self,
        path: str,
        array: np.ndarray,
        *,
        layer: int | None = None,
        experts: int | Iterable[int] | None = None,
        digest: bytes | None = None,
    ) -> None:
        """Write one slice of a leaf.

        Args:
            path: the leaf, as in `axes.parameters`.
            array: the slice in our layout, of any floating-point dtype; converted if need be.
            layer: which layer, for a leaf that has layers.
            experts: which expert it is, for the weights of experts; several to write the same
                bytes for each of them.
            digest: `growth.content.digest` of what will be in the file, where it is known.

        Raises:
            UserError: the disk refuses, or a value does not fit into float16.
            ValueError: the model has no such slice, it has another shape, or is written already.
        """
        numbers = [experts] if experts is None or isinstance(experts, int) else list(experts)
        names = [
            layout.checked_name(self.config, layout.Slice(path, layer, expert))
            for expert in numbers
        ]
        array, parameter = np.asarray(array), self._parameters[path]
        if array.shape != layout.slice_shape(parameter, self.config):
            raise ValueError(
                f"{path} is {layout.slice_shape(parameter, self.config)} a slice, not {array.shape}"
            )
        matrix = arrays.contiguous(layout.to_file(array, parameter, self.config))
        content = arrays.convert(matrix, self.dtype)
        if self.dtype == arrays.FLOAT16 and array.dtype != self.dtype:
            _check_range(content, matrix, names[0])
        with self._lock:
            if again := [name for name in names if name not in self._unwritten]:
                raise ValueError(f"{', '.join(again)} is written already")
            self._unwritten.difference_update(names)
        if self._content is not None:
            digest = digest_of(content) if digest is None else digest
            for expert in numbers:
                self._content.add(path, layout.Slice(path, layer, expert).index, digest)
        for name in names:
            shard, offset = self._places[name]
            with _refusals(self.path):
                shard.put(content, offset)
            self._count_down(shard, content.nbytes)

    def add_file(self, name: str, content: bytes) -> None:
        """Write a further file into the directory, within the block.

        Raises:
            UserError: the disk refuses.
        """
        with _refusals(self.path):
            files.write_bytes(self._partial / name, content)

    def __enter__(self) -> Self:
        needed = sum(shard.size for shard in self._shards)
        try:
            with _refusals(self.path):
                self._directory.create()
                free = shutil.disk_usage(self._partial).free
                if free < needed:
                    raise UserError(
                        f"{self.path} needs {needed / 1e9:.3g} GB, and {free / 1e9:.3g} GB are "
                        "free there"
                    )
                for shard in self._shards:
                    shard.create(self._partial)
        except BaseException:
            self._abandon()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            if kind is None:
                self._finish()
        finally:
            self._abandon()

    def _plan(self, max_bytes: int) -> tuple[list[_Shard], dict[str, tuple[_Shard, int]]]:
        """The files, and in which of them and where every tensor lies."""
        groups: list[dict[str, tuple[int, ...]]] = [{}]
        filled = 0
        for name, item in layout.slices(self.config).items():
            shape = layout.file_shape(self._parameters[item.path], self.config)
            num_bytes = int(np.prod(shape)) * self.dtype.itemsize
            if groups[-1] and filled + num_bytes > max_bytes:
                groups.append({})
                filled = 0
            groups[-1][name] = shape
            filled += num_bytes
        shards: list[_Shard] = []
        places: dict[str, tuple[_Shard, int]] = {}
        for number, group in enumerate(groups, start=1):
            numbered = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
            header, entries = plan_file(group, self.dtype)
            size = max(entry.offset + entry.num_bytes for entry in entries.values())
            name = SINGLE_FILE if len(groups) == 1 else numbered
            shards.append(_Shard(name, header, size, len(group)))
            places.update((name, (shards[-1], entry.offset)) for name, entry in entries.items())
        return shards, places

    def _count_down(self, shard: _Shard, num_bytes: int) -> None:
        with self._lock:
            shard.missing -= 1
            self._unflushed += num_bytes
            if shard.missing == 0:
                self._syncing.append(self._background.submit(shard.finish))
            elif self._unflushed >= _FLUSH_BYTES:
                self._unflushed = 0
                self._syncing.append(self._background.submit(shard.flush))

    def _finish(self) -> None:
        if self._unwritten:
            some = ", ".join(sorted(self._unwritten)[:3])
            raise ValueError(f"{len(self._unwritten)} tensors were not written, as {some}")
        with _refusals(self.path):
            for future in self._syncing:
                future.result()
            self._copy_companions()
            if len(self._shards) > 1:
                files.write_json(self._partial / INDEX_FILE, self._index())
            files.write_json(self._partial / CONFIG_FILE, self._hub)
            self._directory.publish()

    def _index(self) -> dict[str, Any]:
        weight_map = {name: shard.name for name, (shard, _) in self._places.items()}
        total = sum(shard.size - len(shard.header) for shard in self._shards)
        return {"metadata": {"total_size": total}, "weight_map": weight_map}

    def _copy_companions(self) -> None:
        if self._copy_from is None:
            return
        found = {path for pattern in COMPANIONS for path in self._copy_from.glob(pattern)}
        for path in sorted(found):
            if path.is_file():
                files.write_bytes(self._partial / path.name, path.read_bytes())

    def _abandon(self) -> None:
        """Let go of everything; what was renamed already is no longer there to be removed."""
        self._background.shutdown(cancel_futures=True)
        for shard in self._shards:
            shard.close()
        self._directory.discard()


@contextlib.contextmanager
def _refusals(path: Path) -> Iterator[None]:
    """A block in which what the operating system refuses is the person's to mend."""
    try:
        yield
    except OSError as error:
        is_full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        advice = "; free some space, or write to another disk" if is_full else ""
        raise UserError(f"cannot write {path}: {error.strerror}{advice}") from error


def _check_range(content: np.ndarray, original: np.ndarray, name: str) -> None:
    """float16 ends at 65504, and weights that became infinite are worth nothing."""
    finite = np.isfinite(content)
    if not finite.all() and np.isfinite(original[~finite].astype(np.float32)).any():
        raise UserError(f"{name} holds values beyond float16's 65504; write bfloat16 instead")
