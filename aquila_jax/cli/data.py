"""`aquila data prepare`: text tokenized and packed once."""

import argparse
import dataclasses
import os
import re
from typing import TYPE_CHECKING, Any

from aquila_jax.cli.command import add_command, refuse_bindings
from aquila_jax.errors import UserError

if TYPE_CHECKING:
    from aquila_jax.data import TextFiles

_EXAMPLE = "aquila data prepare --to data/cache --sequence_length 4096"

# Settings of `TextData` that decide what a cache holds.
_SETTINGS = (
    ("text_dir", str, "where the demonstration's texts are"),
    ("tokenizer_path", str, "*.model (trained if absent), or a model's own"),
    ("vocab_size", int, "number of ids of the tokenizer"),
    ("sequence_length", int, "tokens of a row"),
)


def add_to(commands: Any) -> None:
    """Declare the command."""
    summary = "tokenize and pack text once, for long runs"
    command = commands.add_parser(
        "data", help=summary, description=f"{summary.capitalize()}.", epilog=f"example: {_EXAMPLE}"
    )
    actions = command.add_subparsers(title="commands", required=True, metavar="COMMAND")
    prepare = add_command(
        actions,
        "prepare",
        _prepare,
        summary,
        example=_EXAMPLE,
    )
    prepare.add_argument(
        "--to", dest="target", required=True, metavar="DIR", help="the directory to make"
    )
    prepare.add_argument(
        "--source",
        action="append",
        default=[],
        metavar="NAME=LANGUAGE:PATTERN",
        help="own text: web=en:/data/*.jsonl. Repeatable",
    )
    for name, kind, words in _SETTINGS:
        metavar = "N" if kind is int else "PATH"
        prepare.add_argument(f"--{name}", type=kind, metavar=metavar, help=words)


def _prepare(arguments: argparse.Namespace, bindings: list[str]) -> int:
    from aquila_jax.data import TextData, TokenCache, prepare_cache

    refuse_bindings("data prepare", bindings)
    given = {name: getattr(arguments, name) for name, _, _ in _SETTINGS}
    given["sources"] = tuple(map(_source, arguments.source)) or None
    data = dataclasses.replace(
        TextData(), **{name: value for name, value in given.items() if value is not None}
    )
    prepare_cache(data, arguments.target)
    cache = TokenCache(arguments.target, batch_size=1)
    print(f"{cache.epoch_rows:,} rows of {cache.sequence_length} tokens; {arguments.target}")
    return 0


def _source(said: str) -> tuple[str, "TextFiles"]:
    from aquila_jax.data import TextFiles

    parts = re.fullmatch(r"(?P<name>\w+)=(?P<language>[\w-]+):(?P<pattern>.+)", said)
    if parts is None:
        raise UserError(f"--source takes NAME=LANGUAGE:PATTERN, as web=en:/data/*.txt, not {said}")
    # As in a shell: from here, and not from where the demonstration's texts are.
    return parts["name"], TextFiles(os.path.abspath(parts["pattern"]), parts["language"])
