"""What a compiled program sends between chips, read from its scheduled HLO."""

import dataclasses
import re
from collections.abc import Iterator, Sequence

import numpy as np

from aquila_jax.planning.hlo import (
    Computation,
    Instruction,
    Module,
    elements,
    fused,
    num_bytes,
    trip_count,
)

_KINDS = (
    "ragged-all-to-all", "all-to-all", "all-gather", "all-reduce", "reduce-scatter",
    "collective-permute", "collective-broadcast",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective operation of the program.

    Attributes:
        kind: "all-gather", "all-reduce", ...
        size: bytes of one execution's whole array on one chip: of what is gathered, before it is
            scattered, that is reduced or exchanged.
        groups: int `[groups, members]`, devices by their place in the mesh; for a permutation,
            pairs of sender and receiver.
        trips: executions in one run of the program.
        where: the operation of the model it comes from.
    """

    kind: str
    size: float
    groups: np.ndarray
    trips: int
    where: str

    def sent(self, slice_of: np.ndarray) -> tuple[float, float]:
        """Bytes that a chip sends in one run, inside its slice and to other slices.

        The least that does it: rings for gathering, scattering and reducing, first inside a
        slice and then across, so that what crosses is shared by a slice's chips. A ragged
        exchange counts what it can be on average: no more than its smaller buffer.

        Args:
            slice_of: int `[devices]`, the slice of each.
        """
        if self.kind == "collective-permute":
            crosses = (slice_of[self.groups[:, 0]] != slice_of[self.groups[:, 1]]).any()
            total = self.size * self.trips
            return (0.0, total) if crosses else (total, 0.0)
        members = self.groups.shape[1]
        slices = len(set(slice_of[self.groups[0]]))
        inside = members // slices
        total = self.size * self.trips * (2 if self.kind == "all-reduce" else 1)
        if "all-to-all" in self.kind:
            return total * (inside - 1) / members, total * (members - inside) / members
        return total * (inside - 1) / inside, total * (slices - 1) / members

    def axes(self, mesh_shape: Sequence[tuple[str, int]]) -> tuple[str, ...]:
        """The mesh axes along which a group's members differ."""
        sizes = [size for _, size in mesh_shape]
        places = np.stack(np.unravel_index(self.groups, sizes))
        varies = (places != places[:, :, :1]).any(axis=(1, 2))
        return tuple(name for (name, _), is_so in zip(mesh_shape, varies, strict=True) if is_so)


@dataclasses.dataclass(frozen=True)
class Traffic:
    """All collectives of a program.

    Attributes:
        collectives: those that move bytes.
        unknown_loops: loops whose trips the text does not tell; what is inside counts once.
    """

    collectives: tuple[Collective, ...]
    unknown_loops: int


def traffic_of(module: Module, num_devices: int) -> Traffic:
    """Every collective with its trips; one that is split over a schedule counts once."""
    reader = _Reader(module, num_devices)
    found = tuple(reader.walk(module.computations[module.entry], 1))
    return Traffic(
        tuple(c for c in found if c.groups.shape[1] > 1 and c.size), reader.unknown_loops
    )


class _Reader:
    def __init__(self, module: Module, num_devices: int) -> None:
        self.module, self.num_devices, self.unknown_loops = module, num_devices, 0

    def walk(self, scope: Computation, trips: int) -> Iterator[Collective]:
        """The collectives of a computation that runs `trips` times."""
        # TPUs spread a collective over fusions of other work: it begins in one, goes on in others
        # and ends in a last, each with a copy of the instruction. Copies share channel and chain.
        spread: dict[str, list[tuple[Computation, Instruction]]] = {}
        for instruction in scope.instructions.values():
            opcode = instruction.opcode
            if opcode == "while":
                count = trip_count(self.module, scope, instruction)
                self.unknown_loops += count is None
                (body,) = instruction.called("body")
                yield from self.walk(
                    self.module.computations[body], trips * (1 if count is None else count)
                )
            elif opcode == "conditional":
                yield from self._widest_branch(instruction, trips)
            elif opcode in ("call", "call-start", "async-start"):
                for name in (*instruction.called("to_apply"), *instruction.called("calls")):
                    yield from self.walk(self.module.computations[name], trips)
            elif opcode == "fusion":
                for computation, inner in fused(self.module, instruction):
                    if _kind(inner):
                        spread.setdefault(_chain(inner), []).append((computation, inner))
            elif _kind(instruction):
                yield self._collective(scope, instruction, trips)
            elif opcode == "send" and _between_slices(instruction):
                yield self._between_slices(instruction, trips)
        for parts in spread.values():
            starts = sum(_starts(computation) for computation, _ in parts)
            yield self._collective(*parts[0], trips * max(starts, 1))

    def _widest_branch(self, conditional: Instruction, trips: int) -> Iterator[Collective]:
        names = conditional.called("branch_computations") or tuple(
            re.findall(r"(?:true|false)_computation=%([\w.\-]+)", conditional.attributes)
        )
        branches = [[*self.walk(self.module.computations[name], trips)] for name in names]
        yield from max(branches, key=lambda found: sum(c.size * c.trips for c in found), default=[])

    def _between_slices(self, send: Instruction, trips: int) -> Collective:
        """What the hosts of slices tell each other for their chips: by now one send for each."""
        kind = _between_slices(send).lower().replace("_", "-")
        target = send.attribute(r'_xla_megascale_target="\{([\d,:]+)\}') or ""
        first, _, last = target.partition(":")
        slices = int(last) - int(first) + 1 if last else len(target.split(","))
        groups = np.arange(self.num_devices).reshape(slices, -1).T
        size = num_bytes(elements(send.shape)[0]) * (slices if kind == "all-gather" else 1)
        where = send.attribute(r'_xla_host_transfer_rendezvous="([^"]*)"') or send.name
        return Collective(kind, size, groups, trips, where)

    def _collective(self, scope: Computation, found: Instruction, trips: int) -> Collective:
        kind = _kind(found)
        groups = _groups(found, self.num_devices)
        size = num_bytes(found.shape)
        if found.opcode.endswith("-start") and kind != "all-reduce":
            size = num_bytes(elements(found.shape)[1])  # after what it was given
        if kind == "reduce-scatter":
            size *= groups.shape[1]
        elif kind == "ragged-all-to-all":
            given = scope.instructions.get(found.operands[0])
            size = min(size, num_bytes(given.shape)) if given else size
        elif kind == "all-reduce" and _is_scattered(scope):
            kind = "reduce-scatter"
        where = found.attribute(r'op_name="([^"]*)"') or found.name
        return Collective(kind, size, groups, trips, where)


def _kind(instruction: Instruction) -> str:
    opcode = instruction.opcode.removesuffix("-start")
    return opcode if opcode in _KINDS else ""


def _between_slices(send: Instruction) -> str:
    """ALL_REDUCE, ...: what a send to a host is part of; nothing for any other send.

    XLA for TPUs does between slices what these are called, and inside a slice what its collectives
    say. Meshes have slices outermost, so the chips that talk are those of one place in each.
    """
    return send.attribute(r'_xla_megascale_transfer_type="(\w+)"') or ""


def _chain(instruction: Instruction) -> str:
    """What copies of one collective have in common; the name of one that is not spread."""
    chain = instruction.attribute(r'chain_id="(\d+)"')
    channel = instruction.attribute(r"channel_id=(\d+)")
    return instruction.name if chain is None else f"{channel} {chain}"


def _starts(computation: Computation) -> bool:
    return any(
        'custom_call_target="AsyncCollectiveStart"' in i.attributes
        for i in computation.instructions.values()
    )


def _is_scattered(computation: Computation) -> bool:
    """Whether an all-reduce in a fusion keeps only the chip's part: how TPUs reduce-scatter."""
    return computation.name.startswith("all-reduce-scatter")


def _groups(instruction: Instruction, num_devices: int) -> np.ndarray:
    """`[groups, members]` of a collective, of any of the forms in which HLO writes them."""
    pairs = instruction.attribute(r"source_target_pairs=(\{\{.*?\}\}|\{\})")
    if pairs is not None:
        return _listed(pairs).reshape(-1, 2)
    listed = instruction.attribute(r"replica_groups=(\{\{.*?\}\})")
    if listed is not None:
        return _listed(listed)
    iota = re.search(
        r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", instruction.attributes
    )
    if iota:
        return _iota(iota[1], iota[2], iota[3])
    mesh = re.search(
        r"replica_groups=(?:@?\w+)?\[([^\]]+)\](?:, device_ids=\(([^)]*)\))? \{([^}]*)\}",
        instruction.attributes,
    )
    if mesh:
        return _on_mesh(mesh[1], mesh[3], num_devices)
    return np.arange(num_devices)[None]


def _listed(text: str) -> np.ndarray:
    return np.asarray([[*map(int, g.split(","))] for g in re.findall(r"\{(\d[\d,]*)\}", text)])


def _iota(shape: str, dims: str, order: str | None) -> np.ndarray:
    sizes = [*map(int, dims.split(","))]
    ids = np.arange(np.prod(sizes)).reshape(sizes)
    if order:
        ids = ids.transpose([*map(int, order.split(","))])
    return ids.reshape([*map(int, shape.split(","))])


def _on_mesh(sizes: str, along: str, num_devices: int) -> np.ndarray:
    """Groups along named axes, or parts `name:(before)size` of axes, of a mesh of all devices."""
    mesh = [(name, int(size)) for name, size in re.findall(r"['\"]?(\w+)['\"]?=(\d+)", sizes)]
    wanted = re.findall(r"['\"]?(\w+)['\"]?(?::\((\d+)\)(\d+))?", along)
    dims, kept = [], []
    for name, size in mesh:
        parts = [(int(before), int(part)) for n, before, part in wanted if n == name and part]
        if parts:
            ((before, part),) = parts
            dims += [before, part, size // before // part]
            kept += [False, True, False]
        else:
            dims.append(size)
            kept.append(any(n == name for n, _, _ in wanted))
    ids = np.arange(num_devices).reshape(dims)
    first = [axis for axis, is_kept in enumerate(kept) if not is_kept]
    last = [axis for axis, is_kept in enumerate(kept) if is_kept]
    members = int(np.prod([dims[axis] for axis in last]))
    return ids.transpose([*first, *last]).reshape(-1, members)
