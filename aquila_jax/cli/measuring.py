"""The texts and tasks that `aquila eval` and `aquila compare` are given, and measuring on them."""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from aquila_jax.cli.command import batch_rows, load_model, open_layout
from aquila_jax.cli.parser import at_least
from aquila_jax.errors import UserError

if TYPE_CHECKING:
    from aquila_jax.evaluation.gate import Results
    from aquila_jax.evaluation.scoring import Scorer
    from aquila_jax.evaluation.tasks import Question
    from aquila_jax.evaluation.windows import TextLoss


def add_measure_flags(command: argparse.ArgumentParser) -> None:
    """The flags that say what to measure on, and how."""
    command.add_argument(
        "--text",
        action="append",
        default=[],
        metavar="[NAME=]FILE",
        help="a text; NAME: language or domain. Repeatable",
    )
    command.add_argument(
        "--task",
        action="append",
        default=[],
        metavar="[NAME=]FILE",
        help="JSONL: context, choices, answer. Repeatable",
    )
    command.add_argument(
        "--seqio",
        action="append",
        default=[],
        metavar="NAME[/SPLIT]",
        help="seqio task or mixture; its validation. Repeatable",
    )
    command.add_argument(
        "--seqio_module", default="", metavar="MODULE", help="is run, and registers the tasks"
    )
    command.add_argument(
        "--suite",
        metavar="NAME",
        help="packaged (tasks from a package) or paper (its table)",
    )
    command.add_argument(
        "--data", default="data/tasks", metavar="DIR", help="where a suite's data is (data/tasks)"
    )
    command.add_argument(
        "--ranking",
        default="ppl",
        metavar="NAME",
        help="of choices: ppl (default), sum, token or byte",
    )
    command.add_argument(
        "--max_length", type=at_least(2), metavar="N", help="tokens of a window; the context"
    )
    command.add_argument(
        "--stride", type=at_least(1), metavar="N", help="tokens scored in a window; half of it"
    )
    command.add_argument("--limit", type=at_least(1), metavar="N", help="the first N items of each")
    command.add_argument(
        "--batch_size", type=at_least(1), metavar="N", help="4, and what a mesh needs beyond"
    )


class Measures(NamedTuple):
    """What is to be measured, read whole before anything is: mistakes cost no hours.

    Attributes:
        texts: by name.
        examples: of seqio tasks by name: contexts, None without any, and texts after them.
        questions: of tasks by name.
    """

    texts: dict[str, str]
    examples: dict[str, tuple[list[str] | None, list[str]]]
    questions: dict[str, "list[Question]"]


def read_measures(arguments: argparse.Namespace) -> Measures:
    """Every text and task that the flags name; what a suite lacks is said on standard error.

    Raises:
        UserError: nothing is to be measured, a file is absent, empty or not valid, there is no
            such task, or no such ranking.
    """
    from aquila_jax.evaluation.tasks import check_ranking
    from aquila_jax.evaluation.windows import read_text

    if not (arguments.text or arguments.seqio or arguments.task or arguments.suite):
        raise UserError("nothing to measure on: give --text, --seqio, --task or --suite")
    check_ranking(arguments.ranking)
    texts = {name: read_text(path) for name, path in _named(arguments.text).items()}
    return Measures(texts, _examples(arguments), _questions(arguments))


def measure_texts(
    scorer: "Scorer", arguments: argparse.Namespace, measures: Measures
) -> dict[str, "TextLoss"]:
    """A model on every text, each read as a whole in sliding windows, and every seqio task."""
    from aquila_jax.evaluation.windows import text_losses, total_loss

    losses = text_losses(scorer, [*measures.texts.values()], stride=arguments.stride)
    found = dict(zip(measures.texts, losses, strict=True))
    for name, (contexts, parts) in measures.examples.items():
        found[name] = total_loss(
            text_losses(scorer, parts, stride=arguments.stride, contexts=contexts)
        )
    return found


