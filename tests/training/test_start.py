"""How a run begins: resumed, grown, from its parent, and what is refused."""

import dataclasses
import json
import signal

import jax
import numpy as np
import pytest

from aquila_jax import UserError, scale_up
from aquila_jax.growth import ScaleOut, ScaleUp
from aquila_jax.growth.optimizer_state import grow_moments
from aquila_jax.training import AdamW, Cosine, Interrupted, evaluate, grow, start, train
from aquila_jax.training.checkpoints import open_existing
from aquila_jax.training.run import build

from .synthetic import (
    MIXTURE,
    TINY,
    WIDER,
    Counting,
    StopAt,
    assert_equal,
    final_params,
    losses,
    tiny_run,
)


def test_what_changed_since_the_last_time_is_said(tmp_path, capsys):
    train(tiny_run(tmp_path))
    capsys.readouterr()
    train(tiny_run(tmp_path, steps=8, log_every=2, optimizer=AdamW(Cosine(2e-2, 2))))
    said = capsys.readouterr().err
    assert "steps were 6 and are 8 now" in said
    assert "log_every was 1 and is 2 now" in said
    assert "optimizer.schedule.peak was 0.01 and is 0.02 now" in said
    train(tiny_run(tmp_path, steps=9, log_every=2, optimizer=AdamW(Cosine(2e-2, 2))))
    said = capsys.readouterr().err
    assert "log_every" not in said
    assert "optimizer" not in said


def test_another_order_of_the_data_is_refused_unless_it_is_named(tmp_path, capsys):
    train(tiny_run(tmp_path))
    other = {"steps": 8, "data": Counting(seed=5)}
    with pytest.raises(UserError, match=r"data.seed was 0 and is 5 now.*\('data.seed',\)"):
        train(tiny_run(tmp_path, **other))
    with pytest.raises(UserError, match="seed was 0 and is 5"):
        train(tiny_run(tmp_path, **other, allow_changes=("data.sequence_length",)))
    capsys.readouterr()
    ledger = train(tiny_run(tmp_path, **other, allow_changes=("data.seed",)))
    assert ledger.current.steps == 8
    assert "data.seed was 0 and is 5 now" in capsys.readouterr().err


def test_a_changed_model_is_taken_only_by_name_and_only_where_its_leaves_fit(tmp_path):
    train(tiny_run(tmp_path))
    other = dataclasses.replace(TINY, norm_eps=1e-4)
    with pytest.raises(UserError, match=r"\('model.norm_eps',\)"):
        train(tiny_run(tmp_path, steps=8, model=other))
    train(tiny_run(tmp_path, steps=8, model=other, allow_changes=("model.norm_eps",)))
    wider = dataclasses.replace(TINY, mlp_dim=40)
    with pytest.raises(UserError, match=r"layers/mlp/down is .*24.* there and .*40.* here"):
        train(tiny_run(tmp_path, steps=9, model=wider, allow_changes=("model",)))


def test_another_tokenizer_is_refused_on_resume_growth_and_evaluation(tmp_path):
    class OtherWords(Counting):
        def identity(self):
            return {**super().identity(), "vocabulary": "other"}

    run = tiny_run(tmp_path / "run")
    train(run)
    message = "run was trained with another tokenizer"
    with pytest.raises(UserError, match=message):
        train(tiny_run(tmp_path / "run", steps=8, data=OtherWords()))
    with pytest.raises(UserError, match=message):
        evaluate(tiny_run(tmp_path / "run", data=OtherWords()))
    child = {"model": WIDER, "init_from": run.model_dir, "growth": ScaleUp()}
    with pytest.raises(UserError, match=message):
        train(tiny_run(tmp_path / "child", **child, data=OtherWords()))


