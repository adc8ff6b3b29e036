"""`aquila data prepare`: text tokenized and packed once."""

import argparse
import dataclasses
import re
from typing import TYPE_CHECKING, Any

from aquila_jax.cli.command import add_command, refuse_bindings
from aquila_jax.errors import UserError

if TYPE_CHECKING:
    from aquila_jax.data import TextFiles

# Settings of `TextData` that decide what a cache holds.
_SETTINGS = (
    ("text_dir", str, "folder the two text packages are unpacked in"),
    ("tokenizer_path", str, "*.model, trained where it is absent, or a pretrained model's"),
    ("vocab_size", int, "number of ids of the tokenizer"),
    ("sequence_length", int, "tokens of a row"),
)


def add_to(commands: Any) -> None:
    """Declare the command."""
    summary = "tokenize and pack text once, to be read by random access"
    command = commands.add_parser("data", help=summary, description=summary, allow_abbrev=False)
    actions = command.add_subparsers(title="commands", required=True, metavar="COMMAND")
    prepare = add_command(
        actions,
        "prepare",
        _prepare,
        summary,
        example="aquila data prepare --to data/cache --sequence_length 4096",
    )
    prepare.add_argument(
        "--to", dest="target", required=True, metavar="DIR", help="the directory to make"
    )
    prepare.add_argument(
        "--source",
        action="append",
        default=[],
        metavar="NAME=LANGUAGE:PATTERN",
        help="your own text, as web=en:/data/web/*.jsonl; may be repeated",
    )
    for name, kind, words in _SETTINGS:
        prepare.add_argument(f"--{name}", type=kind, help=words)


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
    return parts["name"], TextFiles(parts["pattern"], parts["language"])
