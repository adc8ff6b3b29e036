"""The command line as a person meets it."""

import argparse
import io
import re
import subprocess
import sys

import pytest

from aquila_jax import cli
from aquila_jax.cli.parser import Parser
from aquila_jax.evaluation.scoring import progress


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


def test_an_unknown_command_is_refused_with_those_there_are(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["trian"])
    assert stop.value.code == 2
    assert "train" in capsys.readouterr().err


class _Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize(("stream", "is_shown"), [(_Terminal(), True), (io.StringIO(), False)])
def test_progress_is_shown_where_someone_watches_and_not_in_a_pipe(stream, is_shown, monkeypatch):
    monkeypatch.setattr(sys, "stderr", stream)
    with progress("scoring", 2) as bar:
        if not bar.disable:
            bar.start_t -= 2  # as if two seconds had gone
            bar.last_print_t -= 2
        bar.update(2)
    assert ("scoring" in stream.getvalue()) == is_shown


@pytest.mark.parametrize("shell", ["bash", "zsh", "tcsh"])
def test_completion_knows_every_command(shell, capsys):
    pytest.importorskip("shtab", reason="shtab is not installed: run `make test`")
    assert cli.main(["completion", shell]) == 0
    script = capsys.readouterr().out
    assert all(words[-1] in script for words in COMMANDS if words)


def test_bash_completes_commands_and_flags(capsys, tmp_path):
    pytest.importorskip("shtab", reason="shtab is not installed: run `make test`")
    cli.main(["completion", "bash"])
    (tmp_path / "aquila.bash").write_text(capsys.readouterr().out)

    def complete(*words):
        body = f"""
            source aquila.bash
            COMP_WORDS=({" ".join(words)}); COMP_CWORD={len(words) - 1}; COMPREPLY=()
            _shtab_aquila 2>/dev/null
            echo "${{COMPREPLY[@]}}"
        """
        run = subprocess.run(
            ["bash", "-c", body], cwd=tmp_path, capture_output=True, text=True, check=True
        )
        return run.stdout.split()

    assert complete("aquila", "gr") == ["grow"]
    assert "--topology" in complete("aquila", "plan", "--t")
    assert complete("aquila", "convert", "--max") == ["--max_shard_bytes"]


def test_completion_without_its_library_says_what_to_install(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert cli.main(["completion", "bash"]) == 2
    assert capsys.readouterr().err.startswith("error: completion needs shtab: pip install")
