import json
from typing import Any

import pytest

from aquila_jax.errors import UserError
from aquila_jax.evaluation.scoring import Score
from aquila_jax.evaluation.tasks import Question, is_right, read_task

from .letters import Letters

GOOD = {"context": "Q", "choices": [" A", " B"], "answer": 1}


def write(path, *lines):
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return path


def test_a_task_file_is_read_with_answers_by_number_or_text(tmp_path):
    file = write(tmp_path / "task.jsonl", GOOD, {**GOOD, "answer": " A"})
    assert read_task(file) == [Question("Q", (" A", " B"), 1), Question("Q", (" A", " B"), 0)]


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ({"context": "Q", "choices": [" A", " B"]}, "line 2: the question has no answer"),
        ({**GOOD, "choices": [" A", " A"]}, "line 2: choices must be two or more different"),
        ({**GOOD, "choices": [" A"]}, "two or more"),
        ({**GOOD, "choices": [" A", ""]}, "not empty"),
        ({**GOOD, "answer": 2}, "not 2"),
        ({**GOOD, "answer": True}, "not True"),
        ({**GOOD, "context": 3}, "context must be a text"),
        ([1], "an object, not list"),
    ],
)
def test_a_line_without_a_question_is_named(tmp_path, line, says):
    with pytest.raises(UserError, match=says):
        read_task(write(tmp_path / "task.jsonl", GOOD, line))


def test_absent_empty_and_damaged_files_are_said(tmp_path):
    with pytest.raises(UserError, match="absent: there is no file"):
        read_task(tmp_path / "task.jsonl")
    with pytest.raises(UserError, match="no questions"):
        read_task(write(tmp_path / "empty.jsonl"))
    (tmp_path / "damaged.jsonl").write_text("{")
    with pytest.raises(UserError, match=r"damaged.jsonl, line 1"):
        read_task(tmp_path / "damaged.jsonl")


class Priced:
    """A scorer whose log-likelihoods are minus a price for each token."""

    tokenizer, start_id, max_length = Letters(), 1, 100

    def encode_pair(self, context, continuation):
        return Letters().encode(context), Letters().encode(continuation)

    def score(self, pairs):
        return [Score(-float(sum(after)), False, len(after)) for _, after in pairs]


PRICED: Any = Priced()


@pytest.mark.parametrize(
    ("ranking", "best"),
    # Prices: "!" 3, "#" 5, "$" 6, "-" 15.
    [("sum", 0), ("token", 1), ("byte", 1), ("ppl", 2)],
)
def test_rankings_divide_by_what_they_say(ranking, best):
    choices = ("#", "!!", "$" * 16)
    questions = [Question("---", choices, answer) for answer in range(3)]
    right = is_right(PRICED, questions, ranking=ranking)
    assert right == [answer == best for answer in range(3)]


def test_the_first_token_of_a_text_is_counted_and_not_scored():
    # 10 / 3 and 6 / 2; without the first token 10 / 2 and 6 / 1, and the other would be best.
    question = Question("-", ("##", "$"), 1)
    assert is_right(PRICED, [question]) == [True]


def test_an_unknown_ranking_is_refused():
    with pytest.raises(UserError, match="no ranking 'best'"):
        is_right(PRICED, [], ranking="best")
