"""A plan: what a program of a run needs of a topology, and how fast it can be at best."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from aquila_jax import accounting
from aquila_jax.config import PRESETS, ModelConfig
from aquila_jax.nn.moe.mixing import filled_share
from aquila_jax.planning.chips import Topology
from aquila_jax.planning.flops import executed_flops
from aquila_jax.planning.hlo import parse
from aquila_jax.planning.memory import Memory, Outcome, compile_program
from aquila_jax.planning.programs import PROGRAMS, Program
from aquila_jax.planning.roofline import Roofline, Work, roofline
from aquila_jax.planning.topology import devices_of
from aquila_jax.planning.traffic import Traffic, traffic_of
from aquila_jax.training.run import TrainRun

# arXiv 2408.06567, Table 3: tokens of each stage.
PAPER_TOKENS: Mapping[str, float] = {
    "aquila3_1_8b": 3600e9,
    "aquila3_8x1_8b": 400e9,
    "aquila3_7b": 3600e9,
    "aquila3_16b": 1200e9,
    "aquila3_8x16b": 545e9,
}
_SECONDS_OF_A_DAY = 86400


@dataclasses.dataclass(frozen=True)
class Sent:
    """Collectives of one kind along the same mesh axes.

    Attributes:
        kind: "all-gather", ...
        axes: of the mesh, along which they go.
        count: executions in one run of the program.
        ici_bytes: that a device sends inside its slice.
        dcn_bytes: that it sends to other slices.
    """

    kind: str
    axes: tuple[str, ...]
    count: int
    ici_bytes: float
    dcn_bytes: float


@dataclasses.dataclass(frozen=True)
class Plan:
    """Everything `aquila plan` tells.

    Attributes:
        what: "train", "growth" or "decode".
        topology: where it would run.
        mesh: axes and sizes.
        model: the architecture.
        settings: what a search varies and what goes with it: batch size, its parts, remat, ...
        tokens: of one execution.
        run_tokens: of the whole run; 0 where that is unknown.
        memory: bytes on one device.
        work: of one execution; None where the program does not fit.
        traffic: by kind and axes, the largest first.
        unknown_loops: loops whose trips are not known; what they send counts once.
        bound: the roofline; None where the program does not fit.
        compile_seconds: lowering and compiling.
    """

    what: str
    topology: Topology
    mesh: Mapping[str, int]
    model: ModelConfig
    settings: Mapping[str, Any]
    tokens: int
    run_tokens: float
    memory: Memory
    work: Work | None
    traffic: tuple[Sent, ...]
    unknown_loops: int
    bound: Roofline | None
    compile_seconds: float

    @property
    def capacity(self) -> float:
        """Bytes of HBM on one device that programs get."""
        return self.topology.chip.hbm_bytes / self.topology.chip.devices

    @property
    def fits(self) -> bool:
        """Whether the compiler took it."""
        return self.work is not None

    @property
    def tokens_per_day(self) -> float:
        """At most; 0 where it does not fit or has none."""
        if self.bound is None:
            return 0.0
        return self.tokens / self.bound.bound * _SECONDS_OF_A_DAY

    @property
    def token_counts(self) -> dict[str, float]:
        """How many tokens to train on: this run's, and the paper's for the same architecture."""
        counts = {"this run": self.run_tokens} if self.run_tokens else {}
        for name, tokens in PAPER_TOKENS.items():
            if _same_size(self.model, PRESETS[name]):
                counts["the paper"] = tokens
        return counts

    def days(self, tokens: float) -> float:
        """At least, for so many tokens."""
        return tokens / self.tokens_per_day

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON; sizes in bytes, times in seconds."""
        plain = dataclasses.asdict(self)
        plain["topology"] = {"slice": self.topology.name, "slices": self.topology.slices}
        plain |= {
            "fits": self.fits,
            "hbm_capacity": self.capacity,
            "parameters": accounting.num_parameters(self.model),
            "active_parameters": accounting.num_active_parameters(self.model),
        }
        if self.bound is not None:
            plain["bound"] |= {"step": self.bound.bound, "binding": self.bound.binding}
            plain["tokens_per_day"] = self.tokens_per_day
        if self.tokens_per_day and self.what == "train":
            plain["token_counts"] = {
                name: {
                    "tokens": tokens,
                    "days": self.days(tokens),
                    "chip_hours": self.days(tokens) * 24 * self.topology.num_chips,
                }
                for name, tokens in self.token_counts.items()
            }
        return plain


def make_plan(
    run: TrainRun, topology: Topology, what: str = "train", devices: Any = None
) -> tuple[Plan, Program, Outcome]:
    """Trace and compile one program of `run` for `topology`, and read what it needs.

    Args:
        run: the settings; its data is asked for nothing but sizes.
        topology: where it would run.
        what: "train", "growth" or "decode".
        devices: of the topology, where they are at hand already.

    Returns:
        The plan, what was traced, and what the compiler made of it.

    Raises:
        UserError: there is no such topology, or mesh, sharding or batch do not fit it.
    """
    devices = devices_of(topology) if devices is None else devices
    program = PROGRAMS[what](run, devices)
    outcome = compile_program(program)
    work, traffic, bound = None, Traffic((), 0), None
    if outcome.executable is not None:
        traffic = traffic_of(parse(outcome.executable.as_text()), len(devices))
        filled = filled_share(run.model, run.dispatch, program.layout) if what == "train" else 1.0
        work = _work(program, outcome, traffic, filled)
        bound = roofline(work, topology)
    run_tokens = run.steps * program.tokens if what == "train" else 0
    plan = Plan(
        what,
        topology,
        dict(program.mesh_shape),
        run.model,
        {
            "batch_size": run.data.batch_size,
            "sequence_length": run.data.sequence_length,
            "remat": run.remat,
            "dtype": run.dtype,
            "micro_batches": run.micro_batches,
        },
        program.tokens,
        float(run_tokens),
        outcome.memory,
        work,
        _by_kind(traffic, program),
        traffic.unknown_loops,
        bound,
        outcome.seconds,
    )
    return plan, program, outcome


def _work(program: Program, outcome: Outcome, traffic: Traffic, filled: float) -> Work:
    slices = program.slices
    sent = [collective.sent(slices) for collective in traffic.collectives]
    memory = outcome.memory
    return Work(
        program.model_flops,
        executed_flops(program.traced.jaxpr, filled),
        memory.arguments + memory.outputs + memory.replaced + 2 * memory.temporaries,
        sum(ici for ici, _ in sent),
        sum(dcn for _, dcn in sent),
    )


def _by_kind(traffic: Traffic, program: Program) -> tuple[Sent, ...]:
    sums: dict[tuple[str, tuple[str, ...]], Sent] = {}
    for collective in traffic.collectives:
        key = collective.kind, collective.axes(program.mesh_shape)
        ici, dcn = collective.sent(program.slices)
        old = sums.get(key, Sent(*key, 0, 0.0, 0.0))
        sums[key] = Sent(
            *key, old.count + collective.trips, old.ici_bytes + ici, old.dcn_bytes + dcn
        )
    return tuple(sorted(sums.values(), key=lambda sent: -sent.ici_bytes - sent.dcn_bytes))


def _same_size(model: ModelConfig, other: ModelConfig) -> bool:
    """Whether two architectures have the same layers, whatever their vocabulary."""
    names = ("embed_dim", "num_layers", "num_heads", "mlp_dim", "num_experts")
    return all(getattr(model, name) == getattr(other, name) for name in names)
