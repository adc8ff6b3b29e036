import functools

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl

from aquila_jax import accounting, preset
from aquila_jax.kernels import grouped_matmul
from aquila_jax.nn import Transformer
from aquila_jax.planning.flops import executed_flops

X = jax.ShapeDtypeStruct((8, 16), jnp.float32)
W = jax.ShapeDtypeStruct((16, 16), jnp.float32)
ONCE = 2 * 8 * 16 * 16


def flops_of(function, *arguments) -> float:
    return executed_flops(jax.jit(function).trace(*arguments).jaxpr)


def test_a_product_counts_multiplies_and_adds():
    assert flops_of(jnp.dot, X, W) == ONCE
    batched = jax.ShapeDtypeStruct((3, 8, 16), jnp.float32)
    weights = jax.ShapeDtypeStruct((3, 16, 5), jnp.float32)
    assert flops_of(jnp.matmul, batched, weights) == 2 * 3 * 8 * 16 * 5


def test_a_scan_counts_its_length_and_its_gradient_twice_more():
    def model(x, w):
        body = jax.checkpoint(lambda x, _: (jnp.sin(x @ w), None))
        return jax.lax.scan(body, x, length=5)[0].sum()

    assert flops_of(model, X, W) == 5 * ONCE
    # Forward, forward again, and two products backward.
    assert flops_of(jax.grad(model, argnums=(0, 1)), X, W) == 5 * 4 * ONCE


def test_what_nobody_reads_does_not_count():
    def pull(x, w):
        # As a loop's body computes gradients: the value itself is not asked for.
        value, pull = jax.vjp(lambda w: jnp.sin(x @ w) @ w, w)
        return pull(jnp.ones_like(value))[0]

    def looped(x, w):
        return jax.lax.fori_loop(0, x[0, 0].astype(int), lambda _, sum: sum + pull(x, w), w)

    # The first product, that of its gradient, and two of the second's; not the second itself.
    assert flops_of(looped, X, W) == 4 * ONCE


def test_of_branches_the_costliest_and_of_platforms_the_tpu():
    def branches(x, w):
        return jax.lax.cond(x[0, 0] > 0, lambda: x @ w @ w, lambda: x @ w)

    assert flops_of(branches, X, W) == 2 * ONCE

    def platforms(x, w):
        return jax.lax.platform_dependent(
            x, w, tpu=lambda x, w: x @ w, default=lambda x, w: x @ w @ w @ w
        )

    assert flops_of(platforms, X, W) == ONCE


def test_a_kernel_counts_what_it_says():
    def kernel(x_ref, o_ref):
        o_ref[...] = x_ref[...]

    call = pl.pallas_call(
        kernel,
        out_shape=X,
        cost_estimate=pl.CostEstimate(flops=12345, transcendentals=0, bytes_accessed=0),
    )
    assert flops_of(call, X) == 12345


def test_a_grouped_product_and_its_gradients_count_every_row_once():
    experts = jax.ShapeDtypeStruct((4, 16, 16), jnp.float32)
    sizes = jax.ShapeDtypeStruct((4,), jnp.int32)

    def model(x, w, sizes):
        return jnp.sin(jax.lax.ragged_dot(x, w, sizes)).sum()

    assert flops_of(model, X, experts, sizes) == ONCE
    assert flops_of(jax.grad(model, argnums=(0, 1)), X, experts, sizes) == 3 * ONCE


def test_what_is_mapped_over_devices_counts_on_all_of_them():
    mesh = jax.make_mesh((4,), ("a",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec("a")
    mapped = jax.shard_map(
        jnp.dot, mesh=mesh, in_specs=(spec, jax.sharding.PartitionSpec()), out_specs=spec
    )
    assert flops_of(mapped, X, W) == ONCE


def test_a_dense_model_executes_what_accounting_says_and_the_masked_half_of_attention():
    config = preset("toy_dense")
    model = Transformer(config)
    tokens = jax.ShapeDtypeStruct((2, 64), jnp.int32)
    variables = jax.eval_shape(model.init, jax.random.key(0), tokens)
    executed = flops_of(functools.partial(model.apply), variables, tokens)
    counted = 2 * 64 * accounting.training_flops_per_token(config, 2 * 64) / 3
    assert executed == pytest.approx(counted)


@pytest.mark.parametrize("backend", ["ragged", "megablox"])
def test_rows_of_no_group_do_not_count(backend):
    rows_MD, weights_EDF = jnp.zeros((512, 128)), jnp.zeros((4, 128, 256))

    def product(rows_MD, weights_EDF):
        return grouped_matmul(rows_MD, weights_EDF, jnp.full(4, 32), backend=backend)

    jaxpr = jax.jit(product).trace(rows_MD, weights_EDF).jaxpr
    assert executed_flops(jaxpr) == 2 * 512 * 128 * 256
    assert executed_flops(jaxpr, filled=0.25) == 2 * 128 * 128 * 256
