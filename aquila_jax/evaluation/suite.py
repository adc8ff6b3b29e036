"""Named tasks, the paper's table among them, read as their data is published."""

import csv
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from aquila_jax.errors import UserError
from aquila_jax.evaluation.tasks import Question, make_question
from aquila_jax.files import json_lines

# Questions with their answers before one of MMLU.
_MMLU_SHOTS = 5


class AbsentData(UserError):
    """A task's data is not where it should be."""


class Task(NamedTuple):
    """Where a task's data is, and how it becomes questions.

    Attributes:
        file: the file, or the folder, under the data directory.
        read: its questions.
        source: where the data comes from, for whoever lacks it.
    """

    file: str
    read: Callable[[Path], Iterator[Question]]
    source: str


def read_suite_task(task: Task, directory: str | Path) -> list[Question]:
    """The questions of a task; what is no question of its form (as two equal choices) is left out.

    Raises:
        AbsentData: there is none.
        UserError: it is not of the task's form.
    """
    path = Path(directory) / task.file
    if not path.exists():
        raise AbsentData(f"the data is absent: put {path} there, from {task.source}")
    try:
        questions = list(task.read(path))
    except UserError:
        raise
    except (KeyError, IndexError, TypeError, ValueError, OSError) as error:
        raise UserError(f"{path} is not of the form of this task ({error!r})") from error
    if not questions:
        raise UserError(f"{path} has no questions")
    return questions


def _by_line(read: Callable[[Any], Question]) -> Callable[[Path], Iterator[Question]]:
    """A JSONL file, each line of which is one question."""

    def questions(path: Path) -> Iterator[Question]:
        for _, values in json_lines(path):
            try:
                yield read(values)
            except UserError:
                continue  # 5 of Social IQa's 2224 have two equal answers

    return questions


def _groups(text: str, pattern: str) -> list[str]:
    """The groups of a pattern that matches the whole text, without spaces around them."""
    found = re.fullmatch(pattern, text, flags=re.DOTALL)
    if found is None:
        raise ValueError(text[:80])
    return [group.strip() for group in found.groups()]


def _question(context: str, choices: Iterable[str], answer: str | int) -> Question:
    number = "ABCDE".index(answer) if isinstance(answer, str) else answer
    return make_question(context, list(choices), number)


def _parable(line: Any, *, moral: str, before: str) -> Question:
    """Which of five morals is a story's."""
    story, *choices = _groups(
        line["input"][1]["content"],
        r"(.*)\nWhich moral is this story[^\n]*\nA\)(.*) B\)(.*) C\)(.*) D\)(.*) E\)(.*)\n"
        r"The output should.*",
    )
    answer = line["ideal"][0].strip(" .")[-1]
    return _question(f"{story}\n{moral}", [before + choice for choice in choices], answer)


def _english_parable(line: Any) -> Question:
    return _parable(line, moral="The moral of this story:", before=" ")


def _chinese_parable(line: Any) -> Question:
    return _parable(line, moral="这个故事的寓意：", before="")


def _quartz(line: Any) -> Question:
    """How a sentence about cause and effect goes on, or is answered."""
    context, *choices = _groups(line["input"][-1]["content"], r"(.*)\n\n A:(.*)\n B:(.*)")
    return _question(context, (f" {choice}" for choice in choices), line["ideal"])


def _social_iqa(line: Any) -> Question:
    """What people want, feel or do."""
    text = line["input"][-1]["content"]
    context, *choices = _groups(text, r"(.*?) A:(.*); B:(.*); C:(.*?)\.?")
    return _question(context, (f" {choice}" for choice in choices), line["ideal"])


def _mmlu(line: Any) -> Question:
    """Four answers stand in the question, and their letters are ranked."""
    return _question(line["question"], (f" {letter}" for letter in "ABCD"), line["answer"])


def _mmlu_folder(path: Path) -> Iterator[Question]:
    """MMLU, as published: `test/SUBJECT_test.csv` after five answered ones of `dev`."""
    for file in sorted((path / "test").glob("*_test.csv")):
        subject = file.name.removesuffix("_test.csv")
        with (path / "dev" / f"{subject}_dev.csv").open(encoding="utf-8", newline="") as shots:
            rows = [*csv.reader(shots)][:_MMLU_SHOTS]
        answered = "".join(f"{_mmlu_text(row)} {row[5]}\n\n" for row in rows)
        about = subject.replace("_", " ")
        head = f"The following are multiple choice questions (with answers) about {about}.\n\n"
        with file.open(encoding="utf-8", newline="") as test:
            for row in csv.reader(test):
                context = f"{head}{answered}{_mmlu_text(row)}"
                yield _question(context, (f" {letter}" for letter in "ABCD"), row[5])


