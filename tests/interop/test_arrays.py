"""Fast copies and conversions equal NumPy's own, bit for bit."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aquila_jax import UserError
from aquila_jax.interop import arrays

TYPES = [arrays.FLOAT32, arrays.BFLOAT16, arrays.FLOAT16]


def bits(array):
    return array.view(f"u{array.itemsize}")


@given(
    shape=st.lists(st.integers(1, 40), min_size=1, max_size=3),
    data=st.data(),
    dtype=st.sampled_from(TYPES),
)
def test_a_copy_is_an_assignment_whatever_the_strides(shape, data, dtype):
    order = data.draw(st.permutations(range(len(shape))))
    starts = [data.draw(st.integers(0, size - 1)) for size in shape]
    source = np.random.default_rng(0).normal(size=shape).astype(dtype)
    source = source[tuple(slice(start, None) for start in starts)].transpose(order)
    destination = np.zeros(source.shape, dtype)
    arrays.copy(destination, source)
    np.testing.assert_array_equal(bits(destination), bits(np.array(source, order="C")))
    assert arrays.contiguous(source).flags.c_contiguous


@pytest.mark.parametrize("target", TYPES, ids=str)
@pytest.mark.parametrize("source", [arrays.BFLOAT16, arrays.FLOAT16], ids=str)
def test_every_half_precision_number_converts_as_numpy_converts_it(source, target):
    every = np.arange(1 << 16, dtype=np.uint16).view(source)
    with np.errstate(all="ignore"):
        expected = every.astype(np.float32).astype(target)
    found = arrays.convert(every, target)
    is_nan = np.isnan(expected.astype(np.float32))
    np.testing.assert_array_equal(bits(found)[~is_nan], bits(expected)[~is_nan])
    np.testing.assert_array_equal(np.isnan(found.astype(np.float32)), is_nan)


@given(st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=50))
def test_float32_rounds_to_the_nearest_bfloat16(patterns):
    # Halfway between two neighbours, beside it, and NaNs whose mantissa a carry would overflow.
    edges = [0x3F808000, 0x3F818000, 0x3F807FFF, 0x7F7FFFFF, 0x7FFFFFFF, 0xFFFFFFFF, 0x7F800001]
    values = np.array([*patterns, *edges], np.uint32).view(np.float32)
    with np.errstate(all="ignore"):
        expected = values.astype(jnp.bfloat16)
    found = arrays.convert(values, arrays.BFLOAT16)
    is_nan = np.isnan(values)
    np.testing.assert_array_equal(bits(found)[~is_nan], bits(expected)[~is_nan])
    np.testing.assert_array_equal(np.isnan(found.astype(np.float32)), is_nan)


def test_what_has_the_type_already_is_not_copied():
    array = np.ones((3, 4), np.float32)
    assert arrays.convert(array, arrays.FLOAT32) is array
    assert arrays.contiguous(array) is array


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_memory_is_aligned_for_jax(dtype):
    for size in (1, 7, 1000):
        array = arrays.empty((size, 3), dtype)
        assert array.shape == (size, 3)
        assert array.ctypes.data % 64 == 0


@pytest.mark.parametrize("dtype", ["int8", "float64", "no type"])
def test_weights_have_one_of_three_types(dtype):
    with pytest.raises(UserError, match="float32, bfloat16, float16"):
        arrays.float_dtype(dtype)
