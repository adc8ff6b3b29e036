"""The configurations of `gin_configs/pods`, compiled for the slices that they are meant for.

    python benchmarks/pods/configs.py [NAME...] [--dir DIR]

Each is compiled in a process of its own; what it found stays in --dir and is not found again, so
an interrupted run goes on. Writes `benchmarks/results/pod_configs.json` and `.md`, the table of
`docs/pods.md`, and the numbers in every file's first comment. With names ("7b_v5p_128") only these
are compiled, and the others keep the numbers that they have.
"""

import argparse
import json
import platform
import sys
import time
from pathlib import Path
from typing import Any

import jax
from planned import (
    FILES,
    GUIDE,
    PAGE,
    RESULTS,
    UNREAD,
    page,
    settings_of,
    topology_of,
    with_block,
    with_summary,
)
from processes import kept

from aquila_jax.cli.gin_files import configured_run
from aquila_jax.files import write_text
from aquila_jax.planning import make_plan


def main() -> None:
    """Compile what is not compiled yet, and write numbers, page and headers."""
    flags = argparse.ArgumentParser(description=__doc__)
    flags.add_argument("names", nargs="*", metavar="NAME", help="of gin_configs/pods; all")
    flags.add_argument("--dir", type=Path, default=Path("/tmp/pod_configs"))
    flags.add_argument("--one", type=Path, help=argparse.SUPPRESS)
    arguments = flags.parse_args()
    if arguments.one:
        print(json.dumps(compiled(arguments.one)))
        return
    found = json.loads(RESULTS.read_text())["configs"] if RESULTS.exists() else {}
    for path in FILES:
        if path.stem in arguments.names or not arguments.names:
            command = [sys.executable, __file__, "--one", str(path)]
            found[path.stem] = kept(command, arguments.dir / f"{path.stem}.json")
    results = {
        "versions": {"jax": jax.__version__, "python": platform.python_version()},
        "configs": {path.stem: found[path.stem] for path in FILES if path.stem in found},
    }
    write_text(RESULTS, json.dumps(results, indent=1) + "\n")
    write_text(PAGE, page(results))
    write_text(GUIDE, with_summary(GUIDE.read_text(), results))
    for path in FILES:
        if path.stem in found:
            write_text(path, with_block(path.read_text(), found[path.stem]))


def compiled(path: Path) -> dict[str, Any]:
    """What the compiler and the roofline say of one file, sizes in bytes of one device.

    Raises:
        ValueError: its step does not fit.
    """
    run = configured_run([str(path)], (), unread=UNREAD)
    topology = topology_of(path)
    began = time.process_time()
    plan, _, _ = make_plan(run, topology)
    if plan.bound is None or plan.work is None:
        size = f"{plan.memory.total / 2**30:.1f} of {plan.capacity / 2**30:.1f} GiB"
        raise ValueError(f"{path.name} does not fit: it needs {size}")
    return {
        "topology": topology.name,
        "settings": settings_of(run),
        "memory": plan.memory.total,
        "arguments": plan.memory.arguments,
        "temporaries": plan.memory.temporaries,
        "capacity": plan.capacity,
        "seconds": dict(plan.bound.seconds),
        "binding": plan.bound.binding,
        "mfu": plan.bound.mfu,
        "model_flops": plan.work.model_flops,
        "ici_bytes": plan.work.ici_bytes,
        "tokens": plan.tokens,
        "tokens_per_day": plan.tokens_per_day,
        "run_tokens": plan.run_tokens,
        "compile_cpu_seconds": time.process_time() - began,
    }


if __name__ == "__main__":
    main()
