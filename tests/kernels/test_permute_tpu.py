"""The kernels of `permute` and `unpermute`, by the TPU interpreter, against float64 NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aquila_jax.kernels import permute, unpermute
from aquila_jax.planning import parse_topology
from aquila_jax.planning.topology import devices_of
from tests.kernels import by_hand
from tests.kernels.interpreter import interpreted


def draw(num_tokens, k, dim, num_rows=None, dtype=jnp.float32):
    """Values, and slots: a permutation, or scattered with some pairs dropped on either side."""
    rng = np.random.default_rng(num_tokens + k)
    pairs = num_tokens * k
    if num_rows is None:
        places = rng.permutation(pairs)
    else:
        places = rng.permutation(np.arange(-pairs // 4, max(num_rows, pairs) + 3))[:pairs]
    num_rows = pairs if num_rows is None else num_rows
    x = jnp.asarray(rng.normal(size=(num_tokens, dim)), dtype)
    rows = jnp.asarray(rng.normal(size=(num_rows, dim)), dtype)
    gates = jnp.asarray(rng.normal(size=(num_tokens, k)), jnp.float32)
    return x, rows, jnp.asarray(places.reshape(num_tokens, k), jnp.int32), gates


def compare(x, rows, slots, gates):
    """Values and gradients of both, by the kernels and by hand."""
    num_rows = len(rows)

    @jax.jit
    def call(x, rows, slots, gates):
        permuted, pull_x = jax.vjp(
            lambda x: permute(x, slots, num_rows=num_rows, backend="pallas"), x
        )
        combined, pull_rows = jax.vjp(
            lambda rows, gates: unpermute(rows, slots, gates, backend="pallas"), rows, gates
        )
        return permuted, pull_x(rows), combined, pull_rows(x)

    with interpreted():
        permuted, (x_gradient,), combined, (rows_gradient, gates_gradient) = jax.block_until_ready(
            call(x, rows, slots, gates)
        )
    assert {y.dtype for y in (permuted, x_gradient, combined, rows_gradient)} == {x.dtype}
    wide_x, wide_rows = np.asarray(x, np.float64), np.asarray(rows, np.float64)
    rtol = 1e-5 if x.dtype == jnp.float32 else 2**-8

    def close(got, want, rtol=rtol):
        np.testing.assert_allclose(np.asarray(got, np.float64), want, rtol, 3e-6)

    np.testing.assert_array_equal(
        np.asarray(permuted, np.float64), by_hand.permute(wide_x, slots, num_rows)
    )
    close(x_gradient, by_hand.unpermute(wide_rows, slots, np.ones_like(gates)))
    close(combined, by_hand.unpermute(wide_rows, slots, gates))
    expected = np.zeros(rows.shape)
    for choice in range(slots.shape[1]):
        weighed = wide_x * np.asarray(gates, np.float64)[:, choice, None]
        expected += by_hand.permute(weighed, slots[:, choice, None], num_rows)
        taken = by_hand.unpermute(wide_rows, slots[:, choice, None], np.ones((len(x), 1)))
        close(gates_gradient[:, choice], (taken * wide_x).sum(1), 1e-5)
    close(rows_gradient, expected)


@pytest.mark.parametrize(
    ("num_tokens", "k", "dim", "num_rows", "dtype"),
    [
        (19, 2, 130, None, jnp.bfloat16),
        (9, 8, 128, None, jnp.bfloat16),
        (9, 3, 5, 40, jnp.float32),
        (17, 1, 128, 12, jnp.bfloat16),
    ],
)
def test_equals_its_definition_at_any_size(num_tokens, k, dim, num_rows, dtype):
    compare(*draw(num_tokens, k, dim, num_rows, dtype))


def test_rows_that_no_pair_has_are_never_mixed_in():
    _, rows, slots, gates = draw(9, 2, 128, 40, jnp.bfloat16)
    unused = np.setdiff1d(np.arange(40), np.asarray(slots))
    poisoned = rows.at[unused].set(jnp.nan)
    with interpreted():
        clean, mixed = jax.block_until_ready(
            [unpermute(x, slots, gates, backend="pallas") for x in (rows, poisoned)]
        )
    np.testing.assert_array_equal(np.asarray(mixed, np.float32), np.asarray(clean, np.float32))


def test_nothing_to_fetch():
    slots, gates = jnp.zeros((0, 2), jnp.int32), jnp.zeros((0, 2))
    with interpreted():
        assert permute(jnp.ones((0, 128)), slots, backend="pallas").shape == (0, 128)
        assert unpermute(jnp.ones((4, 128)), slots, gates, backend="pallas").shape == (0, 128)
        none = permute(
            jnp.ones((3, 128)), jnp.zeros((3, 2), jnp.int32), num_rows=0, backend="pallas"
        )
    assert none.shape == (0, 128)


@pytest.mark.parametrize(("num_tokens", "k"), [(16384, 2), (16384, 8), (100_000, 8)])
def test_tables_of_many_pairs_fit_a_tpus_scalar_memory(num_tokens, k):
    """The real compiler refuses what does not."""
    pytest.importorskip("libtpu", reason="compiling for TPUs needs libtpu")
    device = jax.sharding.SingleDeviceSharding(devices_of(parse_topology("v5e:2x2"))[0])

    def argument(shape, dtype):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=device)

    def compute(x, slots, gates, gradient):
        def there_and_back(x, gates):
            rows = permute(x, slots, backend="pallas")
            return unpermute(rows, slots, gates, backend="pallas")

        return jax.vjp(there_and_back, x, gates)[1](gradient)

    x, pairs = argument((num_tokens, 128), jnp.bfloat16), (num_tokens, k)
    arguments = x, argument(pairs, jnp.int32), argument(pairs, jnp.float32), x
    jax.jit(compute).lower(*arguments).compile()
