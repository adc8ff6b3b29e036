import json
from typing import Any

import pytest

from aquila_jax.data.chat import open_chat_template
from aquila_jax.data.conversations import encode_conversation, read_examples
from aquila_jax.data.pretrained_tokenizer import open_tokenizer
from aquila_jax.errors import UserError

TALK = [
    {"role": "system", "content": "BE KIND"},
    {"role": "user", "content": "HI"},
    {"role": "assistant", "content": "HELLO"},
    {"role": "user", "content": "BYE"},
    {"role": "assistant", "content": "TAKE CARE"},
]


def learnt(example, tokenizer):
    """The text that is learnt, its parts divided."""
    parts, before = [""], False
    for i, is_answer in zip(example.ids, example.is_answer, strict=True):
        if is_answer and not before:
            parts.append("")
        parts[-1] += tokenizer.decode([i]) if is_answer else ""
        before = is_answer
    return parts[1:]


def test_of_a_conversation_what_the_assistant_says_is_learnt(chatty):
    tokenizer, template = open_tokenizer(chatty), open_chat_template(chatty)
    example = encode_conversation(TALK, tokenizer, template)
    assert tokenizer.decode(example.ids) == template.render(TALK, add_generation_prompt=False)
    assert learnt(example, tokenizer) == ["HELLO<end>", "TAKE CARE<end>"]
    # The model is asked just what it has learnt to answer.
    asked = tokenizer.encode(template.render(TALK[:4]))
    assert example.ids[: len(asked)] == asked


def test_a_prompt_is_joined_to_its_answer_and_the_end(chatty, tmp_path):
    tokenizer = open_tokenizer(chatty)
    file = tmp_path / "file.jsonl"
    lines = [{"prompt": "ONE ", "answer": "TWO"}, {"messages": TALK[1:3]}]
    file.write_text("\n\n".join(map(json.dumps, lines)))
    plain, chat = read_examples(file, tokenizer, lambda: open_chat_template(chatty))
    assert tokenizer.decode(plain.ids) == "ONE TWO<end>"
    assert learnt(plain, tokenizer) == ["TWO<end>"]
    assert learnt(chat, tokenizer) == ["HELLO<end>"]


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ({"prompt": "A"}, "line 1: there is no answer: give prompt and answer, or messages"),
        ({"prompt": "A", "answer": ""}, "the answer not empty"),
        ([1], "an object, not list"),
        ({"messages": TALK[:2]}, "nothing to learn"),
        ({"messages": []}, "needs a message"),
        ({"messages": 3}, "must be a list"),
        ({"messages": [{"role": "king", "content": "A"}]}, "role, one of"),
    ],
)
def test_lines_that_are_no_example_are_named(chatty, tmp_path, line, says):
    file = tmp_path / "file.jsonl"
    file.write_text(json.dumps(line))
    with pytest.raises(UserError, match=says):
        read_examples(file, open_tokenizer(chatty), lambda: open_chat_template(chatty))


def test_absent_and_empty_files_are_said(chatty, tmp_path):
    tokenizer = open_tokenizer(chatty)
    with pytest.raises(UserError, match="there is no file"):
        read_examples(tmp_path / "none", tokenizer, lambda: open_chat_template(chatty))
    (tmp_path / "empty").write_text("\n")
    with pytest.raises(UserError, match="is empty"):
        read_examples(tmp_path / "empty", tokenizer, lambda: open_chat_template(chatty))


def test_a_template_that_changes_what_was_said_is_refused(chatty):
    class Moody:
        def render(self, messages, *, add_generation_prompt):
            return f"{len(messages)} of {messages}"

    moody: Any = Moody()
    with pytest.raises(UserError, match="writes the beginning of a conversation otherwise"):
        encode_conversation(TALK[1:3], open_tokenizer(chatty), moody)
