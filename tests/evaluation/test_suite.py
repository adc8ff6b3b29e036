import csv
import json
from pathlib import Path

import pytest

from aquila_jax.errors import UserError
from aquila_jax.evaluation.suite import GENERATED, SUITES, AbsentData, read_suite_task
from aquila_jax.evaluation.tasks import Question

PACKAGES = Path(__file__).parents[2] / "data" / "tasks"

# The paper's Table of results, row by row.
TABLE = {
    *("ARC-c-ppl", "ARC-e-ppl", "HellaSwag-ppl", "GSM8K-gen", "HumanEval-gen", "MMLU-ppl"),
    *("Winograd-ppl", "MATH-gen", "MBPP-gen", "DROP-gen", "BBH-gen", "NQ-gen", "PIQA-ppl"),
}


def write(path, *lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))


def write_rows(path, *rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        csv.writer(file).writerows(rows)


def test_every_row_of_the_papers_table_is_ranked_or_generated():
    assert {*SUITES["paper"], *GENERATED} == TABLE


@pytest.mark.skipif(not PACKAGES.exists(), reason="run `make data/tasks/installed`")
@pytest.mark.parametrize(
    ("name", "count", "num_choices"),
    [
        ("parable-en", 1632, 5),
        ("parable-zh", 1930, 5),
        ("quartz", 3860, 2),
        # Five of the 2224 have two equal answers.
        ("socialiqa", 2219, 3),
        ("MMLU-subset", 1000, 4),
    ],
)
def test_the_packages_give_all_their_questions(name, count, num_choices):
    questions = read_suite_task(SUITES["packaged"][name], PACKAGES)
    assert len(questions) == count
    assert {len(question.choices) for question in questions} == {num_choices}
    # Right answers stand in every place about equally often, so none can be guessed.
    places = [question.answer for question in questions]
    assert max(places.count(i) for i in range(num_choices)) < 1.2 * count / num_choices


def test_questions_of_packages_are_context_and_what_may_follow(tmp_path):
    chat = [{"role": "user", "content": "She ran. How is she?  A: tired; B: a cat; C: blue."}]
    write(
        tmp_path / SUITES["packaged"]["socialiqa"].file,
        {"input": chat, "ideal": "A"},
        {"input": [{"content": "Who? A: he; B: she; C: he."}], "ideal": "B"},
    )
    # Two of the second one's answers are equal: it is no question.
    assert read_suite_task(SUITES["packaged"]["socialiqa"], tmp_path) == [
        Question("She ran. How is she?", (" tired", " a cat", " blue"), 0)
    ]


def test_the_papers_tasks_are_read_as_they_are_published(tmp_path):
    arc = {
        "question": {
            "stem": "Why?",
            "choices": [{"text": "so", "label": "1"}, {"text": "thus", "label": "2"}],
        },
        "answerKey": "2",
    }
    write(tmp_path / "ARC-Easy-Test.jsonl", arc)
    write(
        tmp_path / "hellaswag_val.jsonl", {"ctx": "He", "endings": ["sat", "is", "a"], "label": 1}
    )
    write(tmp_path / "piqa" / "valid.jsonl", {"goal": "Cut", "sol1": "knife", "sol2": "spoon"})
    (tmp_path / "piqa" / "valid-labels.lst").write_text("0\n")
    sentence = {"sentence": "It, _, is.", "option1": "x", "option2": "y", "answer": "2"}
    write(tmp_path / "winograd.jsonl", sentence)
    write_rows(tmp_path / "mmlu" / "dev" / "big_law_dev.csv", *[["D?", *"wxyz", "C"]] * 6)
    write_rows(tmp_path / "mmlu" / "test" / "big_law_test.csv", ["Q?", *"stuv", "B"])
    paper = SUITES["paper"]
    found = {name: read_suite_task(paper[name], tmp_path) for name in paper if name != "ARC-c-ppl"}
    (mmlu,) = found.pop("MMLU-ppl")
    assert found == {
        "ARC-e-ppl": [Question("Question: Why?\nAnswer:", (" so", " thus"), 1)],
        "HellaSwag-ppl": [Question("He", (" sat", " is", " a"), 1)],
        "PIQA-ppl": [Question("Question: Cut\nAnswer:", (" knife", " spoon"), 0)],
        "Winograd-ppl": [Question("", ("It, x, is.", "It, y, is."), 1)],
    }
    shot = "D?\nA. w\nB. x\nC. y\nD. z\nAnswer: C\n\n"
    assert mmlu.context == (
        "The following are multiple choice questions (with answers) about big law.\n\n"
        f"{shot * 5}Q?\nA. s\nB. t\nC. u\nD. v\nAnswer:"
    )
    assert (mmlu.choices, mmlu.answer) == ((" A", " B", " C", " D"), 1)


def test_absent_and_damaged_data_is_said(tmp_path):
    task = SUITES["paper"]["ARC-e-ppl"]
    with pytest.raises(AbsentData, match=r"absent: put .*ARC-Easy-Test.jsonl there, from ARC-V1"):
        read_suite_task(task, tmp_path)
    write(tmp_path / task.file, {"question": "Why?"})
    with pytest.raises(UserError, match="not of the form"):
        read_suite_task(task, tmp_path)
    write(tmp_path / task.file)
    with pytest.raises(UserError, match="no questions"):
        read_suite_task(task, tmp_path)
