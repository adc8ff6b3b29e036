"""`aquila verify` with transformers on either side.

Runs where torch and transformers are installed: `make test-parity`.
"""

import dataclasses
import json
from typing import Any

import pytest

from aquila_jax import cli, save_hf

REASON = "needs torch and transformers: run `make test-parity`"
pytest.importorskip("torch", reason=REASON)
transformers = pytest.importorskip("transformers", reason=REASON)
tokenizers = pytest.importorskip("tokenizers", reason=REASON)

pytestmark = pytest.mark.parity

LETTERS = [chr(i) for i in range(ord("A"), ord("A") + 26)] + [" ", "\n", ".", "?"]
TEXT = "A LINE OF TEXT.\n" * 8


@pytest.fixture
def saved(tmp_path, tiny, random_params, monkeypatch):
    """A model with a tokenizer, saved by this library."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text(TEXT)

    def save(name="model", **changes):
        # Without biases, as qwen2's tokenizer follows rules of its own, whatever its file says.
        config = dataclasses.replace(tiny, **{"qkv_bias": False, **changes})
        save_hf(random_params(config), config, name, dtype="float32")
        tokenizer = tokenizers.Tokenizer(
            tokenizers.models.BPE({"<end>": 0, **{c: i for i, c in enumerate(LETTERS, 1)}}, [])
        )
        tokenizer.add_special_tokens(["<end>"])
        tokenizer.save(str(tmp_path / name / "tokenizer.json"))
        said = {"eos_token": "<end>", "tokenizer_class": "PreTrainedTokenizerFast"}
        (tmp_path / name / "tokenizer_config.json").write_text(json.dumps(said))
        return name

    return save


def verify(capsys, *arguments) -> tuple[int, Any]:
    """The exit code, and what is printed, by name, or the error."""
    code = cli.main(["verify", *arguments])
    captured = capsys.readouterr()
    lines = [line.split("\t", 1) for line in captured.out.splitlines()]
    return code, dict(lines) or captured.err


@pytest.mark.parametrize("side", ["a", "b", "both"])
@pytest.mark.parametrize("changes", [{}, {"num_experts": 4, "experts_per_token": 2}])
def test_both_libraries_read_the_same_model(saved, capsys, side, changes):
    name = saved(**changes)
    code, found = verify(capsys, name, name, "--text", "text.txt", "--with_transformers", side)
    assert code == 0, found
    assert found["ids"] == "equal, 128"
    assert float(found["KL, nats per token"].split()[0]) < 1e-9


def test_a_damaged_copy_is_found_and_a_lost_tensor_refused(saved, capsys, tmp_path):
    safetensors = pytest.importorskip("safetensors.numpy")
    name = saved()
    copy = saved("copy")
    file = tmp_path / copy / "model.safetensors"
    tensors = safetensors.load_file(file)
    tensors["model.layers.1.self_attn.k_proj.weight"] *= 1.01
    safetensors.save_file(tensors, file, metadata={"format": "pt"})
    code, found = verify(capsys, name, copy, "--text", "text.txt", "--with_transformers", "b")
    assert code == 1
    assert "beyond --tolerance" in found["verdict"]
    del tensors["model.layers.1.self_attn.k_proj.weight"]
    safetensors.save_file(tensors, file, metadata={"format": "pt"})
    code, error = verify(capsys, name, copy, "--text", "text.txt", "--with_transformers", "b")
    assert code == 2
    assert "with 1 missing keys" in error


def test_what_transformers_cannot_read_is_one_line(saved, capsys, tmp_path):
    name = saved(qkv_bias=True, num_experts=4, experts_per_token=2)
    (tmp_path / "empty").mkdir()
    for path, says in ((name, "aquilamoe, which transformers does not know"), ("empty", "neither")):
        code, error = verify(capsys, path, path, "--text", "text.txt", "--with_transformers", "a")
        assert code == 2
        assert says in error
        assert error.count("\n") == 1
