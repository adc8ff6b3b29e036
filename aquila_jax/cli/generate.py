"""`aquila generate` and `aquila chat`: text that follows a prompt, shown as it comes."""

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aquila_jax.cli.command import (
    add_command,
    add_model_flags,
    load_model,
    open_layout,
    refuse_bindings,
)
from aquila_jax.cli.parser import at_least
from aquila_jax.errors import UserError

if TYPE_CHECKING:
    from aquila_jax.evaluation.generation import Generator

_LEAVE = "/exit"


def add_to(commands: Any) -> None:
    """Declare both commands."""
    generate = add_command(
        commands,
        "generate",
        _generate,
        "continue a prompt",
        example='aquila generate models/smollm2 --prompt "The capital of France is"',
    )
    generate.add_argument(
        "--prompt", metavar="TEXT", help="what to continue; standard input by default"
    )
    chat = add_command(
        commands, "chat", _chat, "talk to a model", example="aquila chat models/smollm2"
    )
    chat.add_argument("--system", metavar="TEXT", help="a message before the conversation")
    for command in (generate, chat):
        add_model_flags(command)
        _add_sampling_flags(command)


def _add_sampling_flags(command: argparse.ArgumentParser) -> None:
    command.add_argument("--max_new_tokens", type=at_least(1), default=256, metavar="N", help="256")
    command.add_argument("--temperature", type=float, default=0.0, metavar="X", help="0, greedy")
    command.add_argument(
        "--top_k", type=at_least(0), default=0, metavar="K", help="of the K likeliest; 0 is all"
    )
    command.add_argument(
        "--top_p", type=float, default=1.0, metavar="P", help="of the likeliest with this sum; 1"
    )
    command.add_argument(
        "--seed", type=at_least(0), default=0, metavar="N", help="of what is drawn; 0"
    )
    command.add_argument(
        "--stop",
        action="append",
        default=[],
        metavar="TEXT",
        help="ends the answer. Repeatable",
    )


def _open(arguments: argparse.Namespace) -> tuple["Generator", dict[str, Any]]:
    from aquila_jax.evaluation.generation import Generator
    from aquila_jax.evaluation.sampling import Sampling

    options = {
        "max_new_tokens": arguments.max_new_tokens,
        "stops": arguments.stop,
        "sampling": Sampling(
            arguments.temperature, arguments.top_k, arguments.top_p, arguments.seed
        ),
    }
    model = load_model(arguments.model, tokenizer=arguments.tokenizer)
    layout = open_layout(arguments.mesh)
    # One prompt at a time, which every part of the mesh that batches would divide over reads.
    rows = 1 if layout is None else layout.batch_shards
    return Generator(*model, dtype=arguments.dtype, batch_size=rows, layout=layout), options


def _show(pieces: Iterable[str]) -> str:
    """Write pieces of a text as they come, and give the whole."""
    text = ""
    for piece in pieces:
        print(piece, end="", flush=True)
        text += piece
    print()
    return text


def _generate(arguments: argparse.Namespace, bindings: list[str]) -> int:
    refuse_bindings("generate", bindings)
    generator, options = _open(arguments)
    prompt = sys.stdin.read() if arguments.prompt is None else arguments.prompt
    _show(generator.stream(prompt, **options))
    return 0


def _chat(arguments: argparse.Namespace, bindings: list[str]) -> int:
    refuse_bindings("chat", bindings)
    from aquila_jax.data.chat import open_chat_template

    template = open_chat_template(Path(arguments.tokenizer or arguments.model))
    generator, options = _open(arguments)
    messages = [{"role": "system", "content": arguments.system}] if arguments.system else []
    if sys.stdin.isatty():
        print(f"{_LEAVE} or the end of input ends the conversation", file=sys.stderr)
    while (said := _next_line()) != _LEAVE:
        if not said.strip():
            continue
        asked = [*messages, {"role": "user", "content": said}]
        try:
            answer = _show(generator.stream(template.render(asked), **options))
        except UserError as error:
            # The conversation so far is worth more than the message that did not fit.
            print(f"error: {error}", file=sys.stderr)
            continue
        messages = [*asked, {"role": "assistant", "content": answer}]
    return 0


def _next_line() -> str:
    try:
        return input("> " if sys.stdin.isatty() else "")
    except EOFError:
        return _LEAVE
