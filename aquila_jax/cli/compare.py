"""`aquila compare`: what each stage gained or lost against the one before it."""

import argparse
from typing import Any

from aquila_jax.cli.command import add_command, add_model_flags, load_model, refuse_bindings
from aquila_jax.cli.measuring import add_measure_flags, measure
from aquila_jax.errors import UserError


def add_to(commands: Any) -> None:
    """Declare the command."""
    command = add_command(
        commands,
        "compare",
        _compare,
        "what each model gained or lost against the one before it, with a verdict for each task",
        example="aquila compare 7b 16b 8x16b --task parable=data/parable.jsonl --text en=news.txt",
    )
    command.add_argument("models", nargs="+", metavar="MODEL", help="two or more, oldest first")
    add_model_flags(command, positional=False)
    add_measure_flags(command)


def _compare(arguments: argparse.Namespace, bindings: list[str]) -> int:
    refuse_bindings("compare", bindings)
    from aquila_jax.evaluation.gate import compare

    if len(arguments.models) < 2:
        raise UserError("a comparison needs two models or more")
    results = []
    for model in arguments.models:
        # One model after the other, so that only one is in memory.
        results.append(measure(load_model(model, tokenizer=arguments.tokenizer), arguments))
    for number, differences in enumerate(compare(results)):
        before, after = arguments.models[number : number + 2]
        print(f"# {before} -> {after}")
        print("task\tbefore\tafter\tdifference\t95% interval\tverdict")
        for found in differences:
            print(
                f"{found.task}\t{found.first:.4f}\t{found.second:.4f}\t"
                f"{found.second - found.first:+.4f}\t[{found.low:+.4f}, {found.high:+.4f}]\t"
                f"{found.verdict}"
            )
    return 0
