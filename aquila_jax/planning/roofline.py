"""The least time that a program can take on a topology, and what binds it."""

import dataclasses
from collections.abc import Mapping

from aquila_jax.planning.chips import Topology


@dataclasses.dataclass(frozen=True)
class Work:
    """What one execution does, on one device except for the FLOPs.

    Attributes:
        model_flops: of the model, over all devices.
        executed_flops: with recomputation and whatever else the program computes, all devices.
        hbm_bytes: read and written at least: what goes in and comes out once, and what is
            stored inside once each way.
        ici_bytes: sent to devices of the same slice.
        dcn_bytes: sent to other slices.
    """

    model_flops: float
    executed_flops: float
    hbm_bytes: float
    ici_bytes: float
    dcn_bytes: float


@dataclasses.dataclass(frozen=True)
class Roofline:
    """A bound, not a forecast: as if the four went on at once, each at its peak.

    Attributes:
        seconds: by resource: compute, HBM, ICI, DCN.
        mfu: model FLOPs over what the chips could do in the bound's time; no more than this.
    """

    seconds: Mapping[str, float]
    mfu: float

    @property
    def bound(self) -> float:
        """Seconds; no execution takes less."""
        return max(self.seconds.values())

    @property
    def binding(self) -> str:
        """The resource that takes longest."""
        return max(self.seconds, key=lambda name: self.seconds[name])


def roofline(work: Work, topology: Topology) -> Roofline:
    """The bound for `work` on `topology`."""
    chip = topology.chip
    peak = chip.flops * topology.num_chips
    seconds = {
        "compute": max(work.executed_flops, work.model_flops) / peak,
        "HBM": work.hbm_bytes * chip.devices / chip.hbm_bandwidth,
        "ICI": work.ici_bytes * chip.devices / chip.ici_bandwidth,
        "DCN": work.dcn_bytes * chip.devices / chip.dcn_bandwidth,
    }
    return Roofline(seconds, work.model_flops / (peak * max(seconds.values())))
