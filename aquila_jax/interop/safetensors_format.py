"""The safetensors format: eight bytes of header length, the header in JSON, then the tensors.

Written here rather than with the `safetensors` package because its NumPy side knows no bfloat16,
returns copies rather than views, and writes only what is in memory all at once.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from aquila_jax.errors import UserError
from aquila_jax.interop.arrays import BFLOAT16, FLOAT16, FLOAT32

DTYPES: Mapping[str, np.dtype] = {"F32": FLOAT32, "BF16": BFLOAT16, "F16": FLOAT16}

_LENGTH_BYTES = 8
_ALIGNMENT = 64
# What the format's own library allows.
_LONGEST_HEADER = 100_000_000


class Entry(NamedTuple):
    """Where a tensor lies in a file.

    Attributes:
        dtype: its type in the format's words, as "BF16".
        shape: its dimensions.
        offset: its first byte, counted from the file's start.
        num_bytes: how long it is.
    """

    dtype: str
    shape: tuple[int, ...]
    offset: int
    num_bytes: int


def read_header(path: Path) -> dict[str, Entry]:
    """The tensors of a file by name, checked against each other and against the file's size.

    Raises:
        UserError: the file cannot be read, is truncated, or is no safetensors file.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
            if size < _LENGTH_BYTES or length > min(_LONGEST_HEADER, size - _LENGTH_BYTES):
                raise _damaged(
                    path, f"it is {size} bytes long, and its header is said to be {length}"
                )
            text = file.read(length)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    try:
        header = json.loads(text)
        header.pop("__metadata__", None)
        start = _LENGTH_BYTES + length
        entries = {name: _entry(start, **value) for name, value in header.items()}
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise _damaged(path, f"its header is unreadable ({error})") from error
    _check_offsets(path, entries, start, size)
    return entries


def _entry(start: int, dtype: str, shape: list[int], data_offsets: list[int]) -> Entry:
    first, last = data_offsets
    if any(type(number) is not int or number < 0 for number in (*shape, first, last)):
        raise ValueError(f"shape {shape} or offsets {data_offsets} are no sizes")
    # Types that no model here is made of are told apart later, where they can be named.
    if dtype in DTYPES and last - first != math.prod(shape) * DTYPES[dtype].itemsize:
        raise ValueError(f"{last - first} bytes are no {dtype} of shape {shape}")
    return Entry(dtype, tuple(shape), start + first, last - first)


def _check_offsets(path: Path, entries: Mapping[str, Entry], start: int, size: int) -> None:
    """The tensors follow each other without gaps or overlap, and end where the file ends."""
    end = start
    for name, entry in sorted(entries.items(), key=lambda item: item[1][2:]):
        if entry.offset != end or entry.num_bytes < 0:
            raise _damaged(path, f"{name} does not begin where the tensor before it ends")
        end += entry.num_bytes
    if size < end:
        raise _damaged(path, f"it is truncated: {size} bytes of {end}")
    if size > end:
        raise _damaged(path, f"it goes on for {size - end} bytes after its last tensor")


def _damaged(path: Path, what: str) -> UserError:
    # Names and words of the file are in it, which may be anything.
    line = " ".join(what.split())
    return UserError(f"{path} is no whole safetensors file: {line}; fetch or write it again")


def plan_file(
    tensors: Mapping[str, tuple[int, ...]], dtype: np.dtype
) -> tuple[bytes, dict[str, Entry]]:
    """The first bytes of a file of tensors of one dtype, and where each of them will lie.

    Args:
        tensors: shapes by name, in the order of the file.
        dtype: one of `DTYPES`.
    """
    word = next(word for word, known in DTYPES.items() if known == dtype)
    # The reference implementation writes this; transformers refuses files without it.
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in tensors.items():
        start, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": word, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    # Padded with spaces, so that every tensor is aligned for what reads it in place.
    text += b" " * (-(len(text) + _LENGTH_BYTES) % _ALIGNMENT)
    data = _LENGTH_BYTES + len(text)
    entries = {name: _entry(data, **header[name]) for name in tensors}
    return len(text).to_bytes(_LENGTH_BYTES, "little") + text, entries
