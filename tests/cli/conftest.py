"""Small models on disk, a directory of its own for every test, and commands run in this process."""

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import pytest
import tokenizers

from aquila_jax import Transformer, cli, preset, save_hf

LETTERS = [chr(i) for i in range(ord("A"), ord("A") + 26)] + [" ", "\n", ".", "?"]


def add_tokenizer(path: Path, letters: Sequence[str] = LETTERS, **settings: Any) -> None:
    """A tokenizer beside a model that knows single letters."""
    vocabulary = {"<end>": 0, **{letter: i for i, letter in enumerate(letters, start=1)}}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
    tokenizer.decoder = tokenizers.decoders.Fuse()
    tokenizer.add_special_tokens(["<end>"])
    tokenizer.save(str(path / "tokenizer.json"))
    settings = {"eos_token": "<end>", **settings}
    (path / "tokenizer_config.json").write_text(json.dumps(settings))


@pytest.fixture(autouse=True)
def _in_a_directory_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="session")
def _two_models(tmp_path_factory, tiny, random_params):
    root = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("one", "two")):
        save_hf(random_params(tiny, seed=seed), tiny, root / name, dtype="float32")
        add_tokenizer(root / name, chat_template="{{ messages[-1].content }}?")
    question = {"context": "Q?", "choices": [" YES", " NO"], "answer": 0}
    (root / "task.jsonl").write_text(f"{json.dumps(question)}\n" * 3)
    (root / "text.txt").write_text("A LINE OF TEXT.\n" * 300)
    (root / "blank.txt").write_text(" \n")
    (root / "latin.txt").write_bytes(b"\xff\xfe")
    return root


@pytest.fixture
def models(_two_models, tmp_path) -> Path:
    """The working directory, with two models, a task, a text, and files that are none."""
    shutil.copytree(_two_models, tmp_path, dirs_exist_ok=True)
    return tmp_path


@pytest.fixture
def small(tmp_path) -> Path:
    """A small model as a Hugging Face directory of the working directory, without a tokenizer."""
    config = preset("toy_dense", vocab_size=64, embed_dim=8, num_layers=2, mlp_dim=12)
    tokens = jax.numpy.zeros((1, 4), "int32")
    params = Transformer(config).init(jax.random.key(0), tokens)["params"]
    save_hf(params, config, tmp_path / "small", dtype="float32")
    return tmp_path / "small"


@pytest.fixture
def refused(capsys, tmp_path) -> Callable[..., str]:
    """Runs a command that is refused, and gives its one line; it has made and lost no file."""

    def run(*arguments: str) -> str:
        before = _sizes(tmp_path)
        capsys.readouterr()
        try:
            code = cli.main(list(arguments))
        except SystemExit as stop:  # argparse ends by itself
            code = stop.code
        assert code == 2
        captured = capsys.readouterr()
        assert captured.err.startswith("error: ")
        assert captured.err.count("\n") == 1
        assert captured.out == ""
        assert _sizes(tmp_path) == before
        return captured.err

    return run


def _sizes(root: Path) -> dict[Path, int]:
    """Of all files; a run's directory is made before its data is found to be missing."""
    return {path: path.stat().st_size for path in root.rglob("*") if path.is_file()}


@pytest.fixture
def table(capsys) -> Callable[..., list[list[str]]]:
    """Runs a command, and gives the cells of what it prints."""

    def run(*arguments: str) -> list[list[str]]:
        capsys.readouterr()
        assert cli.main(list(arguments)) == 0
        return [line.split("\t") for line in capsys.readouterr().out.splitlines()]

    return run
