"""Mixtures with biases as models of qwen2_moe: the same function, in a family that is loaded."""

import dataclasses

import jax
import numpy as np
import pytest

from aquila_jax import load_hf, save_hf
from aquila_jax.errors import UserError
from aquila_jax.interop import Directory
from aquila_jax.interop.converting import convert_files

from .conftest import CONFIGS

MIXTURE = CONFIGS["aquilamoe"]


@pytest.fixture
def written(tmp_path, random_params):
    params = random_params(MIXTURE)
    save_hf(params, MIXTURE, tmp_path / "model", dtype="float32", family="qwen2_moe")
    return params, tmp_path / "model"


def test_the_function_is_the_same(written, model_logits):
    params, path = written
    read, config = load_hf(path)
    assert Directory(path).model_type == "qwen2_moe"
    wanted = dataclasses.replace(MIXTURE, shared_mlp_dim=1, shared_expert_gate=True)
    assert config == wanted
    tokens = np.arange(12).reshape(2, 6)
    np.testing.assert_array_equal(
        model_logits(config, read, tokens), model_logits(MIXTURE, params, tokens)
    )


def test_files_are_converted_to_the_same_bits(tmp_path, written):
    params, path = written
    save_hf(params, MIXTURE, tmp_path / "small", dtype="float32")
    convert_files(tmp_path / "small", tmp_path / "converted", family="qwen2_moe")
    jax.tree.map(np.testing.assert_array_equal, load_hf(tmp_path / "converted"), load_hf(path))


def test_the_smallest_family_by_its_name_is_what_is_written_by_default(tmp_path, random_params):
    save_hf(random_params(MIXTURE), MIXTURE, tmp_path / "model", family="aquilamoe")
    assert Directory(tmp_path / "model").config == MIXTURE


@pytest.mark.parametrize(
    ("name", "family", "message"),
    [
        ("aquilamoe", "mixtral", "written as aquilamoe, and not as mixtral"),
        ("aquilamoe", "gpt2", "no family 'gpt2'; there are"),
        ("llama", "qwen2_moe", "written as llama, and not as qwen2_moe"),
        ("qwen3_moe", "qwen2_moe", "written as qwen3_moe, and not as qwen2_moe"),
    ],
)
def test_what_a_family_cannot_hold_is_refused(tmp_path, random_params, name, family, message):
    config = CONFIGS[name]
    with pytest.raises(UserError, match=message):
        save_hf(random_params(config), config, tmp_path / "model", family=family)
    assert not (tmp_path / "model").exists()
