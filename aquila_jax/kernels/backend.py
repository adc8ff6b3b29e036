"""The one place that chooses how a kernel is computed."""

import functools
import logging
from collections.abc import Callable
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import ManualAxisType

from aquila_jax.errors import UserError

Backend = Literal["auto", "reference", "pallas", "interpret"]
"""How to compute.

`reference` is the readable one in plain JAX, `pallas` the kernel compiled for a TPU, `interpret`
the kernel carried out step by step on a CPU, to test it. `auto` is `pallas` where the program is
compiled for a TPU, whatever the machine that compiles it, and `reference` elsewhere and for
float64.
"""


def check(backend: str) -> None:
    """Refuse a name that is not a backend's.

    Raises:
        UserError: it is not; the message lists those there are.
    """
    if backend not in get_args(Backend):
        choices = ", ".join(get_args(Backend))
        raise UserError(f"there is no kernel backend {backend!r}: choose one of {choices}")


def dispatch(
    backend: Backend, reference: Callable[..., Any], kernel: Callable[..., Any], *operands: Any
) -> Any:
    """`reference(*operands)`, or `kernel(*operands, interpret=...)`: of equal shapes and dtypes."""
    _log_once(backend)
    # Kernels compute in float32.
    is_double = any(getattr(x, "dtype", None) == jnp.float64 for x in operands)
    if backend == "reference" or (backend == "auto" and is_double):
        return reference(*operands)

    def call(*operands: Any, interpret: bool) -> Any:
        # Kernels are written in 32 bits; a literal shall not be 64 where others are allowed.
        with jax.enable_x64(False):
            return kernel(*operands, interpret=interpret)

    if backend != "auto":
        return call(*operands, interpret=backend == "interpret")
    compiled = functools.partial(call, interpret=False)
    return jax.lax.platform_dependent(*operands, tpu=compiled, default=reference)


@functools.cache
def _log_once(backend: Backend) -> None:
    chosen = backend
    if backend == "auto":
        chosen = f"pallas on a TPU, reference elsewhere; here: {jax.default_backend()}"
    logging.getLogger(__name__).info("routing kernels: %s", chosen)


def pallas_call(
    body: Callable[..., None],
    *operands: jax.Array,
    name: str,
    interpret: bool,
    out_shape: Any,
    cost: pl.CostEstimate,
    vmem_bytes: int | None = None,
    **specs: Any,
) -> Any:
    """A Pallas TPU kernel on its operands, the steps of its grid in order.

    Inside `shard_map` results vary over the mesh axes that any operand varies over.

    Args:
        body: the kernel, on references.
        operands: arrays, in the order of `in_specs`.
        name: in profiles and dumps.
        interpret: whether to carry it out on a CPU.
        out_shape: a tree of `jax.ShapeDtypeStruct`.
        cost: what the compiler shall think that it costs.
        vmem_bytes: how much VMEM it may have, where the compiler's default is too little.
        specs: the rest of what `pl.pallas_call` takes.
    """
    varying = frozenset().union(*(jax.typeof(x).manual_axis_type.varying for x in operands))
    axes = ManualAxisType(varying=varying)
    return pl.pallas_call(
        body,
        name=name,
        out_shape=jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, manual_axis_type=axes),
            out_shape,
        ),
        interpret=pltpu.InterpretParams() if interpret else False,
        cost_estimate=cost,
        # What kernels are given keeps indices in range; checks cost more than a DMA's start.
        compiler_params=pltpu.CompilerParams(
            vmem_limit_bytes=vmem_bytes, disable_bounds_checks=True
        ),
        **specs,
    )(*operands)
