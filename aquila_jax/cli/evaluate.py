"""`aquila eval`: a model on texts and tasks, or a run's newest checkpoint on its own validation."""

import argparse
from typing import TYPE_CHECKING, Any

from aquila_jax.cli.command import add_command, add_model_flags, refuse_bindings
from aquila_jax.cli.gin_files import add_gin_flags, with_run
from aquila_jax.cli.measuring import (
    add_measure_flags,
    measure_questions,
    measure_texts,
    open_scorer,
    read_measures,
)
from aquila_jax.errors import UserError

if TYPE_CHECKING:
    from aquila_jax.training import TrainRun


def add_to(commands: Any) -> None:
    """Declare the command."""
    command = add_command(
        commands,
        "eval",
        _evaluate,
        "measure a model on texts and tasks, or a run",
        example="aquila eval smollm2 --text en=news.txt --suite packaged",
    )
    command.add_argument(
        "model",
        nargs="?",
        metavar="MODEL",
        help="Hugging Face directory, GGUF file or MODEL_DIR",
    )
    add_model_flags(command, positional=False)
    add_measure_flags(command)
    add_gin_flags(command, is_required=False)


def _evaluate(arguments: argparse.Namespace, bindings: list[str]) -> int:
    if (arguments.model is None) == (not arguments.gin_file):
        raise UserError("eval takes a MODEL, or a --gin_file that describes a run: give one")
    if arguments.model is None:
        return _evaluate_run(arguments, bindings)
    refuse_bindings("eval of a MODEL", bindings)
    measures = read_measures(arguments)
    scorer = open_scorer(arguments.model, arguments)
    if measures.texts or measures.examples:
        losses = measure_texts(scorer, arguments, measures)
        print("text\ttokens\tbytes\tnats per token\tperplexity\tbits per byte")
        for name, loss in losses.items():
            print(
                f"{name}\t{loss.num_tokens}\t{loss.num_bytes}\t{loss.per_token:.4f}\t"
                f"{loss.perplexity:.3f}\t{loss.bits_per_byte:.4f}"
            )
    if measures.questions:
        results = measure_questions(scorer, arguments, measures)
        print("task\tquestions\taccuracy")
        for name, found in results.items():
            print(f"{name}\t{len(found.values)}\t{found.mean:.4f}")
    return 0


def _evaluate_run(arguments: argparse.Namespace, bindings: list[str]) -> int:
    from aquila_jax.training import evaluate

    def run_and_print(run: "TrainRun", *, operative_config: str) -> None:
        del operative_config  # evaluating changes nothing in MODEL_DIR
        for language, loss in evaluate(run).items():
            print(f"{language}\t{loss:.4f}")

    return with_run(arguments, bindings, run_and_print)
