"""The devices of a topology, on a machine that has none of them."""

import contextlib
import importlib.util
import os
from collections.abc import Iterator
from typing import Any

from jax.experimental import topologies

from aquila_jax.errors import UserError, first_line
from aquila_jax.planning.chips import Topology


def devices_of(topology: Topology) -> list[Any]:
    """Devices that programs can be compiled for, and nothing else.

    Raises:
        UserError: libtpu is not installed, or there is no such slice.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(
            "compiling for a TPU needs libtpu: pip install 'aquila-jax[tpu]' (on Linux), no TPU"
        )
    # libtpu would ask a metadata server about this machine, and lets one process at a time have a
    # TPU; no TPU is touched here.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    slices = {"num_slices": topology.slices} if topology.slices > 1 else {}
    try:
        with _quiet():
            description = topologies.get_topology_desc(topology.name, platform="tpu", **slices)
    except Exception as error:
        # JAX promises no type; what libtpu says comes as the first line.
        raise UserError(f"no topology {topology.name}: {first_line(error)}") from error
    return list(description.devices)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the lines that libtpu writes on a machine that is no TPU's host."""
    kept = os.dup(2)
    silent = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(silent, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(silent)
