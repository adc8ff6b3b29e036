"""Which processes belong together, read from what the place they run in says."""

import dataclasses
import os
from collections.abc import Mapping, Sequence

from aquila_jax.errors import UserError

# Read by JAX itself too, but only one by one.
_VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
# JAX's names of the places that it knows, in the order in which they are asked for, and ours.
_PLACES = {"gketpu": "GKE", "gcetpu": "Cloud TPU", "slurm": "SLURM"}


@dataclasses.dataclass(frozen=True)
class Cluster:
    """The processes of a run, as one of them sees them.

    Attributes:
        place: where they run: "GKE", "Cloud TPU", "SLURM" or "environment variables".
        coordinator: HOST:PORT that the first one listens on.
        count: how many there are.
        index: which of them this is.
        local_devices: the only devices this process is to use; None for all of its host's.
    """

    place: str
    coordinator: str
    count: int
    index: int
    local_devices: Sequence[int] | None = None

    def __str__(self) -> str:
        return (
            f"process {self.index} of {self.count}, found by {self.place}, coordinator "
            f"{self.coordinator}"
        )


def find(environ: Mapping[str, str] = os.environ, *, timeout: int = 300) -> Cluster | None:
    """What `JAX_COORDINATOR_ADDRESS` and its like say; else GKE, Cloud TPU or SLURM.

    Args:
        environ: of this process.
        timeout: seconds to wait for the coordinator's name to be known.

    Returns:
        None where this process is alone.

    Raises:
        UserError: the variables do not fit together.
    """
    cluster = _of_variables(environ) or _of_place(environ, timeout)
    return cluster if cluster is not None and cluster.count > 1 else None


def _of_variables(environ: Mapping[str, str]) -> Cluster | None:
    given = {name: environ[name] for name in _VARIABLES if environ.get(name)}
    if not given or given.keys() == {_VARIABLES[0]}:
        return None  # the address alone may serve a place that knows the rest
    if missing := [name for name in _VARIABLES if name not in given]:
        raise UserError(
            f"{', '.join(given)} set and {', '.join(missing)} not: set all three, or none"
        )
    address, *numbers = (given[name] for name in _VARIABLES)
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 1 << 16:
        raise UserError(f"JAX_COORDINATOR_ADDRESS is {address!r}: write HOST:PORT")
    if not all(number.isdecimal() for number in numbers) or int(numbers[1]) >= int(numbers[0]):
        raise UserError(
            f"JAX_NUM_PROCESSES is {numbers[0]!r} and JAX_PROCESS_ID {numbers[1]!r}: the one is "
            "at least 1, the other counts from 0 and is less"
        )
    return Cluster("environment variables", address, int(numbers[0]), int(numbers[1]))


def _of_place(environ: Mapping[str, str], timeout: int) -> Cluster | None:
    """What JAX's own detection says, which has no public name apart from joining."""
    from jax._src.clusters import ClusterEnv

    known = {kind.name: kind for kind in ClusterEnv._cluster_types}
    for name, words in _PLACES.items():
        if name.endswith("tpu") and environ.get("JAX_PLATFORMS") == "cpu":
            continue
        if name in known and known[name].is_env_present():
            # A pod of one host needs no coordinator, and a wrong one would cost minutes.
            if known[name].get_process_count() == 1:
                return None
            found = ClusterEnv.auto_detect_unset_distributed_params(
                environ.get(_VARIABLES[0]), None, None, None, name, timeout
            )
            address, count, index, local_devices = found
            assert address is not None
            assert count is not None
            assert index is not None
            return Cluster(words, address, count, index, local_devices)
    return None
