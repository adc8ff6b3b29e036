"""The command line: one module for each command, which says its flags and hands over.

    aquila train --gin_file=FILE [--gin_file=FILE ...] [--gin.NAME=VALUE ...] [--dry_run]
    aquila plan --gin_file=FILE --topology=v5p:4x4x8 [--slices=N] [--what=growth] [--search]
    aquila grow --from DIR --to DIR [--gin_file=GROWTH] [--gin.target.FIELD=VALUE ...]
    aquila eval MODEL [--text FILE ...] [--task FILE ...] [--suite NAME]
    aquila compare MODEL MODEL ... [--text FILE ...] [--task FILE ...]
    aquila lm_eval --model aquila --model_args pretrained=MODEL --tasks NAME
    aquila humaneval MODEL --out FILE [--run_code]
    aquila generate MODEL [--prompt TEXT]
    aquila chat MODEL
    aquila convert --from MODEL --to DIR [--to_checkpoint]
    aquila verify MODEL MODEL --text FILE [--with_transformers a|b|both]
    aquila data prepare --to DIR [--text_dir DIR] [--sequence_length N]
    aquila report MODEL_DIR ... --out DIR
    aquila completion bash|zsh|tcsh

A gin file describes one `TrainRun`; see `gin_configs/`. Exit codes: 0 done, 1 two models
differ (verify), 2 a mistake in what was asked for (one line says which), 75 another process of
the run was lost, 128 + n stopped by signal n after saving.
"""

import argparse
import logging
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from aquila_jax.cli import (
    compare,
    completion,
    convert,
    data,
    evaluate,
    generate,
    grow,
    harness,
    humaneval,
    plan,
    report,
    train,
    verify,
)
from aquila_jax.cli.command import look_for_no_absent_tpu
from aquila_jax.cli.parser import Parser
from aquila_jax.errors import UserError

# In the order in which `aquila --help` lists them. A command's module has `add_to(commands)`, and
# imports what costs time only when the command runs.
COMMANDS = (
    train,
    plan,
    grow,
    evaluate,
    compare,
    harness,
    humaneval,
    generate,
    convert,
    verify,
    data,
    report,
    completion,
)

_GIN_FLAG = "--gin."


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the console script `aquila`."""
    parser = make_parser()
    if not (sys.argv[1:] if argv is None else argv):
        parser.print_help()
        return 0
    arguments, rest = parser.parse_known_args(argv)
    bindings = [flag.removeprefix(_GIN_FLAG) for flag in rest if flag.startswith(_GIN_FLAG)]
    unknown = [flag for flag in rest if not flag.startswith(_GIN_FLAG)]
    if "passed_on" in arguments:
        arguments.passed_on = unknown
    elif unknown:
        arguments.parser.refuse_unknown(unknown)
    look_for_no_absent_tpu(os.environ, Path("/dev"))
    # Orbax tells of every file it writes, and of every task that fails with one; a run tells of its
    # checkpoints itself.
    for name in ("absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        return arguments.run_command(arguments, bindings)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        # Between steps the loop stops by itself; this is start-up, with nothing to save.
        print("interrupted; run the same command again to go on", file=sys.stderr)
        return 128 + signal.SIGINT


def make_parser() -> argparse.ArgumentParser:
    """The whole command line, every command's flags included."""
    parser = Parser(
        prog="aquila",
        description="Grow pretrained language models and keep training them. "
        "`aquila COMMAND --help` tells more.",
        epilog="example: aquila grow --from smollm2 --to larger --gin.target.num_layers=40",
    )
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.add_to(commands)
    # For what is made from all commands: a shell's completion.
    parser.set_defaults(command_line=parser)
    return parser
