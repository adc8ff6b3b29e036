"""The 8x16B train step compiled for 128 v5p chips, beside MaxText's.

    python benchmarks/pods/step_8x16b.py --peer PEER_PYTHON [--batches 2 4 6 8] [--dir DIR]

Mesh fsdp 16 x expert 8, full remat, bfloat16 compute, float32 parameters and moments on both
sides, rows of 4096 tokens. For every batch (rows on a chip) both steps are compiled one after the
other, each in a process of its own; the scheduled HLO of both is read by `aquila_jax.planning`, so
bytes are counted alike. Times are of lowering and compiling; CPU seconds are the ones to compare on
a machine that others load. PEER_PYTHON is a Python 3.12 with `maxtext[tpu]==0.2.5`; without it only
ours is compiled. What a process measured stays in --dir and is not measured again. Writes
step_8x16b.md to --out.
"""

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from planned import RUN, UNREAD
from processes import kept

from aquila_jax.cli.gin_files import configured_run
from aquila_jax.files import write_text
from aquila_jax.planning import make_plan, parse_topology
from aquila_jax.planning.hlo import parse
from aquila_jax.planning.traffic import traffic_of

HERE = Path(__file__).parent
CHIPS = 128
BINDINGS = ("MeshShape.fsdp=16", "MeshShape.expert=8", "REMAT='full'", "DTYPE='bfloat16'")


def main() -> None:
    """Measure what is not measured yet, and write the page."""
    flags = argparse.ArgumentParser(description=__doc__)
    flags.add_argument("--peer", help="Python of an environment with MaxText")
    flags.add_argument("--batches", type=int, nargs="+", default=[2, 4, 6, 8])
    flags.add_argument("--dir", type=Path, default=Path("/tmp/step_8x16b"))
    flags.add_argument("--out", type=Path, default=HERE.parent / "results")
    flags.add_argument("--ours", type=int, metavar="BATCH", help=argparse.SUPPRESS)
    arguments = flags.parse_args()
    arguments.dir.mkdir(parents=True, exist_ok=True)
    if arguments.ours:
        compile_ours(arguments.ours, arguments.dir / f"ours_{arguments.ours}.hlo")
        return
    found: dict[str, list[dict[str, Any]]] = {"ours": [], "MaxText": []}
    for batch in arguments.batches:
        hlo = arguments.dir / f"ours_{batch}.hlo"
        command = [sys.executable, __file__, "--ours", str(batch), "--dir", str(arguments.dir)]
        found["ours"].append(measured(command, hlo))
        if arguments.peer:
            hlo = arguments.dir / f"peer_{batch}.hlo"
            command = [arguments.peer, str(HERE / "peer_step.py"), f"--batch={batch}"]
            found["MaxText"].append(measured([*command, f"--hlo={hlo}"], hlo))
    written = [path.stat().st_mtime for path in arguments.dir.glob("*.json")]
    hours = (max(written) - min(written)) / 3600
    write_text(arguments.out / "step_8x16b.md", report(found, hours))


def compile_ours(batch: int, hlo: Path) -> None:
    """One line of JSON, as `peer_step.py` prints it."""
    run = configured_run([RUN], [*BINDINGS, f"BATCH_SIZE={batch * CHIPS}"], unread=UNREAD)
    began = time.process_time()
    plan, _, outcome = make_plan(run, parse_topology("v5p:4x4x8"))
    memory = plan.memory
    if outcome.executable is not None:
        hlo.write_text(outcome.executable.as_text())
    line = {
        "batch": batch,
        "fits": plan.fits,
        "arguments": memory.arguments,
        "temporaries": memory.temporaries,
        "seconds": plan.compile_seconds,
        "cpu_seconds": time.process_time() - began,
        "mfu_bound": plan.bound.mfu if plan.bound else 0.0,
    }
    print(json.dumps(line))


