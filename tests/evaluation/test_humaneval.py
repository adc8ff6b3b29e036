import gzip
import json
import time
from pathlib import Path
from typing import Any

import pytest

from aquila_jax.errors import UserError
from aquila_jax.evaluation.humaneval import PROBLEMS_FILE, Problem, complete, passes, read_problems

PACKAGES = Path(__file__).parents[2] / "data" / "tasks"
DOUBLE = Problem("Double/0", "def double(x):\n", "def check(f):\n    assert f(2) == 4\n", "double")


@pytest.mark.parametrize("waits", ["while True: pass", "import time; time.sleep(99)"])
def test_what_does_not_end_is_ended(waits):
    start = time.monotonic()
    assert not passes(DOUBLE, f"    {waits}\n", seconds=1)
    assert time.monotonic() - start < 10


def test_files_are_written_in_a_folder_that_is_removed(tmp_path):
    completion = (
        "    import os\n    open('left', 'w').write('x')\n    return 4 * ('/tmp' in os.getcwd())\n"
    )
    assert passes(DOUBLE, completion)
    assert not Path("left").exists()


@pytest.mark.skipif(not PACKAGES.exists(), reason="run `make data/tasks/installed`")
def test_the_published_solutions_pass():
    problems = read_problems(PACKAGES)
    assert len(problems) == 164
    with gzip.open(PACKAGES / PROBLEMS_FILE, "rt") as lines:
        solutions = [json.loads(line)["canonical_solution"] for line in lines]
    for number in (0, 38, 77, 163):
        assert passes(problems[number], solutions[number])
        assert not passes(problems[number], "    return None\n")


class Typist:
    """A generator that says what it was asked."""

    def generate(self, prompts, *, max_new_tokens, stops):
        assert "\ndef" in stops
        return [type("Completion", (), {"text": f"{prompt}{max_new_tokens}"}) for prompt in prompts]


def test_prompts_are_continued_as_they_are():
    typist: Any = Typist()
    found = complete(typist, [DOUBLE], max_new_tokens=7)
    assert found == ["def double(x):\n7"]


def test_absent_and_damaged_problems_are_said(tmp_path):
    with pytest.raises(UserError, match="data of HumanEval is absent"):
        read_problems(tmp_path)
    path = tmp_path / PROBLEMS_FILE
    path.parent.mkdir(parents=True)
    path.write_bytes(gzip.compress(b"{}\n")[:-4])
    with pytest.raises(UserError, match="damaged"):
        read_problems(tmp_path)
