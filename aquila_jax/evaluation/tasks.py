"""Multiple choice: tasks in JSONL files, and how models do on them."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from aquila_jax.errors import UserError
from aquila_jax.evaluation.scoring import Score, Scorer
from aquila_jax.files import json_lines

# How choices are ranked. "ppl" is OpenCompass's: the sum over context and choice together, all but
# the first token, divided by the number of all tokens with the first; the others are sums over the
# choice's tokens, as they are, by its tokens or its bytes.
RANKINGS = ("ppl", "sum", "token", "byte")


@dataclasses.dataclass(frozen=True)
class Question:
    """One question.

    Attributes:
        context: what is before a choice.
        choices: texts that may follow; at least two, all different.
        answer: the number of the right one, from 0.
    """

    context: str
    choices: tuple[str, ...]
    answer: int


def read_task(path: str | Path) -> list[Question]:
    """The questions of a JSONL file: objects with `context`, `choices` and `answer`.

    Args:
        path: the file. `answer` is a number from 0, or the right choice's text.

    Raises:
        UserError: there is no such file, or a line has no question: the message names the line.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"the data of a task is absent: there is no file {path}")
    questions = []
    for place, values in json_lines(path):
        try:
            questions.append(_question(values))
        except UserError as error:
            raise UserError(f"{place}: {error}") from error
    if not questions:
        raise UserError(f"{path} has no questions")
    return questions


def _question(values: Any) -> Question:
    if not isinstance(values, Mapping):
        raise UserError(f"a question is an object, not {type(values).__name__}")
    if missing := [name for name in ("context", "choices", "answer") if name not in values]:
        raise UserError(f"the question has no {', '.join(missing)}")
    return make_question(values["context"], values["choices"], values["answer"])


def make_question(context: Any, choices: Any, answer: Any) -> Question:
    """A question from values as a file gives them; see `read_task`.

    Raises:
        UserError: they are no question.
    """
    if not isinstance(context, str):
        raise UserError(f"context must be a text, not {context!r}")
    if not isinstance(choices, list) or not all(isinstance(c, str) and c for c in choices):
        raise UserError("choices must be a list of texts that are not empty")
    if len(choices) < 2 or len(set(choices)) < len(choices):
        raise UserError(f"choices must be two or more different texts, not {choices}")
    if isinstance(answer, str) and answer in choices:
        answer = choices.index(answer)
    if type(answer) is not int or not 0 <= answer < len(choices):
        raise UserError(f"answer must be one of the choices or its number from 0, not {answer!r}")
    return Question(context, tuple(choices), answer)


def check_ranking(ranking: str) -> None:
    """It is one of `RANKINGS`.

    Raises:
        UserError: it is not.
    """
    if ranking not in RANKINGS:
        raise UserError(f"no ranking {ranking!r}; there are {', '.join(RANKINGS)}")


def is_right(scorer: Scorer, questions: Sequence[Question], *, ranking: str = "ppl") -> list[bool]:
    """Whether a model ranks the right choice first, question by question.

    Args:
        scorer: the model.
        questions: what it is asked.
        ranking: one of `RANKINGS`. Of equal choices the first counts.

    Raises:
        UserError: the ranking is unknown, or a choice is longer than the model reads.
    """
    check_ranking(ranking)
    pairs = [
        scorer.encode_pair(question.context, choice)
        for question in questions
        for choice in question.choices
    ]
    if ranking == "ppl":
        pairs = [_whole(pair, scorer) for pair in pairs]
    scores = iter(scorer.score(pairs))
    return [_best(question.choices, scores, ranking) == question.answer for question in questions]


def _whole(
    pair: tuple[Sequence[int], Sequence[int]], scorer: Scorer
) -> tuple[list[int], list[int]]:
    """The first token of the text that both make, and the rest; a text of one follows a start.

    What stands for an empty context is no part of the text.
    """
    context, choice = pair
    text = [*([] if list(context) == [scorer.start_id] else context), *choice]
    text = text[-(scorer.max_length + 1) :]
    return (text[:1], text[1:]) if len(text) > 1 else ([scorer.start_id], text)


def _best(choices: Sequence[str], scores: Iterator[Score], ranking: str) -> int:
    values = []
    for choice in choices:
        score = next(scores)
        counts = {"sum": 1, "byte": len(choice.encode()), "ppl": score.num_tokens + 1}
        count = counts.get(ranking, score.num_tokens)
        values.append(score.log_likelihood / count)
    return max(range(len(values)), key=values.__getitem__)