def measure_questions(
    scorer: "Scorer", arguments: argparse.Namespace, measures: Measures
) -> dict[str, "Results"]:
    """A model on all tasks: accuracy."""
    from aquila_jax.evaluation.gate import Results
    from aquila_jax.evaluation.tasks import is_right

    results = {}
    for name, asked in measures.questions.items():
        right = [float(one) for one in is_right(scorer, asked, ranking=arguments.ranking)]
        results[name] = Results(right, [1.0] * len(right), higher_is_better=True)
    return results


def measure(
    scorer: "Scorer", arguments: argparse.Namespace, measures: Measures
) -> dict[str, "Results"]:
    """A model on all texts (bits per byte, piece by piece) and tasks (accuracy)."""
    from aquila_jax.evaluation.gate import Results
    from aquila_jax.evaluation.windows import pieces, text_losses

    items = {name: (None, pieces(text)[: arguments.limit]) for name, text in measures.texts.items()}
    results = {}
    for name, (contexts, parts) in {**items, **measures.examples}.items():
        losses = text_losses(scorer, parts, stride=arguments.stride, contexts=contexts)
        results[f"{name}, bits per byte"] = Results(
            [loss.bits_per_byte for loss in losses],
            [loss.num_bytes for loss in losses],
            higher_is_better=False,
        )
    for name, found in measure_questions(scorer, arguments, measures).items():
        results[f"{name}, accuracy"] = found
    return results


def _questions(arguments: argparse.Namespace) -> dict[str, "list[Question]"]:
    """Of all tasks, by name; what a suite lacks is said on standard error."""
    from aquila_jax.evaluation.suite import GENERATED, SUITES, AbsentData, read_suite_task
    from aquila_jax.evaluation.tasks import read_task

    found = {name: read_task(path) for name, path in _named(arguments.task).items()}
    if arguments.suite is not None and arguments.suite not in SUITES:
        raise UserError(f"no suite {arguments.suite!r}; there are {', '.join(SUITES)}")
    suite = SUITES.get(arguments.suite or "", {})
    missing = []
    for name, task in suite.items():
        if name in found:
            raise UserError(f"a --task has the name of the suite's {name}: give it another, NAME=")
        try:
            found[name] = read_suite_task(task, arguments.data)
        except AbsentData as error:
            missing.append(f"{name}: {error}")
    if suite and len(missing) == len(suite):
        raise UserError(f"no task of {arguments.suite} has its data; {missing[0]}")
    for line in missing:
        print(line, file=sys.stderr)
    if arguments.suite == "paper":
        for name, command in GENERATED.items():
            print(f"{name}: this task generates; do it by `{command}`", file=sys.stderr)
    return {name: questions[: arguments.limit] for name, questions in found.items()}


def open_scorer(path: str, arguments: argparse.Namespace) -> "Scorer":
    """A model of any format, made ready to be measured.

    Raises:
        UserError: it is absent or damaged, or the flags do not fit it.
    """
    from aquila_jax.evaluation.scoring import Scorer

    layout = open_layout(arguments.mesh)
    return Scorer(
        *load_model(path, tokenizer=arguments.tokenizer),
        dtype=arguments.dtype,
        batch_size=batch_rows(arguments.batch_size, 4, layout),
        max_length=arguments.max_length,
        layout=layout,
    )


def _examples(arguments: argparse.Namespace) -> dict[str, tuple[list[str] | None, list[str]]]:
    """Contexts and texts of the seqio tasks, by name."""
    if not arguments.seqio:
        return {}
    from aquila_jax.data.task_texts import read_task_texts

    found: dict[str, tuple[list[str] | None, list[str]]] = {}
    for given in arguments.seqio:
        name, _, split = given.partition("/")
        examples = read_task_texts(
            name, split or "validation", arguments.seqio_module, arguments.limit
        )
        contexts = [example.context for example in examples]
        found[given] = (contexts if any(contexts) else None, [e.text for e in examples])
    return found


def _named(given: list[str]) -> dict[str, Path]:
    """Files by name: `NAME=FILE`, or a file whose name is its own."""
    named: dict[str, Path] = {}
    for text in given:
        name, _, path = text.rpartition("=")
        name = name or Path(path).stem
        if name in named:
            raise UserError(f"two files are called {name!r}: give them names, NAME=FILE")
        named[name] = Path(path)
    return named
