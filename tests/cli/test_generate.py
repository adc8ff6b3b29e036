"""`aquila generate` and `aquila chat`."""

import io

import pytest


def test_generate_and_chat(monkeypatch, table, models):
    (row,) = table("generate", "one", "--prompt", "HI", "--max_new_tokens", "4")[:1]
    assert row[0]
    monkeypatch.setattr("sys.stdin", io.StringIO("HI\n\n/exit\nNOT READ\n"))
    assert table("chat", "one", "--max_new_tokens", "4")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["one", "--prompt", "A" * 40], "40 tokens leaves no room"),
        (["absent", "--prompt", "A"], "there is no model at 'absent'"),
        (["", "--prompt", "A"], "there is no model at ''"),
        (["text.txt", "--prompt", "A"], "text.txt is no model: name a GGUF file"),
        (["one", "--prompt", "A", "--tokenizer", "absent"], "no tokenizer at absent: name one"),
        (
            ["one", "--prompt", "A", "--temperature", "1", "--seed", f"{2**32}"],
            "seed must be a whole",
        ),
        (["one", "--prompt", "A", "--stop", ""], "stop strings must be a list of strings that"),
    ],
)
def test_mistakes_are_one_line(arguments, says, models, refused):
    assert says in refused("generate", *arguments)
