"""Growth 7B -> 16B -> 8x16B compiled for 128 v5p chips: how much of any leaf stands on a chip.

    python benchmarks/pods/growth_on_pod.py [--out DIR]

Both growths on the mesh of the 8x16B step, fsdp 16 x expert 8. For every growth: HBM on a chip,
what is sent, and the largest array of the scheduled program beside the largest leaf: an array as
large as a leaf would be that leaf, whole on a chip. Writes growth_on_pod.md.
"""

import argparse
import math
import platform
import re
import time
from pathlib import Path

import jax
from planned import UNREAD

from aquila_jax import axes
from aquila_jax.cli.gin_files import configured_run
from aquila_jax.files import write_text
from aquila_jax.planning import Plan, make_plan, parse_topology
from aquila_jax.training import TrainRun

RUNS = (
    ("7B -> 16B", "gin_configs/runs/scale_up.gin"),
    ("16B -> 8x16B", "gin_configs/runs/scale_out.gin"),
)
MESH = ("MeshShape.fsdp=16", "MeshShape.expert=8", "BATCH_SIZE=256")
_ARRAY = re.compile(r"\b(?:f32|bf16|s32|u32|s8|pred)\[([\d,]+)\]")


def main() -> None:
    """Compile both growths and write the page."""
    flags = argparse.ArgumentParser(description=__doc__)
    flags.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "results")
    arguments = flags.parse_args()
    topology = parse_topology("v5p:4x4x8")
    rows = []
    for name, gin_file in RUNS:
        run = configured_run([gin_file], MESH, unread=UNREAD)
        began = time.process_time()
        plan, _, outcome = make_plan(run, topology, "growth")
        text = outcome.executable.as_text() if outcome.executable is not None else ""
        rows.append(row(name, run, plan, text, time.process_time() - began))
    write_text(arguments.out / "growth_on_pod.md", page(rows))


def row(name: str, run: TrainRun, plan: Plan, text: str, cpu: float) -> str:
    """Of the table."""
    assert run.init_from_model is not None
    arrays = set(_ARRAY.findall(text))
    leaves, whole = [], []
    for config in (run.init_from_model, run.model):
        for path, parameter in axes.parameters(config).items():
            shape = parameter.shape(config)
            leaves.append(math.prod(shape))
            if axes.EMBED in parameter.axes and ",".join(map(str, shape)) in arrays:
                whole.append(path)
    largest = max(math.prod(map(int, shape.split(","))) for shape in arrays)
    sent = plan.work.ici_bytes / 1e9 if plan.work else 0.0
    return (
        f"| {name} | {plan.memory.arguments / 1e9:.2f} | {plan.memory.outputs / 1e9:.2f} | "
        f"{plan.memory.temporaries / 1e9:.2f} | {sent:.2f} | {largest / 1e6:.1f} | "
        f"{max(leaves) / 1e6:,.0f} | {', '.join(sorted(set(whole))) or 'none'} | {cpu:.0f} |"
    )


def page(rows: list[str]) -> str:
    """The whole of it."""
    return "\n".join(
        [
            "# Growth on 128 v5p chips, compiled\n",
            f"jax {jax.__version__}, Python {platform.python_version()}. Mesh fsdp 16 x expert 8, "
            "float32. By `benchmarks/pods/growth_on_pod.py`. GB are of one chip; elements are "
            "millions. Whole leaves: those of parent and child that the rules split (all "
            "but the biases) and of whose whole shape the program has an array on a chip.\n",
            "| | takes, GB | gives, GB | temporaries, GB | sent, GB | largest array | "
            "largest leaf | whole leaves | CPU s |",
            "|---|---|---|---|---|---|---|---|---|",
            *rows,
            "",
        ]
    )


if __name__ == "__main__":
    main()
