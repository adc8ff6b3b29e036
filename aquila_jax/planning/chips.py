"""What the makers say of TPU chips, and the topologies that `aquila plan` takes."""

import dataclasses
import math
import re
from collections.abc import Mapping

from aquila_jax.errors import UserError

_GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One kind of TPU.

    Attributes:
        name: as topologies are named ("v5p").
        devices: JAX devices of one chip.
        hbm_bytes: HBM of one chip that the compiler gives to programs, a little less than is
            printed on it.
        flops: peak bfloat16 FLOP/s of one chip.
        hbm_bandwidth: bytes/s of one chip.
        ici_bandwidth: bytes/s that one chip sends over all its links inside a slice.
        dcn_bandwidth: bytes/s that one chip sends to other slices, its share of its host's cards.
        dimensions: of the torus.
        example: a topology.
    """

    name: str
    devices: int
    hbm_bytes: float
    flops: float
    hbm_bandwidth: float
    ici_bandwidth: float
    dcn_bandwidth: float
    dimensions: int
    example: str


# Sources: docs.cloud.google.com/tpu/docs/{v5e,v5p,v6e,tpu7x}, "System architecture" (2026-11):
# peak compute, HBM bandwidth, interconnect (given in both directions for v5p, v6e and tpu7x: half
# of it here), and the network's bandwidth of a pod or host divided by its chips. HBM: what libtpu
# 0.0.42 says is available when a program asks for too much.
CHIPS: Mapping[str, Chip] = {
    chip.name: chip
    for chip in (
        Chip("v5e", 1, 15.75 * _GIB, 197e12, 819e9, 200e9, 3.125e9, 2, "v5e:16x16"),
        Chip("v5p", 1, 95.74 * _GIB, 459e12, 2765e9, 600e9, 6.25e9, 3, "v5p:4x4x8"),
        Chip("v6e", 1, 31.25 * _GIB, 918e12, 1640e9, 400e9, 12.5e9, 2, "v6e:16x16"),
        Chip("tpu7x", 2, 2 * 94.75 * _GIB, 2307e12, 7380e9, 600e9, 12.5e9, 3, "tpu7x:4x4x4"),
    )
}
_FORM = re.compile(r"([a-z0-9]+):(\d+(?:x\d+)+)")


@dataclasses.dataclass(frozen=True)
class Topology:
    """A slice of a TPU pod, or several alike.

    Attributes:
        chip: what it is made of.
        shape: chips along each dimension of one slice's torus.
        slices: how many of them, joined by the data centre's network.
    """

    chip: Chip
    shape: tuple[int, ...]
    slices: int = 1

    @property
    def num_chips(self) -> int:
        """Of all slices."""
        return math.prod(self.shape) * self.slices

    @property
    def num_devices(self) -> int:
        """Of all slices."""
        return self.num_chips * self.chip.devices

    @property
    def name(self) -> str:
        """As libtpu names one slice."""
        return f"{self.chip.name}:{'x'.join(map(str, self.shape))}"

    def __str__(self) -> str:
        slices = f"{self.slices} slices of " if self.slices > 1 else ""
        return f"{slices}{self.name}, {self.num_chips} chips"


def parse_topology(text: str, slices: int = 1) -> Topology:
    """`text`, as in "v5p:4x4x8".

    Example:
        >>> parse_topology("v5p:4x4x8", slices=2).num_chips
        256

    Raises:
        UserError: it names no chip of `CHIPS`, or not as many dimensions as the chip has.
    """
    known = ", ".join(chip.example for chip in CHIPS.values())
    match = _FORM.fullmatch(text)
    if match is None or match[1] not in CHIPS:
        raise UserError(
            f"no topology {text!r}: write CHIP:AxB or CHIP:AxBxC, the chips along each dimension "
            f"of a slice, as in {known}"
        )
    chip, shape = CHIPS[match[1]], tuple(int(size) for size in match[2].split("x"))
    if len(shape) != chip.dimensions or min(shape) < 1:
        raise UserError(
            f"{text}: a slice of {chip.name} has {chip.dimensions} dimensions, all at least 1, "
            f"as in {chip.example}"
        )
    if slices < 1:
        raise UserError(f"slices must be 1 or more, not {slices}")
    return Topology(chip, shape, slices)