def _mmlu_text(row: list[str]) -> str:
    options = "".join(f"{letter}. {row[i]}\n" for i, letter in enumerate("ABCD", start=1))
    return f"{row[0].strip()}\n{options}Answer:"


def _arc(line: Any) -> Question:
    """AI2's ARC, as published: `question` with `stem` and `choices`, and `answerKey`."""
    labels = [choice["label"] for choice in line["question"]["choices"]]
    texts = (f" {choice['text']}" for choice in line["question"]["choices"])
    context = f"Question: {line['question']['stem']}\nAnswer:"
    return _question(context, texts, labels.index(line["answerKey"]))


def _hellaswag(line: Any) -> Question:
    """HellaSwag, as published: `ctx`, `endings` and `label`."""
    return _question(line["ctx"], (f" {text}" for text in line["endings"]), int(line["label"]))


def _piqa(path: Path) -> Iterator[Question]:
    """PIQA, as published: `valid.jsonl` with `goal`, `sol1`, `sol2`, and `valid-labels.lst`."""
    lines = [line for _, line in json_lines(path / "valid.jsonl")]
    labels = (path / "valid-labels.lst").read_text(encoding="utf-8").split()
    for line, label in zip(lines, labels, strict=True):
        context = f"Question: {line['goal']}\nAnswer:"
        yield _question(context, (f" {line['sol1']}", f" {line['sol2']}"), int(label))


def _winograd(line: Any) -> Question:
    """A Winograd schema: `sentence` with a blank `_`, `option1`, `option2` and `answer` 1 or 2."""
    before, _, after = line["sentence"].partition("_")
    options = (f"{before}{line[name]}{after}" for name in ("option1", "option2"))
    # Whole sentences differ in the middle, so nothing is left for a context.
    return _question("", options, int(line["answer"]) - 1)


_EVALS = "the package evals==3.0.1.post1: run `make data/tasks/installed`"
_REGISTRY = "evals/registry/data"
_ARC = "ARC-V1-Feb2018 of allenai.org"


def _in_package(file: str, read: Callable[[Any], Question]) -> Task:
    return Task(f"{_REGISTRY}/{file}", _by_line(read), _EVALS)


_PARABLES = "parable-to-moral-match/parable-to-moral-match"
_MMLU = "sandbagging/samples-all-large.jsonl"

# Tasks by suite and name. "packaged" comes in a package; "paper" is what the paper's table
# (arXiv 2408.06567) ranks, from its publishers' files.
SUITES: Mapping[str, Mapping[str, Task]] = MappingProxyType(
    {
        "packaged": {
            "parable-en": _in_package(f"{_PARABLES}-en.jsonl", _english_parable),
            "parable-zh": _in_package(f"{_PARABLES}-zh.jsonl", _chinese_parable),
            "quartz": _in_package("quartz/samples.jsonl", _quartz),
            "socialiqa": _in_package("theory_of_mind/socialiqa/test.jsonl", _social_iqa),
            "MMLU-subset": _in_package(_MMLU, _mmlu),
        },
        "paper": {
            "ARC-c-ppl": Task("ARC-Challenge-Test.jsonl", _by_line(_arc), _ARC),
            "ARC-e-ppl": Task("ARC-Easy-Test.jsonl", _by_line(_arc), _ARC),
            "HellaSwag-ppl": Task(
                "hellaswag_val.jsonl", _by_line(_hellaswag), "rowanz/hellaswag of github.com"
            ),
            "MMLU-ppl": Task("mmlu", _mmlu_folder, "hendrycks/test of github.com"),
            "Winograd-ppl": Task(
                "winograd.jsonl", _by_line(_winograd), "the Winograd schemas, as WinoGrande's"
            ),
            "PIQA-ppl": Task("piqa", _piqa, "yonatanbisk.com/piqa"),
        },
    }
)
# What the paper's table generates, and the command that does it here.
GENERATED: Mapping[str, str] = MappingProxyType(
    {
        "GSM8K-gen": "aquila lm_eval --tasks gsm8k",
        "HumanEval-gen": "aquila humaneval",
        "MATH-gen": "aquila lm_eval --tasks hendrycks_math",
        "MBPP-gen": "aquila lm_eval --tasks mbpp",
        "DROP-gen": "aquila lm_eval --tasks drop",
        "BBH-gen": "aquila lm_eval --tasks bbh",
        "NQ-gen": "aquila lm_eval --tasks nq_open",
    }
)
