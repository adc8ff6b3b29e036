"""`aquila completion`: what a shell must read so that Tab completes commands, flags and files."""

import argparse
import importlib
from collections.abc import Iterator
from typing import Any

from aquila_jax.cli.command import add_command, refuse_bindings
from aquila_jax.errors import UserError

_SHELLS = ("bash", "zsh", "tcsh")
# What a flag's value is called where it is a path.
_PATHS = {"FILE", "[NAME=]FILE", "DIR", "MODEL_DIR", "MODEL", "PATH", "A", "B"}


def add_to(commands: Any) -> None:
    """Declare the command."""
    command = add_command(
        commands,
        "completion",
        _completion,
        "print a script that makes Tab complete commands and flags",
        example='eval "$(aquila completion bash)", in ~/.bashrc',
    )
    command.add_argument("shell", metavar="SHELL", choices=_SHELLS, help=", ".join(_SHELLS))


def _completion(arguments: argparse.Namespace, bindings: list[str]) -> int:
    refuse_bindings("completion", bindings)
    try:
        shtab: Any = importlib.import_module("shtab")
    except ImportError as error:
        raise UserError("completion needs shtab: pip install 'aquila-jax[completion]'") from error
    for action in _actions(arguments.command_line):
        if action.metavar in _PATHS:
            vars(action)["complete"] = shtab.FILE
    print(shtab.complete(arguments.command_line, arguments.shell))
    return 0


def _actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """Every argument of a parser and of its commands."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield from _actions(command)
        else:
            yield action
