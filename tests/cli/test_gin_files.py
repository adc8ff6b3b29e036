"""Gin files and bindings: found, read in order, and refused by one line."""

import pytest

from aquila_jax import cli

DENSE = "gin_configs/runs/demo/1_dense.gin"


def test_a_file_of_nearly_that_name_is_suggested_and_what_is_no_text_named(refused, tmp_path):
    flag = "--gin_file=gin_configs/runs/pretrian.gin"
    for command in ("train", "grow", "eval"):
        assert "did you mean gin_configs/runs/pretrain.gin?" in refused(command, flag)
    assert refused("train", "--gin_file=nowhere.gin") == "error: there is no gin file nowhere.gin\n"
    (tmp_path / "binary.gin").write_bytes(b"\xff\xfe")
    for also in ([], ["--allow_imports"]):
        said = refused("train", "--gin_file=binary.gin", *also)
        assert "binary.gin is no gin file: it is not UTF-8" in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gin.MODLE_DIR='x'"], "no macro 'MODLE_DIR' in the gin files; did you mean MODEL_DIR?"),
        (["--gin.MODEL_DIR"], "has no value"),
        (["--gin.TrainRun.stepz=3"], "stepz"),
        (["--gin.TrainRum.steps=3"], "TrainRum"),
        (["--gin.STEPS=three"], "'three' is no value: quote a text twice, as in --gin.NAME="),
        (["--gin.MODEL='aquila'"], "no preset 'aquila'; there are"),
        (["--gin.model/preset.num_heads=5"], r"num_heads (5) must be a multiple of num_kv_heads"),
        (["--gin.VOCAB_SIZE=9999"], "vocab_size 9999 is larger than the model's 4096"),
        (["--gin.MeshShape.data=3"], "data=3, fsdp=1, expert=1, model=1"),
        (["--gin.WARMUP_STEPS=500"], "warmup_steps (500)"),
        (["--gin.REMAT='most'"], "no remat 'most'"),
        (["--gin.DTYPE='float31'"], "float31"),
    ],
)
def test_a_wrong_binding_gives_one_line_that_names_it(arguments, message, refused):
    assert message in refused("train", f"--gin_file={DENSE}", "--dry_run", *arguments)


def test_required_macros_are_listed_with_the_flags_to_add(refused):
    error = refused("train", "--gin_file=gin_configs/runs/scale_up.gin", "--dry_run")
    assert "MODEL_DIR, INIT_FROM must be set" in error or "INIT_FROM, MODEL_DIR" in error
    assert "--gin.INIT_FROM=" in error


def test_search_paths_find_a_file_and_later_bindings_win(tmp_path, capsys):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "short.gin").write_text(f"include '{DENSE}'\nSTEPS = 77\n")
    arguments = ["train", "--gin_file=short.gin", "--gin_search_paths=mine", "--dry_run"]
    assert cli.main(arguments) == 0
    assert "STEPS = 77" in capsys.readouterr().out
    assert cli.main([*arguments, "--gin.STEPS=78"]) == 0
    assert "STEPS = 78" in capsys.readouterr().out


def test_several_files_are_read_in_order(capsys):
    files = ["gin_configs/runs/demo/2_scale_up.gin", "gin_configs/growth/fpi.gin"]
    assert cli.main(["train", *(f"--gin_file={name}" for name in files), "--dry_run"]) == 0
    assert "ScaleUp.method = 'fpi'" in capsys.readouterr().out