def measured(command: Sequence[str], hlo: Path) -> dict[str, Any]:
    """What a process printed last, and what its HLO sends, GB on a chip by kind."""
    result = kept(command, hlo.with_suffix(".json"))
    if result["fits"]:
        traffic = traffic_of(parse(hlo.read_text()), CHIPS)
        sent: dict[str, float] = {}
        for collective in traffic.collectives:
            bytes_sent, _ = collective.sent(np.zeros(CHIPS, int))
            sent[collective.kind] = sent.get(collective.kind, 0.0) + bytes_sent / 1e9
        result["sent"] = sent
    return result


def report(found: dict[str, list[dict[str, Any]]], hours: float) -> str:
    """The page, of what was measured over so many hours."""
    head = (
        "| | rows a chip | arguments, GB | temporaries, GB | sent, GB | compile, s | CPU s |\n"
        "|---|---|---|---|---|---|---|\n"
    )
    rows = (
        "".join(
            row(name, result)
            for results in zip(*found.values(), strict=False)
            for name, result in zip(found, results, strict=False)
        )
        if found["MaxText"]
        else "".join(row("ours", result) for result in found["ours"])
    )
    kinds = sorted(
        {kind for results in found.values() for r in results for kind in r.get("sent", {})}
    )
    lines = [
        "# The 8x16B train step on 128 v5p chips, compiled\n",
        f"{platform.machine()}, {os.cpu_count()} cores shared with other work, Python "
        f"{platform.python_version()}, jax {jax.__version__}; MaxText 0.2.5 by itself. "
        "Mesh fsdp 16 x expert 8, rows of 4096 tokens, full remat, bfloat16 compute, float32 "
        "parameters and moments. By `benchmarks/pods/step_8x16b.py`; bytes are what one chip sends "
        "at least, loops times their trips (docs/planning.md says how they are counted). Compiled "
        f"over {hours:.0f} hours under changing loads: CPU seconds compare roughly, seconds do "
        "not.\n",
        head + rows,
        largest(found),
        ratios(found),
        "## What is sent, GB on a chip and step\n",
        "| | rows a chip | " + " | ".join(kinds) + " |\n|---|---|" + "---|" * len(kinds),
    ]
    for name, results in found.items():
        for result in results:
            if result["fits"]:
                sent = " | ".join(f"{result['sent'].get(kind, 0.0):.1f}" for kind in kinds)
                lines.append(f"| {name} | {result['batch']} | {sent} |")
    return "\n".join(lines) + "\n"


def row(name: str, result: dict[str, Any]) -> str:
    """Of the first table."""
    if not result["fits"]:
        times = f"{result['seconds']:.0f} | {result['cpu_seconds']:.0f}"
        return f"| {name} | {result['batch']} | does not fit | | | {times} |\n"
    return (
        f"| {name} | {result['batch']} | {result['arguments'] / 1e9:.2f} | "
        f"{result['temporaries'] / 1e9:.2f} | {sum(result['sent'].values()):.1f} | "
        f"{result['seconds']:.0f} | {result['cpu_seconds']:.0f} |\n"
    )


def largest(found: dict[str, list[dict[str, Any]]]) -> str:
    """The most rows, of those tried, that fit."""
    most = (
        f"{name} {max(result['batch'] for result in results if result['fits'])}"
        for name, results in found.items()
        if any(result["fits"] for result in results)
    )
    return f"Most rows on a chip, of those tried, that fit: {', '.join(most)}.\n"


def ratios(found: dict[str, list[dict[str, Any]]]) -> str:
    """Ours over the peer's, for batches that fit for both."""
    lines = []
    for ours, peer in zip(found["ours"], found["MaxText"], strict=False):
        if ours["fits"] and peer["fits"]:
            memory, traffic, cpu = (
                size(ours) / size(peer)
                for size in (
                    lambda r: r["arguments"] + r["temporaries"],
                    lambda r: sum(r["sent"].values()),
                    lambda r: r["cpu_seconds"],
                )
            )
            lines.append(
                f"Ours over MaxText's at {ours['batch']} rows a chip: memory {memory:.2f} (goal "
                f"0.8), traffic {traffic:.2f} (goal 0.6), CPU seconds to compile {cpu:.2f} (goal "
                "0.5).\n"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
