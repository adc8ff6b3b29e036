"""Prompts with answers and conversations, as token ids of which only the answers are learnt."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from aquila_jax.data.chat import ChatTemplate, check_messages
from aquila_jax.data.pretrained_tokenizer import Tokenizer
from aquila_jax.data.sources import is_validation
from aquila_jax.errors import UserError
from aquila_jax.files import json_lines

ASSISTANT = "assistant"


class Example(NamedTuple):
    """Token ids, and of each whether the model is to learn to say it."""

    ids: list[int]
    is_answer: list[bool]


def falls_in_validation(example: Example, fraction: float) -> bool:
    """Whether an example is of the validation split: decided by a digest of its ids."""
    return is_validation(repr(example.ids), fraction)


def read_examples(
    path: str | Path, tokenizer: Tokenizer, open_template: Callable[[], ChatTemplate]
) -> list[Example]:
    """The examples of a JSONL file.

    Args:
        path: its lines are objects with `prompt` and `answer`, two texts that are joined as they
            are and end a document; or with `messages`, a conversation, each object of which has a
            `role` and a `content`, and of which every message of the assistant is learnt.
        tokenizer: of the model.
        open_template: gives the model's chat template, asked for where there are conversations.

    Raises:
        UserError: there is no such file, it is empty, or a line is neither: the message names it.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"there is no file {path} with prompts or conversations")
    examples = []
    for place, values in json_lines(path):
        try:
            examples.append(_example(values, tokenizer, open_template))
        except ValueError as error:
            raise UserError(f"{place}: {error}") from error
    if not examples:
        raise UserError(f"{path} is empty")
    return examples


def _example(
    values: Any, tokenizer: Tokenizer, open_template: Callable[[], ChatTemplate]
) -> Example:
    if not isinstance(values, Mapping):
        raise UserError(f"an example is an object, not {type(values).__name__}")
    if "messages" in values:
        return encode_conversation(values["messages"], tokenizer, open_template())
    if missing := [name for name in ("prompt", "answer") if name not in values]:
        raise UserError(
            f"there is no {' and no '.join(missing)}: give prompt and answer, or messages"
        )
    prompt, answer = values["prompt"], values["answer"]
    if not isinstance(prompt, str) or not isinstance(answer, str) or not answer:
        raise UserError("prompt and answer must be texts, and the answer not empty")
    before, after = tokenizer.encode(prompt), [*tokenizer.encode(answer), tokenizer.eos_id]
    return Example([*before, *after], [False] * len(before) + [True] * len(after))


def encode_conversation(
    messages: Sequence[Any], tokenizer: Tokenizer, template: ChatTemplate
) -> Example:
    """A conversation as the template writes it; learnt is what the assistant says, to its end.

    What is before an answer is cut into tokens by itself, as it is when the model is asked.

    Raises:
        UserError: a message is not valid, none is the assistant's, or the template writes the
            beginning of a conversation otherwise once it goes on.
    """
    if not isinstance(messages, Sequence):
        raise UserError(f"messages must be a list, not {type(messages).__name__}")
    check_messages(messages)
    ids: list[int] = []
    is_answer: list[bool] = []
    for text, is_said in _parts(messages, template):
        part = tokenizer.encode(text)
        # Line ends that a template writes after the token that ends an answer are not learnt.
        ends = [place for place, i in enumerate(part, 1) if i == tokenizer.eos_id]
        learnt = (ends[-1] if ends else len(part)) if is_said else 0
        ids += part
        is_answer += [True] * learnt + [False] * (len(part) - learnt)
    if not any(is_answer):
        raise UserError("no message is the assistant's, so there is nothing to learn")
    return Example(ids, is_answer)


def _parts(messages: Sequence[Any], template: ChatTemplate) -> Iterator[tuple[str, bool]]:
    """The text in parts, and whether each is an answer."""
    done = ""
    for number, message in enumerate(messages):
        if message["role"] != ASSISTANT or number == 0:
            continue
        for end, is_said in ((number, False), (number + 1, True)):
            whole = template.render(messages[:end], add_generation_prompt=not is_said)
            if not whole.startswith(done):
                raise UserError(
                    "the chat template writes the beginning of a conversation otherwise once it "
                    f"goes on, after {done[-40:]!r}: give prompts and answers instead"
                )
            yield whole[len(done) :], is_said
            done = whole
