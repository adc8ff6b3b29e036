"""How compiling the 8x16B step grows with the pod: 8 to 2048 v5p chips.

    python benchmarks/pods/scaling.py [--dir DIR] [--out DIR]

Two rows of 4096 tokens on every chip, fsdp x expert 8. All 40 layers do not fit the smallest slice:
the compiler says what they would need, and stops there. So 2 layers, which fit, stand beside them,
on the smallest slice and on a larger one: layers are scanned, and their number should be no part of
what compiling takes. Every step is compiled in a process of its own, whose results stay in --dir.
Tracing, compiling (lowering with it) and reading the scheduled program are told apart; memory is
the process's at its peak. Writes pod_scaling.md.
"""

import argparse
import itertools
import json
import os
import platform
import resource
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from planned import RUN, UNREAD
from processes import kept

from aquila_jax.cli.gin_files import configured_run
from aquila_jax.files import write_text
from aquila_jax.planning import parse_topology
from aquila_jax.planning.hlo import parse
from aquila_jax.planning.memory import compile_program
from aquila_jax.planning.programs import train_program
from aquila_jax.planning.topology import devices_of
from aquila_jax.planning.traffic import traffic_of

STEPS = (
    *((40, shape) for shape in ("2x2x2", "2x4x4", "4x4x8", "8x8x8", "8x16x16")),
    *((2, shape) for shape in ("2x2x2", "4x4x8")),
)
EXPERT = 8
ROWS = 2


def main() -> None:
    """Compile what is not compiled yet, and write the page."""
    flags = argparse.ArgumentParser(description=__doc__)
    flags.add_argument("--dir", type=Path, default=Path("/tmp/pod_scaling"))
    flags.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "results")
    flags.add_argument("--one", nargs=2, metavar=("SLICE", "LAYERS"), help=argparse.SUPPRESS)
    arguments = flags.parse_args()
    if arguments.one:
        print(json.dumps(compiled(arguments.one[0], int(arguments.one[1]))))
        return
    found = []
    for layers, shape in STEPS:
        command = [sys.executable, __file__, "--one", shape, str(layers)]
        found.append(kept(command, arguments.dir / f"{layers}_{shape}.json"))
    write_text(arguments.out / "pod_scaling.md", page(found))


def compiled(shape: str, layers: int) -> dict[str, Any]:
    """What one step took to compile, in seconds and bytes of this process."""
    topology = parse_topology(f"v5p:{shape}")
    chips = topology.num_devices
    run = configured_run(
        [RUN],
        [
            f"MeshShape.fsdp={chips // EXPERT}",
            f"MeshShape.expert={EXPERT}",
            f"BATCH_SIZE={ROWS * chips}",
            f"model/preset.num_layers={layers}",
            f"parent/preset.num_layers={layers}",
        ],
        unread=UNREAD,
    )
    devices = devices_of(topology)
    steps = [_clock()]
    program = train_program(run, devices)
    steps.append(_clock())
    outcome = compile_program(program)
    steps.append(_clock())
    sent = instructions = 0
    if outcome.executable is not None:
        text = outcome.executable.as_text()
        instructions = text.count(" = ")
        sent = sum(c.sent(program.slices)[0] for c in traffic_of(parse(text), chips).collectives)
    steps.append(_clock())
    spent = [
        (after[0] - before[0], after[1] - before[1]) for before, after in itertools.pairwise(steps)
    ]
    return {
        "chips": chips,
        "layers": layers,
        "fits": outcome.executable is not None,
        "capacity": topology.chip.hbm_bytes,
        "memory": outcome.memory.total,
        "wall": dict(zip(("trace", "compile", "read"), (wall for wall, _ in spent), strict=True)),
        "cpu": dict(zip(("trace", "compile", "read"), (cpu for _, cpu in spent), strict=True)),
        "host_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "instructions": instructions,
        "sent": sent,
    }


def page(found: Sequence[Mapping[str, Any]]) -> str:
    """The whole of it."""
    head = ("layers", "chips", "HBM, GiB a chip", "sent, GB a chip", "instructions")
    times = ("trace, CPU s", "compile, CPU s", "compile, wall s", "read, CPU s", "host's peak, GB")
    return "\n".join(
        [
            "# Compiling the 8x16B step, from 8 to 2048 chips\n",
            f"Python {platform.python_version()}, jax {jax.__version__}, {os.cpu_count()} cores "
            "shared with other work: CPU seconds are the ones to compare. By "
            "`benchmarks/pods/scaling.py`: v5p, fsdp x expert 8, two rows of 4096 tokens a chip, "
            "full remat. Where a step does not fit, HBM is what the compiler says that it wanted, "
            "and its time is that of the refusal; 2 layers, which fit everywhere, stand beside.\n",
            f"| {' | '.join((*head, *times))} |",
            "|" + "---|" * len((*head, *times)),
            *(f"| {' | '.join(_row(result))} |" for result in found),
            "",
            *_growth(found),
            "",
        ]
    )


def _row(result: Mapping[str, Any]) -> Iterator[str]:
    yield str(result["layers"])
    yield str(result["chips"])
    size = f"{result['memory'] / 2**30:.1f}"
    yield size if result["fits"] else f"does not fit: {size} of {result['capacity'] / 2**30:.1f}"
    yield f"{result['sent'] / 1e9:.1f}" if result["fits"] else ""
    yield f"{result['instructions']:,}" if result["fits"] else ""
    yield f"{result['cpu']['trace']:.0f}"
    yield f"{result['cpu']['compile']:.0f}"
    yield f"{result['wall']['compile']:.0f}"
    yield f"{result['cpu']['read']:.0f}" if result["fits"] else ""
    yield f"{result['host_bytes'] / 1e9:.1f}"


def _growth(found: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """The largest slice against the smallest that fits, by number of layers."""
    for layers in sorted({layers for layers, _ in STEPS}, reverse=True):
        fitting = [result for result in found if result["layers"] == layers and result["fits"]]
        if len(fitting) < 2:
            continue
        small, large = fitting[0], fitting[-1]
        cpu = sum(large["cpu"].values()) / sum(small["cpu"].values())
        memory = large["host_bytes"] / small["host_bytes"]
        yield (
            f"{layers} layers: {large['chips'] // small['chips']} times as many chips "
            f"({small['chips']} to {large['chips']}) take {cpu:.1f} times the CPU seconds, all "
            f"parts together, and {memory:.1f} times the memory.\n"
        )


def _clock() -> tuple[float, float]:
    return time.monotonic(), time.process_time()


if __name__ == "__main__":
    main()
