"""`aquila plan` for four chips that are not here."""

import json

import pytest

from aquila_jax import cli

pytest.importorskip("libtpu", reason="compiling for TPUs needs libtpu")


def test_the_command_needs_neither_data_nor_directories(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    small = ["--gin.MODEL='toy_dense'", "--gin.SEQUENCE_LENGTH=32", "--gin.BATCH_SIZE=4"]
    flags = ["--gin_file=gin_configs/runs/pretrain.gin", "--topology=v5e:2x2", *small]
    save = tmp_path / "step"
    assert cli.main(["plan", *flags, "--gin.VOCAB_SIZE=4096", "--json", f"--save={save}"]) == 0
    assert json.loads(capsys.readouterr().out)["fits"]
    assert save.stat().st_size > 10_000
    assert [path.name for path in tmp_path.iterdir()] == ["step"]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--topology=v5e:3x5"], "no topology v5e:3x5: "),
        (["--topology=v5e:4"], "write CHIP:AxB or CHIP:AxBxC"),
        (["--topology=v5e:2x2", "--gin.MeshShape.fsdp=3"], "does not multiply to 4 devices"),
        (["--topology=v5e:2x2", "--gin.BATCH_SIZE=6"], "batch_size 6 does not divide over the 4"),
        (["--topology=v5e:2x2", "--save=x", "--what=decode"], "--save keeps a train step"),
    ],
)
def test_mistakes_are_one_line(flags, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["plan", "--gin_file=gin_configs/runs/pretrain.gin", *flags]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
