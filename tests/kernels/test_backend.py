"""Which of two functions computes, where and for which operands."""

import jax
import jax.numpy as jnp
import pytest

from aquila_jax.errors import UserError
from aquila_jax.kernels.backend import check, dispatch
from aquila_jax.planning.chips import parse_topology
from aquila_jax.planning.topology import devices_of

X = jnp.ones(3, jnp.float32)


def reference(x):
    return jnp.sin(x)


def kernel(x, *, interpret):
    return x + (2.0 if interpret else 3.0)


@pytest.mark.parametrize(
    ("backend", "expected"),
    [("reference", jnp.sin(X)), ("interpret", X + 2), ("pallas", X + 3), ("auto", jnp.sin(X))],
)
def test_a_backend_is_what_its_name_says_and_auto_is_the_reference_on_a_cpu(backend, expected):
    found = jax.jit(lambda x: dispatch(backend, reference, kernel, x))(X)
    assert found.tolist() == expected.tolist()


def test_auto_is_the_kernel_in_a_program_for_a_tpu_whatever_the_machine():
    pytest.importorskip("libtpu", reason="compiling for TPUs needs libtpu")
    device = devices_of(parse_topology("v5e:2x2"))[0]
    operand = jax.ShapeDtypeStruct(
        (8, 128), jnp.float32, sharding=jax.sharding.SingleDeviceSharding(device)
    )
    lowered = jax.jit(lambda x: dispatch("auto", reference, kernel, x)).trace(operand).lower()
    assert "sine" not in lowered.as_text()
    on_cpu = jax.jit(lambda x: dispatch("auto", reference, kernel, x)).lower(X)
    assert "sine" in on_cpu.as_text()


def test_float64_goes_to_the_reference_since_kernels_compute_in_float32():
    with jax.enable_x64(True):
        x = jnp.ones(3, jnp.float64)
        assert dispatch("auto", reference, kernel, x).dtype == jnp.float64


def test_an_unknown_backend_is_refused_with_those_there_are():
    with pytest.raises(UserError, match=r"no kernel backend 'cuda'.*auto, reference, pallas"):
        check("cuda")
