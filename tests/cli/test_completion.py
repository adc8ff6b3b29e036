"""Tab in a shell."""

import subprocess
import sys

import pytest

from aquila_jax import cli

from .test_parser import COMMANDS


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
