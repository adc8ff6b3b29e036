"""The files that say what runs are true."""

import json
import re

import jax
import numpy as np

from aquila_jax import axes
from aquila_jax.sharding import MeshShape
from aquila_jax.training.agreement import code_digest, versions
from aquila_jax.training.describe import describe
from aquila_jax.training.run import build

from .synthetic import MIXTURE, tiny_run


def test_every_parameter_is_listed_with_its_shape_and_the_counts_add_up(tmp_path):
    run = tiny_run(tmp_path, model=MIXTURE, mesh=MeshShape(data=2, fsdp=2, expert=2))
    describe(run, build(run, 6), "TrainRun.steps = 6\n")
    assert (tmp_path / "config.gin").read_text() == "TrainRun.steps = 6\n"
    *lines, total = (tmp_path / "model-info.txt").read_text().splitlines()
    found = {line.split("  ")[0]: line.split("  ")[1:] for line in lines}
    parameters = axes.parameters(MIXTURE)
    assert set(found) == set(parameters)
    for path, parameter in parameters.items():
        assert found[path][0] == str(parameter.shape(MIXTURE))
        assert found[path][1] == "x".join(parameter.axes)
    counted = sum(int(np.prod(p.shape(MIXTURE))) for p in parameters.values())
    assert re.match(rf"total {counted:,} parameters, [\d,]+ active", total)
    told = json.loads((tmp_path / "environment.json").read_text())
    assert told["jax"] == jax.__version__ == versions()["jax"]
    assert told["code"] == code_digest()
    assert told["mesh_asked"]["expert"] == 2
    assert np.prod(list(told["mesh"].values())) == jax.device_count()


def test_without_gin_there_is_no_gin_file(tmp_path):
    run = tiny_run(tmp_path)
    describe(run, build(run, 6), "")
    assert not (tmp_path / "config.gin").exists()
    assert not (tmp_path / "tokenizer").exists()
