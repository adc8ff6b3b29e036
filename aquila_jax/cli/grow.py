"""`aquila grow`: a stage's first checkpoint from its parent, or a model from disk to disk."""

import argparse
from pathlib import Path
from typing import Any

from aquila_jax.cli.command import add_command, byte_bar, open_model
from aquila_jax.cli.gin_files import add_gin_flags, configured_growth, with_run
from aquila_jax.errors import UserError


def add_to(commands: Any) -> None:
    """Declare the command."""
    command = add_command(
        commands,
        "grow",
        _grow,
        "make a larger model, from disk to disk or for a run",
        example="aquila grow --from 7b --to 16b --gin_file=gin_configs/growth/isometric.gin \\\n"
        "    --gin.target.embed_dim=5120 --gin.target.num_heads=40",
    )
    add_gin_flags(command, is_required=False)
    command.add_argument(
        "--from",
        dest="source",
        metavar="DIR",
        help="Hugging Face directory or MODEL_DIR",
    )
    command.add_argument("--to", dest="target", metavar="DIR", help="the directory to make")
    command.add_argument("--dtype", help="float32, bfloat16, float16; the source's by default")


def _grow(arguments: argparse.Namespace, bindings: list[str]) -> int:
    if arguments.source is not None or arguments.target is not None:
        return _grow_files(arguments, bindings)
    if not arguments.gin_file:
        raise UserError("name a run by --gin_file=FILE, or directories by --from and --to")
    from aquila_jax.training import grow

    return with_run(arguments, bindings, grow)


def _grow_files(arguments: argparse.Namespace, bindings: list[str]) -> int:
    """Growth from disk to disk: `GROWTH` says how, `target.FIELD` what the model shall be."""
    from aquila_jax.interop.growing import grow_files

    if arguments.source is None or arguments.target is None:
        raise UserError("--from and --to go together: the directory to read, and the one to make")
    opened = open_model(Path(arguments.source))
    growth, target = configured_growth(
        arguments.gin_file, bindings, arguments.gin_search_paths, opened.config
    )
    _, certificate = growth.plan(opened.config, target)
    if arguments.dry_run:
        print(certificate)
        return 0
    with byte_bar(Path(arguments.target).name) as progress:
        certificate = grow_files(
            opened,
            arguments.target,
            target,
            growth,
            dtype=arguments.dtype,
            progress=progress,
        )
    print(f"{certificate.title}; {arguments.target}")
    return 0
