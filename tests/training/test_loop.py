import dataclasses
import json
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from aquila_jax import UserError, scale_up
from aquila_jax.growth import ScaleOut, ScaleUp
from aquila_jax.growth.optimizer_state import grow_moments
from aquila_jax.sharding import MeshShape
from aquila_jax.training import AdamW, Cosine, Interrupted, evaluate, grow, loop, start, train
from aquila_jax.training.checkpoints import open_existing
from aquila_jax.training.run import build

from .synthetic import MIXTURE, TINY, WIDER, Counting, tiny_run


def _losses(model_dir):
    rows = [json.loads(line) for line in (model_dir / "metrics.jsonl").open()]
    return [(row["step"], row["loss"]) for row in rows if row["split"] == "train"]


def _params(run):
    checkpoints = open_existing(run.path)
    abstract = build(run, 10).abstract.params
    params = checkpoints.restore_params(checkpoints.latest_step or 0, abstract)
    return jax.tree.map(np.asarray, params)


def _assert_equal(tree, other):
    jax.tree.map(np.testing.assert_array_equal, tree, other)


def test_a_run_learns_and_leaves_what_it_promises(tmp_path):
    ledger = train(tiny_run(tmp_path, steps=30, eval_every=30, checkpoint_every=30))
    stage = ledger.current
    assert stage.validation_start is not None
    assert stage.validation_end is not None
    assert stage.validation_end["up"] < stage.validation_start["up"] - 0.5
    assert stage.tokens == 30 * 8 * 16
    names = {path.name for path in tmp_path.iterdir()}
    assert names >= {
        "checkpoints", "environment.json", "ledger.json", "metrics.jsonl", "model-info.txt",
        "tensorboard",
    }  # fmt: skip
    assert not any(name.startswith(".") for name in names)


