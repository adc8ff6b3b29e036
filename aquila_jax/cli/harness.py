"""`aquila lm_eval`: lm-evaluation-harness's command line, with our models in it."""

import argparse
from typing import Any

from aquila_jax.cli.command import (
    add_command,
    batch_rows,
    load_model,
    open_layout,
    refuse_bindings,
)


def add_to(commands: Any) -> None:
    """Declare the command."""
    command = add_command(
        commands,
        "lm_eval",
        _lm_eval,
        "lm-evaluation-harness with our models; its own flags",
        example="aquila lm_eval --model aquila --model_args pretrained=models/smollm2 \\\n"
        "    --tasks arc_easy",
    )
    # Every flag is the harness's own; `main` leaves here what it does not know.
    command.set_defaults(passed_on=[])


def _lm_eval(arguments: argparse.Namespace, bindings: list[str]) -> int:
    refuse_bindings("lm_eval", bindings)
    from aquila_jax.evaluation.harness import run_command_line

    run_command_line(arguments.passed_on, _open_parts)
    return 0


def _open_parts(
    pretrained: str,
    tokenizer: str | None = None,
    dtype: str = "float32",
    batch_size: int | str = "auto",
    max_length: int | None = None,
    mesh: str | None = None,
) -> tuple[Any, ...]:
    """A model from `--model_args`: its scorer, and what opens generator and template."""
    from aquila_jax.data.chat import open_chat_template
    from aquila_jax.evaluation.generation import Generator
    from aquila_jax.evaluation.scoring import Scorer

    model = load_model(pretrained, tokenizer=tokenizer)
    layout = open_layout(mesh)
    rows = batch_rows(None if batch_size == "auto" else int(batch_size), 8, layout)
    scorer = Scorer(*model, dtype=dtype, batch_size=rows, max_length=max_length, layout=layout)

    def open_generator() -> Generator:
        return Generator(*model, dtype=dtype, batch_size=rows, layout=layout)

    return scorer, open_generator, lambda: open_chat_template(tokenizer or pretrained)
