"""`grouped_matmul` and its gradients by every library, against NumPy in float64, group by group."""

import inspect
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aquila_jax.errors import UserError
from aquila_jax.kernels import grouped_matmul

SIZES = {
    "uneven": [40, 3, 17, 20],
    "empty groups": [0, 50, 0, 30],
    "one group": [0, 0, 80, 0],
    "rows behind": [30, 0, 21, 5],
    "nothing": [0, 0, 0, 0],
}
NUM_ROWS, D, F = 80, 12, 20


def by_hand(rows, weights, sizes, gradient):
    """The product and both gradients of the rows that have a group."""
    out = np.zeros((len(rows), weights.shape[2]))
    rows_gradient, weights_gradient = np.zeros_like(rows), np.zeros_like(weights)
    start = 0
    for group, size in enumerate(sizes):
        mine = slice(start, start + size)
        out[mine] = rows[mine] @ weights[group]
        rows_gradient[mine] = gradient[mine] @ weights[group].T
        weights_gradient[group] = rows[mine].T @ gradient[mine]
        start += size
    return out[:start], rows_gradient[:start], weights_gradient


def compare(backend, sizes, shape=(NUM_ROWS, D, F), *, dtype, rtol):
    num_rows, width, hidden = shape
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(num_rows, width))
    weights = rng.normal(size=(len(sizes), width, hidden))
    gradient = rng.normal(size=(num_rows, hidden))
    total = sum(sizes)
    # Nothing comes back for rows that nobody reads; what they hold reaches nobody.
    rows[total:] = np.nan
    gradient[total:] = 0
    narrow = [np.asarray(jnp.asarray(x, dtype), np.float64) for x in (rows, weights, gradient)]
    expected = by_hand(narrow[0], narrow[1], sizes, narrow[2])

    def product(rows, weights):
        return grouped_matmul(rows, weights, jnp.asarray(sizes, jnp.int32), backend=backend)

    @jax.jit
    def everything(rows, weights, gradient):
        out, pull_back = jax.vjp(product, rows, weights)
        return out, *pull_back(gradient)

    out, rows_gradient, weights_gradient = everything(
        *(jnp.asarray(x, dtype) for x in (rows, weights, gradient))
    )
    found = (out[:total], rows_gradient[:total], weights_gradient)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == dtype
        size = np.abs(theirs).max(initial=1)
        np.testing.assert_allclose(
            np.asarray(ours, np.float64), theirs, rtol=rtol, atol=rtol * size
        )


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("backend", ["auto", "tiles", "ragged"])
def test_equals_its_definition_in_float64(backend, sizes):
    with jax.enable_x64(True):
        compare(backend, sizes, dtype=jnp.float64, rtol=1e-12)


@pytest.mark.parametrize("behind", [0, 40])
@pytest.mark.parametrize("last", [390, 97, 1])
def test_groups_of_several_sizes_of_tiles_whose_last_one_may_be_too_large(last, behind):
    sizes = [1300, 0, 100, 31, 513, last]
    with jax.enable_x64(True):
        shape = (sum(sizes) + behind, D, F)
        compare("tiles", sizes, shape, dtype=jnp.float64, rtol=1e-12)


@pytest.mark.parametrize("backend", ["auto", "tiles", "interpret"])
def test_no_rows_at_all_have_a_product_and_matrices_no_gradient(backend):
    compare(backend, [0, 0], (0, D, F), dtype=jnp.float32, rtol=0)


@pytest.mark.parametrize("backend", ["tiles", "ragged"])
def test_bfloat16_is_summed_in_float32(backend):
    # 80 products of numbers of size one: a sum in bfloat16 would be off by more than rounding once.
    compare(backend, SIZES["uneven"], (NUM_ROWS, 320, F), dtype=jnp.bfloat16, rtol=2**-8)


@pytest.mark.parametrize("name", ["uneven", "empty groups", "rows behind"])
def test_megablox_carried_out_on_a_cpu_gives_the_same(name):
    sizes = [8 * size for size in SIZES[name]]
    compare("interpret", sizes, (8 * NUM_ROWS, 128, 128), dtype=jnp.float32, rtol=2e-5)


def test_an_unknown_library_is_refused_with_those_there_are():
    # Tests check annotations, and those would refuse it first.
    unchecked: Any = inspect.unwrap(grouped_matmul)
    with pytest.raises(UserError, match=r"no grouped matmul 'cublas'.*megablox"):
        unchecked(jnp.zeros((4, 2)), jnp.zeros((1, 2, 3)), jnp.array([4]), backend="cublas")
