"""What the commands share: how one is declared, how it opens a model, how it shows progress."""

import argparse
import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aquila_jax.errors import UserError

if TYPE_CHECKING:
    from aquila_jax.config import ModelConfig

# A command takes its flags and the gin bindings, and gives the exit code.
RunCommand = Callable[[argparse.Namespace, list[str]], int]


def add_command(
    commands: Any, name: str, run_command: RunCommand, summary: str, *, example: str = ""
) -> argparse.ArgumentParser:
    """Declare one command; its flags are added to what this returns.

    Args:
        commands: what `ArgumentParser.add_subparsers` returned.
        name: the word after `aquila`.
        run_command: carries it out.
        summary: one line for `aquila --help` and the command's own.
        example: a whole command, shown below the flags.
    """
    command = commands.add_parser(name, help=summary, description=summary, allow_abbrev=False)
    command.set_defaults(run_command=run_command)
    if example:
        command.epilog = f"example: {example}"
    return command


def refuse_bindings(command: str, bindings: Sequence[str]) -> None:
    """For a command that reads no gin files.

    Raises:
        UserError: there are bindings.
    """
    if bindings:
        raise UserError(f"{command} takes no gin bindings, but got {', '.join(bindings)}")


def is_model_dir(path: Path) -> bool:
    """Whether a run has left its checkpoints here."""
    return (path / "checkpoints").is_dir()


def open_model(path: Path) -> Any:
    """A MODEL_DIR or a Hugging Face directory, to be read by slices."""
    if is_model_dir(path):
        from aquila_jax.training.leaves import SavedLeaves  # Orbax costs seconds

        return SavedLeaves(path)
    from aquila_jax.interop import Directory

    return Directory(path)


def num_parameters(config: "ModelConfig") -> str:
    """As people read it."""
    from aquila_jax import accounting

    return f"{accounting.num_parameters(config):,} parameters"


@contextlib.contextmanager
def byte_bar(name: str) -> Iterator[Callable[[int, int], None]]:
    """A bar in bytes where someone watches, silence elsewhere."""
    from tqdm import tqdm

    with tqdm(desc=name, unit="B", unit_scale=True, disable=not sys.stderr.isatty()) as bar:

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield show
