"""`aquila verify` on tiny models on disk."""

import dataclasses
import sys

import jax
import jax.numpy as jnp
import pytest

from aquila_jax import cli, save_hf
from aquila_jax.training.importing import save_as_parent

from .conftest import LETTERS, add_tokenizer


@pytest.fixture(scope="module")
def models(tmp_path_factory, tiny, random_params):
    """A model, its copies of several kinds, and others."""
    root = tmp_path_factory.mktemp("models")
    params = random_params(tiny)
    nearly = jax.tree.map(lambda leaf: leaf * 1.001, params)
    save_hf(params, tiny, root / "one", dtype="float32")
    save_hf(nearly, tiny, root / "nearly", dtype="float32")
    save_hf(params, tiny, root / "rounded")
    save_hf(params, tiny, root / "permuted", dtype="float32")
    for name in ("one", "nearly", "rounded"):
        add_tokenizer(root / name, LETTERS)
    add_tokenizer(root / "permuted", LETTERS[::-1])
    save_as_parent(jax.tree.map(jnp.asarray, params), tiny, root / "run")
    (root / "text.txt").write_text("A LINE OF TEXT.\n" * 8)
    return root


@pytest.fixture(autouse=True)
def _in_its_directory(models, monkeypatch):
    monkeypatch.chdir(models)


def verify(capsys, *arguments):
    """The exit code, and what is printed, by name."""
    code = cli.main(["verify", *arguments, "--text", "text.txt"])
    lines = [line.split("\t", 1) for line in capsys.readouterr().out.splitlines()]
    return code, dict(lines)


def test_a_model_is_itself_in_every_format(capsys):
    assert cli.main(["convert", "--from", "one", "--to", "copy"]) == 0
    assert cli.main(["convert", "--from", "run", "--to", "exported"]) == 0
    capsys.readouterr()
    for other in ("copy", "run"):
        code, found = verify(capsys, "one", other)
        assert (code, found["verdict"]) == (0, "equal")
        assert found["logits, max abs"].startswith("0 ")
        assert found["ids"] == "equal, 128"
        assert found["tokens read"] == "128"
    # A MODEL_DIR has no tokenizer to export, and two models without one need to be told.
    code, found = verify(capsys, "run", "exported", "--tokenizer", "one")
    assert (code, found["verdict"]) == (0, "equal")


def test_what_differs_is_exit_code_1_until_it_is_tolerated(capsys):
    code, found = verify(capsys, "one", "rounded")
    assert code == 1
    assert "beyond --tolerance" in found["verdict"]
    loose = ("--tolerance", "0.1", "--kl_tolerance", "0.1", "--loss_tolerance", "0.1")
    code, found = verify(capsys, "one", "rounded", *loose)
    assert (code, found["verdict"]) == (0, "equal")
    for flag in ("--tolerance", "--kl_tolerance", "--loss_tolerance"):
        code, found = verify(capsys, "one", "nearly", *loose, flag, "0")
        assert (code, found["verdict"]) == (1, f"different: beyond {flag}")


def test_other_ids_are_exit_code_1_with_equal_weights(capsys):
    code, found = verify(capsys, "one", "permuted")
    assert code == 1
    assert found["verdict"] == "different: the token ids differ"
    assert found["ids"] == "differ from number 0 on, 128"
    assert found["logits, max abs"].startswith("0 ")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["one", "absent"], "absent"),
        (["run", "run"], "holds no tokenizer: name the one of its run with --tokenizer"),
        (["one", "one", "--max_length", "64"], "between 2 and the context of 32, not 64"),
        (["one", "one", "--max_tokens", "1"], "--max_tokens: must be a whole number of at least 2"),
        (["one", "one", "--kl_tolerance", "-1"], "--kl_tolerance -1.0: a tolerance is a number"),
        (["one", "one", "--tolerance", "nan"], "--tolerance nan: a tolerance is a number, 0 or"),
        (["one", "one", "--gin.A=1"], "no gin bindings"),
    ],
)
def test_mistakes_are_one_line(refused, arguments, says):
    assert says in refused("verify", *arguments, "--text", "text.txt")


def test_models_of_different_sizes_are_no_pair(capsys, tiny, random_params, models):
    wide = dataclasses.replace(tiny, vocab_size=64)
    save_hf(random_params(wide), wide, "wide", dtype="float32")
    add_tokenizer(models / "wide", LETTERS)
    assert cli.main(["verify", "one", "wide", "--text", "text.txt"]) == 2
    assert "61 and 64 ids" in capsys.readouterr().err


def test_without_transformers_the_line_names_it(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    arguments = ["verify", "one", "one", "--text", "text.txt", "--with_transformers", "b"]
    assert cli.main(arguments) == 2
    error = capsys.readouterr().err
    assert "which is not installed here (transformers is missing)" in error
    assert error.count("\n") == 1
