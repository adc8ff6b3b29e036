"""`aquila plan`: what a run needs of a slice of TPUs, and how fast it can be, without one."""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aquila_jax.cli.command import add_command, check_output
from aquila_jax.cli.gin_files import add_gin_flags, configured_run
from aquila_jax.cli.parser import at_least
from aquila_jax.errors import UserError

if TYPE_CHECKING:
    from aquila_jax.planning import Plan, Topology
    from aquila_jax.training import TrainRun

# What a run's files require and a plan does not read.
_UNREAD = {"MODEL_DIR": "planned", "INIT_FROM": "parent"}
_SHOWN = 5


def add_to(commands: Any) -> None:
    """Declare the command."""
    command = add_command(
        commands,
        "plan",
        _plan,
        "what a run needs of TPUs that are not here: memory, traffic, time",
        example="aquila plan --gin_file=gin_configs/runs/scale_out.gin --topology=v5p:4x4x8",
    )
    add_gin_flags(command, is_required=True)
    command.add_argument(
        "--topology",
        required=True,
        metavar="CHIP:AxBxC",
        help="a slice: v5p:4x4x8, v5e:16x16, tpu7x:4x4x4",
    )
    command.add_argument(
        "--slices", type=at_least(1), default=1, metavar="N", help="how many of them; 1 by default"
    )
    command.add_argument(
        "--what",
        choices=("train", "growth", "decode"),
        default="train",
        metavar="PROGRAM",
        help="train (default), growth, or decode: one token",
    )
    command.add_argument(
        "--search",
        nargs="?",
        type=at_least(1),
        const=12,
        metavar="N",
        help="try N (12) meshes, remats, batches at most",
    )
    command.add_argument("--json", action="store_true", help="print JSON, sizes in bytes")
    command.add_argument(
        "--save",
        type=Path,
        metavar="FILE",
        help="keep the step, for TrainRun.compiled_step",
    )


def _plan(arguments: argparse.Namespace, bindings: list[str]) -> int:
    # Nothing here computes, so nothing needs the accelerator of this machine.
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    from aquila_jax.planning import parse_topology

    topology = parse_topology(arguments.topology, arguments.slices)
    if arguments.save and (arguments.what != "train" or arguments.search):
        raise UserError("--save keeps a train step: leave --what and --search out")
    if arguments.save:
        check_output(arguments.save)
    run = configured_run(arguments.gin_file, bindings, arguments.gin_search_paths, unread=_UNREAD)
    if arguments.dry_run:
        print(f"{run.name}: {topology}")
        return 0
    if arguments.search is not None:
        return _search(run, topology, arguments)
    return _one(run, topology, arguments)


def _one(run: "TrainRun", topology: "Topology", arguments: argparse.Namespace) -> int:
    from aquila_jax.planning import make_plan, page
    from aquila_jax.training.saved_step import save_step

    if sys.stderr.isatty():
        print(f"compiling {run.name} for {topology}: up to minutes", file=sys.stderr)
    plan, program, outcome = make_plan(run, topology, arguments.what)
    print(json.dumps(plan.to_dict(), indent=1) if arguments.json else page(plan))
    if arguments.save:
        if outcome.executable is None:
            raise UserError(f"{arguments.save} was not written: the step does not fit")
        devices = list(program.layout.mesh.devices.flat)
        save_step(arguments.save, outcome.lowered, outcome.executable, devices)
        print(f"kept; --gin.TrainRun.compiled_step=\"'{arguments.save}'\"", file=sys.stderr)
    return 0


def _search(run: "TrainRun", topology: "Topology", arguments: argparse.Namespace) -> int:
    from aquila_jax.planning import search
    from aquila_jax.planning.page import verdict

    if arguments.what != "train":
        raise UserError("--search tries train steps: leave --what out")

    def told(plan: "Plan") -> None:
        print(f"{_settings(plan)}: {verdict(plan)}", file=sys.stderr)

    plans = search(run, topology, arguments.search, told)
    if arguments.json:
        print(json.dumps([plan.to_dict() for plan in plans[:_SHOWN]], indent=1))
        return 0
    for line in _ranking(plans[:_SHOWN]):
        print(line)
    return 0


def _settings(plan: "Plan") -> str:
    mesh = ", ".join(f"{name} {size}" for name, size in plan.mesh.items() if size > 1)
    parts = plan.settings["micro_batches"]
    batch = f"batch {plan.settings['batch_size']}" + (f" in {parts} parts" if parts > 1 else "")
    return f"{mesh}; {batch}; remat {plan.settings['remat']}"


def _ranking(plans: Sequence["Plan"]) -> list[str]:
    from aquila_jax.planning.page import table

    rows = []
    for plan in plans:
        assert plan.bound is not None
        rows.append(
            (
                _settings(plan),
                plan.bound.binding,
                f"{plan.memory.total / 2**30:.2f}",
                f"{plan.bound.mfu:.1%}",
                f"{plan.tokens_per_day / 1e9:.4g}",
            )
        )
    return [*table(("settings", "bound by", "GiB", "MFU <=", "B tokens/day <="), rows)]