def test_the_same_seed_gives_the_same_losses_and_another_does_not(tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        train(tiny_run(tmp_path / name, seed=seed))
    assert _losses(tmp_path / "a") == _losses(tmp_path / "b")
    assert _losses(tmp_path / "a") != _losses(tmp_path / "c")


class _StopAt:
    """Data that sends its own process a signal when batch number `number` is fetched."""

    def __init__(self, number, signum):
        self.number, self.signum, self.inner = number, signum, Counting()
        self.batch_size, self.sequence_length = 8, 16
        self.vocab_size = 32
        self.tokenizer_path = ""

    def prepare(self):
        pass

    def identity(self):
        return self.inner.identity()

    def validation_batches(self, num_batches):
        return self.inner.validation_batches(num_batches)

    def train_batches(self, start=0):
        for number, batch in enumerate(self.inner.train_batches(start), start):
            if number == self.number:
                os.kill(os.getpid(), self.signum)
            yield batch


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_run_goes_on_to_the_same_end_as_one_left_alone(tmp_path, signum, capfd):
    whole = tiny_run(tmp_path / "whole")
    train(whole)
    stopped = tiny_run(tmp_path / "stopped", data=_StopAt(3, signum))
    with pytest.raises(Interrupted, match="saved at step 4 of 6; run the same command again"):
        train(stopped)
    assert "stopping after this step" in capfd.readouterr().err
    resumed = tiny_run(tmp_path / "stopped")
    train(resumed)
    assert _losses(tmp_path / "stopped") == _losses(tmp_path / "whole")
    _assert_equal(_params(resumed), _params(whole))


def test_a_signal_during_the_last_step_stops_what_would_come_next(tmp_path):
    run = tiny_run(tmp_path, data=_StopAt(5, signal.SIGTERM))
    with pytest.raises(Interrupted, match="saved at step 6 of 6") as stop:
        train(run)
    assert stop.value.signum == signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert train(tiny_run(tmp_path)).current.steps == 6


def test_a_signal_during_the_first_validation_stops_before_the_first_step(tmp_path, monkeypatch):
    real = loop.validation_losses

    def interrupted(*arguments):
        os.kill(os.getpid(), signal.SIGINT)
        return real(*arguments)

    monkeypatch.setattr(loop, "validation_losses", interrupted)
    with pytest.raises(Interrupted, match="saved at step 0 of 6"):
        train(tiny_run(tmp_path))
    monkeypatch.undo()
    assert train(tiny_run(tmp_path)).current.steps == 6


def test_a_run_in_a_thread_leaves_signals_alone(tmp_path):
    with ThreadPoolExecutor(1) as pool:
        ledger = pool.submit(train, tiny_run(tmp_path)).result()
    assert ledger.current.steps == 6


def test_seconds_and_rates_count_training_and_not_what_lies_between(tmp_path, monkeypatch):
    slow = loop.validation_losses

    def slow_validation(*arguments):
        time.sleep(1.0)
        return slow(*arguments)

    monkeypatch.setattr(loop, "validation_losses", slow_validation)
    train(tiny_run(tmp_path / "parent"))
    train(tiny_run(tmp_path / "run", steps=12, eval_every=6, checkpoint_every=100))
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").open()]
    rates = {row["step"]: row["tokens_per_second"] for row in rows if row["split"] == "train"}
    # The seventh step follows a validation of a second; 128 tokens in that second would be 128.
    assert rates[7] > 5 * 128
    assert rows[-1]["seconds"] > 3.0


def test_more_steps_made_than_asked_for_is_refused(tmp_path):
    train(tiny_run(tmp_path))
    with pytest.raises(UserError, match="has made 6 steps, more than the 4 asked for"):
        train(tiny_run(tmp_path, steps=4))


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


def test_a_damaged_checkpoint_is_set_aside_and_the_run_ends_as_if_it_had_not_been(tmp_path, capsys):
    whole = tiny_run(tmp_path / "whole", steps=9)
    train(whole)
    train(tiny_run(tmp_path / "hurt"))
    (tmp_path / "hurt" / "checkpoints" / "6" / "meta" / "metadata").write_text("{")
    capsys.readouterr()
    with pytest.raises(UserError, match=r"checkpoints/6 is damaged .*meta/metadata is damaged"):
        evaluate(tiny_run(tmp_path / "hurt"))
    hurt = tiny_run(tmp_path / "hurt", steps=9)
    train(hurt)
    (warning,) = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    assert "set aside as damaged-6-0, and going on from step 3" in warning
    assert (tmp_path / "hurt" / "checkpoints" / "damaged-6-0" / "params").is_dir()
    # Another schedule after step 3, as the first run was to end at 6: only steps are compared.
    assert [step for step, _ in _losses(hurt.path)] == list(range(1, 10))


def test_what_is_not_the_disks_fault_is_not_called_so(tmp_path, monkeypatch):
    def broken(*_arguments, **_settings):
        raise ValueError("a defect")

    monkeypatch.setattr(ocp.AsyncCheckpointer, "save", broken)
    with pytest.raises(ValueError, match="a defect"):
        train(tiny_run(tmp_path))


def test_a_finished_run_does_nothing_again(tmp_path, capsys):
    ledger = train(tiny_run(tmp_path))
    before = (tmp_path / "metrics.jsonl").read_bytes()
    assert train(tiny_run(tmp_path)) == ledger
    assert "has made all 6 steps" in capsys.readouterr().err
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_growth_happens_once_and_never_on_resume(tmp_path):
    parent = tiny_run(tmp_path / "parent")
    train(parent)
    child = {"model": WIDER, "init_from": parent.model_dir, "growth": ScaleUp("aki_pro")}
    run = tiny_run(tmp_path / "child", **child, data=_StopAt(1, signal.SIGTERM))
    with pytest.raises(Interrupted):
        train(run)
    checkpoints = open_existing(run.path)
    first = checkpoints.restore_params(0, build(run, 10).abstract.params)
    expected = scale_up(_params(parent), TINY, WIDER, method="aki_pro").params
    _assert_equal(jax.tree.map(np.asarray, first), jax.tree.map(np.asarray, expected))

    # The parent is gone: a resume that grew again could not.
    (tmp_path / "parent").rename(tmp_path / "elsewhere")
    ledger = train(tiny_run(tmp_path / "child", **child))
    assert [stage.origin for stage in ledger.stages] == ["scratch", "scale_up"]
    assert [step for step, _ in _losses(tmp_path / "child")] == [1, 2, 3, 4, 5, 6]
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
    assert _losses(tmp_path / "grown") == _losses(tmp_path / "direct")


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


def test_a_control_spends_the_flops_of_the_lineage(tmp_path):
    parent = tiny_run(tmp_path / "parent", model=WIDER)
    train(parent)
    child = tiny_run(
        tmp_path / "child", model=MIXTURE, init_from=parent.model_dir, growth=ScaleOut()
    )
    spent = train(child).totals["flops"]
    control = tiny_run(tmp_path / "control", model=MIXTURE, steps=0, match_flops_of=child.model_dir)
    assert abs(train(control).totals["flops"] - spent) <= control.flops_per_step / 2


def test_evaluate_repeats_the_last_validation(tmp_path):
    run = tiny_run(tmp_path)
    end = train(run).current.validation_end
    assert end is not None
    assert evaluate(run) == pytest.approx(dict(end), rel=1e-6)


def test_eight_devices_train_as_one_does(tmp_path):
    train(tiny_run(tmp_path / "one", model=MIXTURE, mesh=MeshShape(data=8)))
    train(
        tiny_run(
            tmp_path / "many", model=MIXTURE, mesh=MeshShape(data=2, fsdp=2, expert=2, model=1)
        )
    )
    one, many = _losses(tmp_path / "one"), _losses(tmp_path / "many")
    np.testing.assert_allclose([loss for _, loss in many], [loss for _, loss in one], rtol=2e-4)


def _is_unharmed(run, before):
    _assert_equal(_params(run), before)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": WIDER}, "holds another model: embed_dim is 16 there and 24 here"),
        (
            {"data": Counting(batch_size=6), "mesh": MeshShape(data=4, fsdp=2), "steps": 8},
            "batch_size 6 does not divide over the 8 devices",
        ),
        ({"optimizer": AdamW(Cosine(1e-3, 50)), "steps": 8}, r"warmup_steps \(50\)"),
    ],
)
def test_a_wrong_setting_is_refused_and_the_checkpoint_kept(tmp_path, changes, message):
    run = tiny_run(tmp_path)
    train(run)
    before = _params(run)
    with pytest.raises(UserError, match=message):
        train(tiny_run(tmp_path, **changes))
    _is_unharmed(run, before)


def test_a_parent_without_checkpoints_is_named(tmp_path):
    with pytest.raises(UserError, match="nowhere holds no checkpoints"):
        train(tiny_run(tmp_path / "child", init_from=str(tmp_path / "nowhere")))


def test_a_parent_of_another_shape_asks_for_a_growth(tmp_path):
    parent = tiny_run(tmp_path / "parent")
    train(parent)
    with pytest.raises(UserError, match="mlp_dim is 24 there and 40 here; set growth"):
        train(tiny_run(tmp_path / "child", model=WIDER, init_from=parent.model_dir))


def test_a_model_dir_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write to MODEL_DIR .*file/run: Not a directory"):
        train(tiny_run(tmp_path / "file" / "run"))
