"""Fast host copies: between two orders of storage, and between two precisions.

NumPy does both element by element when memory is not walked in order or bfloat16 is involved,
at a tenth of what memory allows.
"""

import math
from collections.abc import Callable, Sequence

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from aquila_jax.errors import UserError

BFLOAT16 = np.dtype(jnp.bfloat16)
FLOAT16 = np.dtype(np.float16)
FLOAT32 = np.dtype(np.float32)

# How many rows are transposed at once. Each fills part of a cache line of the destination, and
# is a stream of its own from the source; measured best on x86 for two and four bytes.
_ROWS = 16
# Elements converted at once, so that intermediate results stay in the second-level cache.
_CHUNK = 1 << 16
# JAX takes host memory over without a copy, on CPU devices, where it is aligned to this.
_ALIGNMENT = 64


def float_dtype(dtype: DTypeLike) -> np.dtype:
    """One of the dtypes that models are stored in.

    Raises:
        UserError: it is none of them.
    """
    known = (FLOAT32, BFLOAT16, FLOAT16)
    try:
        found = np.dtype(dtype)
    except TypeError:
        found = None
    if found is None or found not in known:
        names = ", ".join(each.name for each in known)
        raise UserError(f"the dtype of weights must be one of {names}, not {dtype}")
    return found


def empty(shape: Sequence[int], dtype: np.dtype) -> np.ndarray:
    """Uninitialised memory that `jax.device_put` need not copy to a CPU device."""
    num_bytes = math.prod(shape) * dtype.itemsize
    raw = np.empty(num_bytes + _ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % _ALIGNMENT
    return raw[start : start + num_bytes].view(dtype).reshape(shape)


def copy(destination: np.ndarray, source: np.ndarray) -> None:
    """`destination[...] = source` for equal shapes and dtypes, fast also across a transposition."""
    # bfloat16 is a type that NumPy was taught, and it copies what it was taught one by one.
    bits = np.dtype(f"u{source.itemsize}")
    source, destination = source.view(bits), destination.view(bits)
    strides = [
        stride if size > 1 else source.nbytes + 1
        for stride, size in zip(source.strides, source.shape, strict=True)
    ]
    last = source.ndim - 1
    inner = int(np.argmin(strides)) if strides else last
    if last < 1 or inner == last:
        destination[...] = source
        return
    # Two dimensions are left: the one contiguous in the source, and the destination's last.
    outer = [dim for dim in range(last) if dim != inner]
    for position in np.ndindex(*(source.shape[dim] for dim in outer)):
        where: list[int | slice] = [slice(None)] * source.ndim
        for dim, i in zip(outer, position, strict=True):
            where[dim] = i
        from_2d, to_2d = source[tuple(where)], destination[tuple(where)]
        for start in range(0, from_2d.shape[1], _ROWS):
            to_2d[:, start : start + _ROWS] = from_2d[:, start : start + _ROWS]


def contiguous(array: np.ndarray) -> np.ndarray:
    """`array`, of any shape, where it is stored in C order; else a copy that is."""
    if array.flags.c_contiguous:
        return array
    result = np.empty(array.shape, array.dtype)
    copy(result, array)
    return result


def convert(array: np.ndarray, dtype: np.dtype, out: np.ndarray | None = None) -> np.ndarray:
    """A C-contiguous array in another floating-point type, rounded to nearest even.

    Args:
        array: the values.
        dtype: the type.
        out: C-contiguous, of that shape and type, to write the result into.

    Returns:
        `out` where it is given, else the array itself where it has that type already, else a new
        one. What is too large for the type becomes infinite, without a warning.
    """
    if array.dtype == dtype and out is None:
        return array
    result = np.empty(array.shape, dtype) if out is None else out
    if array.dtype == FLOAT32 and dtype == BFLOAT16:
        _by_chunks(array, result, _narrow)
    elif array.dtype == BFLOAT16 and dtype == FLOAT32:
        _by_chunks(array, result, _widen)
    elif {array.dtype, dtype} == {BFLOAT16, FLOAT16}:
        convert(convert(array, FLOAT32), dtype, result)
    else:
        with np.errstate(over="ignore"):
            result[...] = array
    return result


def _by_chunks(
    array: np.ndarray, result: np.ndarray, bits: Callable[[np.ndarray, np.ndarray], None]
) -> None:
    source = array.reshape(-1).view(f"u{array.itemsize}")
    target = result.reshape(-1).view(f"u{result.itemsize}")
    for start in range(0, source.size, _CHUNK):
        bits(source[start : start + _CHUNK], target[start : start + _CHUNK])


def _widen(bits: np.ndarray, result: np.ndarray) -> None:
    """bfloat16 is the upper half of float32."""
    result[...] = bits
    result <<= 16


def _narrow(bits: np.ndarray, result: np.ndarray) -> None:
    """The upper half, rounded to nearest, ties to even; a carry goes up into the exponent."""
    rounded = bits >> 16
    rounded &= 1
    rounded += 0x7FFF
    rounded += bits
    rounded >>= 16
    result[...] = rounded
    # A carry out of a NaN's mantissa would make a number of it.
    is_nan = (bits & 0x7FFFFFFF) > 0x7F800000
    if is_nan.any():
        result[is_nan] = (bits[is_nan] >> 16) | 0x40
