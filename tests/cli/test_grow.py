"""`aquila grow` from disk to disk."""

import dataclasses

import jax
import numpy as np
import pytest

from aquila_jax import cli, load_hf, scale_up
from aquila_jax.training import train
from aquila_jax.training.checkpoints import open_existing
from aquila_jax.training.run import build

from ..training.synthetic import tiny_run


def test_a_directory_grows_into_another(small, tmp_path, capsys):
    grown, mixture = tmp_path / "grown", tmp_path / "moe"
    flags = ["--gin.target.embed_dim=12", "--gin.target.num_layers=3"]
    assert cli.main(["grow", "--from", str(small), "--to", str(grown), *flags]) == 0
    out, err = capsys.readouterr()
    assert "isometric + identity: function kept" in out
    assert err == ""
    experts = ["--gin.target.num_experts=4", "--gin.target.experts_per_token=2"]
    upcycle = ["--gin_file=gin_configs/growth/sparse_upcycling.gin", "--dtype=bfloat16"]
    assert cli.main(["grow", "--from", str(grown), "--to", str(mixture), *upcycle, *experts]) == 0
    params, config = load_hf(mixture)
    assert (config.embed_dim, config.num_layers, config.num_experts) == (12, 3, 4)
    assert params["layers"]["moe"]["up"].dtype == "bfloat16"


def test_a_growth_from_disk_can_be_looked_at_without_being_done(small, tmp_path, capsys):
    flags = ["--to", str(tmp_path / "grown"), "--gin.target.embed_dim=12", "--dry_run"]
    assert cli.main(["grow", "--from", str(small), *flags]) == 0
    assert "layers/mlp/up" in capsys.readouterr().out
    assert not (tmp_path / "grown").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--from", "small"], "--from and --to go together"),
        (["--from", "none", "--to", "new"], "none/config.json"),
        (["--from", "small", "--to", "small"], "small exists"),
        (["--from", "small", "--to", "new", "--gin.target.embed_dim=4"], "from 8 to 4"),
        (["--from", "small", "--to", "new", "--gin.target.depth=4"], "fields ['depth']"),
        (["--from", "small", "--to", "new", "--dtype=int8"], "int8"),
        (["--from", "small", "--to", "new", "--gin_file=absent.gin"], "absent.gin"),
        ([], "name a run by --gin_file=FILE, or directories by --from and --to"),
    ],
)
def test_a_growth_from_disk_that_cannot_be_gives_one_line(small, refused, arguments, words):
    assert words in refused("grow", *arguments)
    assert small.is_dir()


def test_a_run_grows_into_a_directory(tmp_path, capsys):
    run = tiny_run(tmp_path / "run")
    train(run)
    capsys.readouterr()
    flags = ["--gin.target.embed_dim=24", "--gin_file=gin_configs/growth/latent.gin"]
    grown = tmp_path / "grown"
    assert cli.main(["grow", "--from", run.model_dir, "--to", str(grown), *flags]) == 0
    params, config = load_hf(grown)
    with open_existing(run.path) as checkpoints:
        abstract = build(run, 6).abstract.params
        source = checkpoints.restore_params(6, abstract)
    target = dataclasses.replace(run.model, embed_dim=24)
    expected = scale_up(source, run.model, target, method="latent").params
    jax.tree.map(np.testing.assert_array_equal, params, expected)
    assert config.embed_dim == 24
