"""The command line as a person meets it."""

import argparse
import re
import subprocess
import sys

import pytest

from aquila_jax import cli
from aquila_jax.cli.parser import Parser


def commands(parser, words=()):
    """Every parser with the words that lead to it."""
    yield words, parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for word, command in action.choices.items():
                yield from commands(command, (*words, word))


COMMANDS = [words for words, _ in commands(cli.make_parser())]


def shown(capsys, *arguments):
    with pytest.raises(SystemExit) as stop:
        cli.main([*arguments, "--help"])
    assert stop.value.code == 0
    return capsys.readouterr().out


def test_aquila_alone_shows_what_it_can_do(capsys):
    assert cli.main([]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    named = re.findall(r"^  (\w+)  +\w", captured.out, flags=re.MULTILINE)
    assert named == [words[0] for words in COMMANDS if len(words) == 1]


@pytest.mark.parametrize("columns", ["80", "100"])
@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_help_fits_a_screen_and_ends_with_an_example(words, columns, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", columns)
    lines = shown(capsys, *words).rstrip().splitlines()
    assert len(lines) <= 24
    # An example is copied whole, and may be longer.
    examples = [number for number, line in enumerate(lines) if line.startswith("example: ")]
    assert len(examples) == 1
    assert max(map(len, lines[: examples[0]])) <= int(columns)
    assert "aquila" in lines[examples[0]]


@pytest.mark.parametrize("words", [words for words in COMMANDS if words], ids=" ".join)
def test_every_flag_is_told_in_words(words):
    parser = dict(commands(cli.make_parser()))[words]
    for action in parser._actions:
        is_choice = isinstance(action, argparse._SubParsersAction)
        assert is_choice or action.help, (
            f"{' '.join(words)}: {action.option_strings or action.dest}"
        )


@pytest.mark.parametrize("words", [words for words in COMMANDS if words], ids=" ".join)
def test_an_example_is_a_command_that_parses(words):
    parser = dict(commands(cli.make_parser()))[words]
    assert parser.epilog is not None
    example = parser.epilog.removeprefix("example: ").replace("\\\n", " ")
    if words in (("completion",), ("lm_eval",)):
        return  # one is for a shell, the other's flags are not ours
    arguments = re.findall(r'"[^"]*"|\S+', example)
    assert arguments[0] == "aquila"
    _, rest = cli.make_parser().parse_known_args(arguments[1:])
    assert all(flag.startswith("--gin.") for flag in rest)


def test_usage_names_what_must_be_given():
    parser = Parser(prog="demo")
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("others", metavar="OTHER", nargs="+")
    parser.add_argument("--to", required=True, metavar="DIR")
    parser.add_argument("--fast", action="store_true")
    assert parser.format_usage() == "usage: demo MODEL OTHER ... --to DIR [flags]\n"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["trian"], "no 'trian' (did you mean train?); `aquila --help`"),
        (["sing"], "no 'sing'; there are train, plan, grow"),
        (["data"], "required: COMMAND"),
        (["completion", "fish"], "no 'fish'; there are bash, zsh, tcsh"),
        (["train", "--gin_fil=x"], "required: --gin_file"),
        (["generate", "one", "--promt", "Hello"], "--promt (did you mean --prompt?); `aquila gen"),
        (["report", "a", "--out", "b", "--wide", "-x"], "unknown arguments: --wide, -x;"),
        (["compare", "a", "b", "--limit", "0"], "--limit: must be a whole number of at least 1"),
        (["eval", "a", "--batch_size", "four"], "at least 1, not 'four'"),
        (["verify", "a", "b", "--text", "c", "--tolerance", "x"], "invalid float value: 'x'"),
        (["generate", "one", "--seed", "-1"], "at least 0, not '-1'"),
    ],
)
def test_a_mistake_in_words_or_flags_is_one_line_with_what_was_perhaps_meant(
    arguments, says, refused
):
    assert says in refused(*arguments)


def test_help_needs_no_jax():
    code = "import sys; from aquila_jax.cli import make_parser as make; make(); "
    code += "print('tensorflow' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
