"""`aquila eval`: the validation loss of a run's newest checkpoint."""

import argparse
from typing import TYPE_CHECKING, Any

from aquila_jax.cli.command import add_command
from aquila_jax.cli.gin_files import add_gin_flags, with_run

if TYPE_CHECKING:
    from aquila_jax.training import TrainRun


def add_to(commands: Any) -> None:
    """Declare the command."""
    summary = "validation loss of the newest checkpoint, by language"
    add_gin_flags(add_command(commands, "eval", _evaluate, summary), is_required=True)


def _evaluate(arguments: argparse.Namespace, bindings: list[str]) -> int:
    from aquila_jax.training import evaluate

    def run_and_print(run: "TrainRun", *, operative_config: str) -> None:
        del operative_config  # evaluating changes nothing in MODEL_DIR
        for language, loss in evaluate(run).items():
            print(f"{language}\t{loss:.4f}")

    return with_run(arguments, bindings, run_and_print)
