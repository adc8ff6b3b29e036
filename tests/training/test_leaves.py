"""Leaves of a checkpoint, read as they were saved and a few at a time."""

import shutil

import numpy as np
import pytest

from aquila_jax import UserError, axes
from aquila_jax.training.importing import save_as_parent
from aquila_jax.training.leaves import SavedLeaves

from .synthetic import MIXTURE


@pytest.fixture
def saved(tmp_path, random_params):
    params = random_params(MIXTURE)
    save_as_parent(params, MIXTURE, tmp_path / "run")
    return axes.flatten(params), tmp_path / "run"


def test_leaves_layers_and_experts_are_what_was_saved(saved):
    params, path = saved
    leaves = SavedLeaves(path)
    assert leaves.config == MIXTURE
    assert leaves.companions is None
    for name, leaf in params.items():
        assert leaves.dtype(name) == leaf.dtype
        np.testing.assert_array_equal(leaves.read(name), leaf)
    np.testing.assert_array_equal(leaves.read("layers/moe/up", 1, 2), params["layers/moe/up"][1, 2])
    assert len(leaves._held) <= 2


def test_a_leaf_that_is_gone_is_named(saved):
    _, path = saved
    leaves = SavedLeaves(path)
    shutil.rmtree(path / "checkpoints" / "0" / "params")
    with pytest.raises(UserError, match=r"lm_head/kernel of .*params cannot be read"):
        leaves.read("lm_head/kernel")


def test_a_directory_without_checkpoints_is_refused(tmp_path):
    with pytest.raises(UserError, match="nowhere holds no checkpoints"):
        SavedLeaves(tmp_path / "nowhere")
