"""The one place that chooses how a kernel is computed."""

import functools
import logging
from collections.abc import Callable
from typing import Any, Literal, get_args

import jax

from aquila_jax.errors import UserError

Backend = Literal["auto", "reference", "pallas", "interpret"]
"""How to compute.

`reference` is the readable one in plain JAX, `pallas` the kernel compiled for a TPU, `interpret`
the kernel carried out step by step on a CPU, to test it. `auto` is `pallas` where the program is
compiled for a TPU, whatever the machine that compiles it, and `reference` elsewhere.
"""


def check(backend: str) -> None:
    """Refuse a name that is not a backend's."""
    if backend not in get_args(Backend):
        choices = ", ".join(get_args(Backend))
        raise UserError(f"there is no kernel backend {backend!r}: choose one of {choices}")


def dispatch(
    backend: Backend, reference: Callable[..., Any], kernel: Callable[..., Any], *operands: Any
) -> Any:
    """`reference(*operands)`, or `kernel(*operands, interpret=...)`: of equal shapes and dtypes."""
    _log_once(backend)
    if backend == "reference":
        return reference(*operands)
    if backend != "auto":
        return kernel(*operands, interpret=backend == "interpret")
    compiled = functools.partial(kernel, interpret=False)
    return jax.lax.platform_dependent(*operands, tpu=compiled, default=reference)


@functools.cache
def _log_once(backend: Backend) -> None:
    chosen = backend
    if backend == "auto":
        chosen = f"pallas on a TPU, reference elsewhere; here: {jax.default_backend()}"
    logging.getLogger(__name__).info("routing kernels: %s", chosen)
