"""`aquila compare`: what each stage gained or lost against the one before it."""

import argparse
import itertools
from pathlib import Path
from typing import Any

from aquila_jax.cli.command import (
    add_command,
    add_model_flags,
    check_model,
    check_output,
    refuse_bindings,
)
from aquila_jax.cli.measuring import add_measure_flags, measure, open_scorer, read_measures
from aquila_jax.errors import UserError


def add_to(commands: Any) -> None:
    """Declare the command."""
    command = add_command(
        commands,
        "compare",
        _compare,
        "what each model gained or lost against the one before it",
        example="aquila compare 7b 16b 8x16b --suite packaged --text en=news.txt",
    )
    command.add_argument("models", nargs="+", metavar="MODEL", help="two or more, oldest first")
    add_model_flags(command, positional=False)
    command.add_argument("--out", metavar="FILE", help="write it as JSON, too, for aquila report")
    add_measure_flags(command)


def _compare(arguments: argparse.Namespace, bindings: list[str]) -> int:
    refuse_bindings("compare", bindings)
    from aquila_jax.evaluation.gate import compare
    from aquila_jax.files import write_json
    from aquila_jax.reports.verdicts import Comparison, TaskVerdict, to_json

    if len(arguments.models) < 2:
        raise UserError("a comparison needs two models or more")
    if arguments.out:
        check_output(Path(arguments.out))
    for model in arguments.models:
        check_model(model)
    measures = read_measures(arguments)
    results = []
    for model in arguments.models:
        # One model after the other, so that only one is in memory.
        results.append(measure(open_scorer(model, arguments), arguments, measures))
    found = [
        Comparison(
            before,
            after,
            tuple(
                TaskVerdict(one.task, one.first, one.second, one.low, one.high, one.verdict)
                for one in differences
            ),
        )
        for (before, after), differences in zip(
            itertools.pairwise(arguments.models), compare(results), strict=True
        )
    ]
    print("\n".join(comparison.text for comparison in found))
    if arguments.out:
        write_json(Path(arguments.out), to_json(found))
    return 0
