"""That the watch over kernels sees a race, wherever it is in a run."""

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from tests.kernels.interpreter import interpreted


def copy(x, *, waits):
    """`x` by a DMA that is waited for before its result is read, or after."""

    def body(x_ref, out_ref, buffer_ref, semaphore):
        dma = pltpu.make_async_copy(x_ref, buffer_ref, semaphore)
        dma.start()
        if waits:
            dma.wait()
        out_ref[...] = buffer_ref[...]
        if not waits:
            dma.wait()

    return pl.pallas_call(
        body,
        out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype),
        in_specs=[pl.BlockSpec(memory_space=pl.ANY)],
        scratch_shapes=[pltpu.VMEM(x.shape, x.dtype), pltpu.SemaphoreType.DMA],
    )(x)


def test_a_race_is_found_in_a_kernel_that_another_follows():
    with interpreted(racy=True) as watch:
        once = jax.block_until_ready(copy(jnp.ones((8, 128)), waits=False))
        jax.block_until_ready(copy(once, waits=True))
    assert watch.kernels == 2
    assert watch.races == [0]


def test_a_race_is_an_error():
    with pytest.raises(AssertionError, match="kernels"), interpreted():
        jax.block_until_ready(copy(jnp.ones((8, 128)), waits=False))
