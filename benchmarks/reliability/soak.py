"""Kill a small lineage again and again, and see that nothing of it shows in what it becomes.

    python benchmarks/reliability/soak.py [--kills 200]

Each round trains all three stages in processes that are killed by SIGKILL at random moments, 9 a
stage, and compares them with a lineage that was left alone, bit for bit: every loss, the ledgers,
the last parameters. Writes benchmarks/reliability/soak.md.
"""

import argparse
import importlib.metadata
import os
import platform
import random
import statistics
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from tests.reliability.chaos import STAGES, Toll, differences, run_killed, run_undisturbed  # noqa: E402
from tests.reliability.worker import CHECKPOINT_EVERY, STEPS, write_data  # noqa: E402

RESULT = Path(__file__).with_name("soak.md")
KILLS_PER_STAGE = 9


def main() -> None:
    """Run rounds until there were kills enough, then write the result."""
    parser = argparse.ArgumentParser(description="Kill a small lineage again and again.")
    parser.add_argument("--kills", type=int, default=200)
    wanted = parser.parse_args().kills
    tolls: list[Toll] = []
    found: list[str] = []
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as place:
        undisturbed = _new(Path(place) / "undisturbed")
        run_undisturbed(undisturbed)
        alone = time.monotonic() - began
        while sum(toll.total for toll in tolls) < wanted:
            seed = len(tolls)
            directory = _new(Path(place) / f"round-{seed}")
            tolls.append(run_killed(directory, KILLS_PER_STAGE, random.Random(seed)))
            found += [f"round {seed}: {line}" for line in differences(directory, undisturbed)]
            print(f"round {seed}: {tolls[-1].killed}, {found or 'no difference'}", flush=True)
            # After every round, so that a soak that is stopped has told of those it made.
            RESULT.write_text(_report(tolls, found, alone, time.monotonic() - began))
    sys.exit(bool(found))


def _new(directory: Path) -> Path:
    directory.mkdir()
    write_data(directory)
    return directory


def _report(tolls: list[Toll], found: list[str], alone: float, seconds: float) -> str:
    doing = sum((toll.killed for toll in tolls), Counter())
    starts = [start for toll in tolls for start in toll.seconds]
    packages = ("jax", "orbax-checkpoint", "grain")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages)
    machine = f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores"
    damaged = sum(toll.said.count("is damaged") for toll in tolls)
    lines = [
        "# Soak: killed at random moments",
        "",
        f"`python benchmarks/reliability/soak.py`: {len(tolls)} rounds of {len(STAGES)} stages of "
        f"{STEPS} steps, a checkpoint every {CHECKPOINT_EVERY}, 2 CPU devices a process, "
        f"{KILLS_PER_STAGE} SIGKILLs a stage. {machine}, Python {platform.python_version()}, "
        f"{versions}; other work ran on the machine.",
        "",
        "| killed while | processes |",
        "|---|---|",
        *(f"| {name} | {count} |" for name, count in sorted(doing.items())),
        f"| together | {sum(doing.values())} |",
        "",
        "Rounds that differ from the lineage left alone, in any loss, ledger or last parameter: "
        f"{'; '.join(found) or 'none'}. Checkpoints found damaged: {damaged}.",
        "",
        "From the start of a process to its first new step, after a kill (imports, compiled "
        "programs from a cache on disk, verification and restore of a checkpoint, first batch): "
        f"median {statistics.median(starts):.1f} s, longest {max(starts):.1f} s. The lineage left "
        f"alone took {alone:.0f} s with a cold cache, all rounds {seconds - alone:.0f} s.",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