def test_growth_happens_once_and_never_on_resume(tmp_path):
    parent = tiny_run(tmp_path / "parent")
    train(parent)
    child = {"model": WIDER, "init_from": parent.model_dir, "growth": ScaleUp("aki_pro")}
    run = tiny_run(tmp_path / "child", **child, data=StopAt(1, signal.SIGTERM))
    with pytest.raises(Interrupted):
        train(run)
    checkpoints = open_existing(run.path)
    first = checkpoints.restore_params(0, build(run, 10).abstract.params)
    expected = scale_up(final_params(parent), TINY, WIDER, method="aki_pro").params
    assert_equal(jax.tree.map(np.asarray, first), jax.tree.map(np.asarray, expected))

    # The parent is gone: a resume that grew again could not.
    (tmp_path / "parent").rename(tmp_path / "elsewhere")
    ledger = train(tiny_run(tmp_path / "child", **child))
    assert [stage.origin for stage in ledger.stages] == ["scratch", "scale_up"]
    assert [step for step, _ in losses(tmp_path / "child")] == [1, 2, 3, 4, 5, 6]
    certificate = json.loads((tmp_path / "child" / "certificate.json").read_text())
    assert (certificate["method"], certificate["exact"]) == ("aki_pro", False)
    assert certificate["source_hash"] != certificate["target_hash"]
    measured = certificate["measured"]
    assert measured["num_tokens"] == 2 * 15
    assert measured["max_logit_difference"] > 1e-3


def _adam(run):
    checkpoints = open_existing(run.path)
    state = checkpoints.restore_state(checkpoints.latest_step or 0, build(run, run.steps).abstract)
    (adam,) = start._adam_states(state.opt_state)
    return adam, state.opt_state


def test_moments_grow_with_the_parameters_and_the_schedule_starts_anew(tmp_path):
    parent = tiny_run(tmp_path / "parent")
    train(parent)
    wider = dataclasses.replace(TINY, embed_dim=24, mlp_dim=40)
    growth = ScaleUp("isometric")
    child = tiny_run(
        tmp_path / "child",
        model=wider,
        init_from=parent.model_dir,
        growth=growth,
        optimizer_state="map",
    )
    grow(child)
    before, _ = _adam(parent)
    after, opt_state = _adam(child)
    plan, certificate = growth.plan(TINY, wider)
    for power, old, new in ((1, before.mu, after.mu), (2, before.nu, after.nu)):
        expected = grow_moments(plan, certificate, old, power=power, policy="map")
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), new, expected)
    assert np.asarray(after.count) == 6
    counts = {
        int(leaf) for leaf in jax.tree.leaves(opt_state) if leaf.shape == () and leaf != after.count
    }
    assert counts == {0}
    reset = tiny_run(tmp_path / "reset", model=wider, init_from=parent.model_dir, growth=growth)
    grow(reset)
    assert not any(leaf.any() for leaf in jax.tree.leaves(_adam(reset)[0]))
    train(child)


def test_grow_makes_the_checkpoint_that_train_goes_on_from(tmp_path):
    parent = tiny_run(tmp_path / "parent", model=WIDER)
    train(parent)
    child = {"model": MIXTURE, "init_from": parent.model_dir, "growth": ScaleOut()}
    grow(tiny_run(tmp_path / "grown", **child))
    with pytest.raises(UserError, match="already holds step 0"):
        grow(tiny_run(tmp_path / "grown", **child))
    grown = train(tiny_run(tmp_path / "grown", **child))
    direct = train(tiny_run(tmp_path / "direct", **child))
    assert grown.current.validation_start == direct.current.validation_start is not None
    assert losses(tmp_path / "grown") == losses(tmp_path / "direct")


def test_scale_out_starts_where_its_parent_ended(tmp_path):
    parent = tiny_run(tmp_path / "parent", model=WIDER)
    end = train(parent).current.validation_end
    child = tiny_run(
        tmp_path / "child", model=MIXTURE, init_from=parent.model_dir, growth=ScaleOut()
    )
    start = train(child).current.validation_start
    assert end is not None
    assert start is not None
    np.testing.assert_allclose(list(start.values()), list(end.values()), rtol=1e-5)


def test_a_parent_without_checkpoints_is_named(tmp_path):
    with pytest.raises(UserError, match="nowhere holds no checkpoints"):
        train(tiny_run(tmp_path / "child", init_from=str(tmp_path / "nowhere")))


def test_a_parent_of_another_shape_asks_for_a_growth(tmp_path):
    parent = tiny_run(tmp_path / "parent")
    train(parent)
    with pytest.raises(UserError, match="mlp_dim is 24 there and 40 here; set growth"):
        train(tiny_run(tmp_path / "child", model=WIDER, init_from=parent.model_dir))
