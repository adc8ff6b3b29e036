"""A converted model as the first checkpoint of a MODEL_DIR."""

import numpy as np
import pytest

from aquila_jax import UserError
from aquila_jax.training import evaluate, train
from aquila_jax.training.checkpoints import open_existing
from aquila_jax.training.importing import save_as_parent

from .synthetic import TINY, tiny_run


def test_a_converted_model_is_no_run_to_go_on_with(tmp_path, random_params):
    params, source = random_params(TINY), str(tmp_path / "source")
    save_as_parent(params, TINY, source)
    with pytest.raises(UserError, match=r"a converted model and no run: name it in .*init_from"):
        train(tiny_run(tmp_path / "source"))
    control = tiny_run(tmp_path / "control", steps=0, match_flops_of=source)
    with pytest.raises(UserError, match="a converted model"):
        train(control)
    losses = evaluate(tiny_run(tmp_path / "source"))
    assert np.isfinite(losses["mean"])
    with open_existing(tmp_path / "source") as checkpoints:
        assert not checkpoints.has_optimizer_state(0)
    with pytest.raises(UserError, match="source exists"):
        save_as_parent(params, TINY, tmp_path / "source")
    assert not list(tmp_path.glob(".source*"))
