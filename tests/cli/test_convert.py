"""`aquila convert` from format to format."""

import jax
import numpy as np
import pytest

from aquila_jax import cli, load_hf


def test_models_are_converted_from_format_to_format(small, tmp_path, capsys):
    narrow, run_dir, back = tmp_path / "narrow", tmp_path / "run", tmp_path / "back"
    convert = ["convert", "--from", str(small), "--to"]
    assert cli.main([*convert, str(narrow), "--dtype=bfloat16", "--max_shard_bytes=2000"]) == 0
    assert cli.main([*convert, str(run_dir), "--to_checkpoint"]) == 0
    assert cli.main(["convert", "--from", str(run_dir), "--to", str(back)]) == 0
    out, err = capsys.readouterr()
    assert "parameters; " in out
    # None lay beside the weights.
    warnings = [line[: len("warning: no tokenizer")] for line in err.splitlines()]
    assert warnings == ["warning: no tokenizer"] * 3
    assert load_hf(narrow)[0]["layers"]["mlp"]["up"].dtype == "bfloat16"
    assert len(list(narrow.glob("*.safetensors"))) > 1
    jax.tree.map(np.testing.assert_array_equal, load_hf(back), load_hf(small))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--from", "none", "--to", "new"], "none/config.json"),
        (["--from", "none.gguf", "--to", "new"], "no file"),
        (["--from", "small", "--to", "small"], "small exists"),
        (["--from", "small", "--to", "small", "--to_checkpoint"], "small exists"),
        (["--from", "small", "--to", "new", "--dtype=int8"], "int8"),
        (["--from", "small", "--to", "new", "--max_shard_bytes=0"], "max_shard_bytes"),
        (["--from", "small", "--to", "new", "--to_checkpoint", "--dtype=bfloat16"], "float32"),
        (["--from", "small", "--to", "new", "--gin.STEPS=3"], "takes no gin bindings"),
    ],
)
def test_a_conversion_that_cannot_be_gives_one_line(small, refused, arguments, words):
    assert words in refused("convert", *arguments)
    assert small.is_dir()
