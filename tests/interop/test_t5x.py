"""Our model and our growth under the real t5x, where it is installed.

t5x is in no lock file: it comes from its git repository, beside airio and jestimator.
"""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

from aquila_jax import UserError, preset
from aquila_jax.axes import flatten, unflatten
from aquila_jax.data import sources, train_sentencepiece
from aquila_jax.growth import ScaleUp, apply_plan
from aquila_jax.nn import Transformer
from aquila_jax.training import RouterLosses
from aquila_jax.training.step import loss_and_metrics
from tests.data.small_text import write_laws, write_speeches

REASON = "needs t5x, airio and jestimator, which are not on PyPI"
optimizers = pytest.importorskip("t5x.optimizers", reason=REASON)
bridge = pytest.importorskip("aquila_jax.interop.t5x", reason=REASON)

ROOT = Path(__file__).parents[2]
WORDS = ["the", "state", "of", "a", "union", "is", "strong", "and", "so", "are", "its", "laws"]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """Speeches and laws, and a tokenizer of them."""
    folder, rng = tmp_path_factory.mktemp("text"), np.random.default_rng(0)

    def words() -> str:
        return " ".join(rng.choice(WORDS, 40))

    write_speeches(folder, {f"{1800 + i}-Nobody-1": words() for i in range(40)})
    write_laws(folder, [(f"{i:04x}", f"第{i}号法", [f"第{i}条、国家"]) for i in range(40)])
    english = [d.text for d in sources.read_split("sotu_en", str(folder), "train")]
    train_sentencepiece({"en": english}, folder / "tokenizer.model", 280)
    return folder


def run_t5x(text: Path, name: str, model_dir: Path, steps: int, **bindings: str) -> None:
    """`t5x.train`, on two devices."""
    given = {
        "MODEL_DIR": f"'{model_dir}'",
        "TEXT_DIR": f"'{text}'",
        "TOKENIZER": f"'{text / 'tokenizer.model'}'",
        "TRAIN_STEPS": steps,
        "SAVE_EVERY": 3,
        "BATCH_SIZE": 4,
        "SEQUENCE_LENGTH": 32,
        "SHUFFLE_BUFFER": 16,
        **bindings,
    }
    flags = [f"--gin.{key}={value}" for key, value in given.items()]
    command = [sys.executable, "-m", "t5x.train", f"--gin_file=gin_configs/t5x/{name}.gin", *flags]
    environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-3000:]


def restored(model_dir: Path, step: int):
    return ocp.PyTreeCheckpointer().restore(model_dir / f"checkpoint_{step}" / "state")


def test_three_steps_then_growth_then_three_more_and_a_resumed_run_does_not_grow_again(
    text, tmp_path
):
    dense, large = tmp_path / "dense", tmp_path / "large"
    run_t5x(text, "pretrain", dense, 3)
    before, after = (flatten(restored(dense, step)["target"]) for step in (0, 3))
    assert all(np.isfinite(leaf).all() for leaf in after.values())
    assert np.any(before["layers/mlp/gate"] != after["layers/mlp/gate"])
    parent = {"INITIAL_CHECKPOINT_PATH": f"'{dense / 'checkpoint_3'}'"}
    run_t5x(text, "grow", large, 3, **parent)
    source, target = preset("toy_dense"), preset("toy_large")
    plan, _ = ScaleUp("aki_pro").plan(source, target)
    expected = apply_plan(plan, unflatten(after), target=target, key=jax.random.key(0))
    grown = restored(large, 0)
    jax.tree.map(np.testing.assert_array_equal, grown["target"], jax.device_get(expected))
    assert int(grown["state"]["step"]) == 0
    trained = restored(large, 3)
    run_t5x(text, "grow", large, 6, **parent)
    again = restored(large, 6)
    assert int(again["state"]["step"]) == 6
    # Three steps move no weight far; a second growth would have begun from the parent's.
    moved, reset = (
        float(optax.tree.norm(jax.tree.map(np.subtract, again["target"], other["target"])))
        for other in (trained, grown)
    )
    assert moved < reset


@pytest.fixture(scope="module")
def model_of(text):
    def make(config):
        optimizer = optimizers.wrap_optax_optimizer(optax.sgd)(0.1)
        return bridge.AquilaModel(config, str(text / "tokenizer.model"), optimizer)

    return make


@pytest.mark.parametrize("changes", [{}, {"num_experts": 4, "experts_per_token": 2}])
def test_the_loss_is_that_of_our_own_runs(tiny, random_params, random_batch, model_of, changes):
    config = dataclasses.replace(tiny, vocab_size=330, **changes)
    params = jax.tree.map(jnp.asarray, random_params(config))
    batch = random_batch(config)
    expected, _ = loss_and_metrics(Transformer(config), RouterLosses(), params, batch)
    theirs = {f"decoder_{name}": batch[name] for name in ("segment_ids", "positions")}
    theirs |= {
        "decoder_input_tokens": batch["tokens"],
        "decoder_target_tokens": batch["targets"],
        "decoder_loss_weights": batch["loss_weights"],
    }
    model = model_of(config)
    loss, metrics = model.loss_fn(params, theirs, None)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    assert "loss" in metrics
    scores_B = model.score_batch(params, theirs)
    weight = float(batch["loss_weights"].sum())
    if not changes:
        np.testing.assert_allclose(-scores_B.sum() / weight, expected, rtol=1e-5)
    with pytest.raises(UserError, match="aquila generate"):
        model.predict_batch(params, theirs)


def test_every_parameter_has_its_axes(tiny, model_of):
    config = dataclasses.replace(tiny, vocab_size=330)
    shapes = {"decoder_input_tokens": (2, 8)}
    variables = jax.eval_shape(
        lambda rng: model_of(config).get_initial_variables(rng, shapes), jax.random.key(0)
    )
    names = flatten(variables["params_axes"])
    for path, leaf in flatten(variables["params"]).items():
        assert len(names[f"{path}_axes"].names) == leaf.ndim


def test_what_cannot_be_grown_is_refused(tiny, text, model_of, tmp_path):
    target = dataclasses.replace(tiny, mlp_dim=40)
    options = {"source": tiny, "target": target, "growth": ScaleUp("isometric")}
    state = {"target": {}}
    resumed = bridge.grow_on_restore(state, {}, path="", is_resuming=True, **options)
    assert resumed is state
    with pytest.raises(UserError, match="no checkpoint that t5x wrote"):
        bridge.grow_on_restore(state, {}, path=str(tmp_path), **options)
    ocp.PyTreeCheckpointer().save(tmp_path / "c" / "state", {"target": {"a": np.ones(3)}})
    with pytest.raises(UserError, match="does not hold the model to grow: a, "):
        bridge.grow_on_restore(state, {}, path=str(tmp_path / "c"), **options)
    with pytest.raises(UserError, match="280 ids and the model 61"):
        model_of(tiny)
