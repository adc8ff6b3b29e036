"""`aquila train`: one stage, from wherever its MODEL_DIR stands."""

import argparse
from typing import Any

from aquila_jax.cli.command import add_command
from aquila_jax.cli.gin_files import add_gin_flags, with_run


def add_to(commands: Any) -> None:
    """Declare the command."""
    command = add_command(
        commands,
        "train",
        _train,
        "train one stage, from wherever its MODEL_DIR stands",
        example="aquila train --gin_file=gin_configs/runs/demo/1_dense.gin --dry_run",
    )
    add_gin_flags(command, is_required=True)


def _train(arguments: argparse.Namespace, bindings: list[str]) -> int:
    from aquila_jax.training import train
    from aquila_jax.training.freed_memory import keep_freed_memory

    keep_freed_memory()
    return with_run(arguments, bindings, train)
