import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aquila_jax import UserError
from aquila_jax.training import AdamW, Cosine, Guard, loop, step, train
from aquila_jax.training.checkpoints import open_existing
from aquila_jax.training.guard import (
    ACCEPTED,
    NOT_FINITE,
    SPIKE,
    all_finite,
    new_guard_state,
)
from aquila_jax.training.run import build

from .synthetic import Counting, tiny_run


class Hurt(Counting):
    """The same batches, and NaN for a weight of those whose number is in `numbers`."""

    numbers = (3,)

    def train_batches(self, start=0, *, rows=None):
        for number, batch in enumerate(super().train_batches(start, rows=rows), start):
            if number in self.numbers:
                batch["loss_weights"][0, 0] = np.nan
            yield batch


class AlwaysHurt(Hurt):
    numbers = range(4, 10**6)


def _rows(path):
    return [json.loads(line) for line in path.open()]


def _params(run, at):
    with open_existing(run.path) as checkpoints:
        return checkpoints.restore_params(at, build(run, run.steps).abstract.params)


def _judge(guard, values):
    state, verdicts = new_guard_state(), []
    for loss, norm in values:
        verdict, state = guard.judge(state, jnp.float32(loss), jnp.float32(norm))
        verdicts.append(int(verdict))
    return verdicts, state


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_skipped_from_the_first_step_and_counted(bad):
    values = [(bad, 1.0), (2.0, bad), (2.0, 1.0), (bad, bad)]
    verdicts, state = _judge(Guard(spike_deviations=0), values)
    assert verdicts == [NOT_FINITE, NOT_FINITE, ACCEPTED, NOT_FINITE]
    assert (int(state.skipped), int(state.in_a_row), int(state.accepted)) == (3, 1, 1)
    assert np.isfinite(state.mean_2).all()


def test_the_estimates_are_the_mean_and_variance_of_what_was_accepted():
    rng = np.random.default_rng(0)
    usual = [(3 + 0.1 * rng.normal(), np.exp(0.2 * rng.normal())) for _ in range(80)]
    _, state = _judge(Guard(), [*usual, (np.nan, 1.0)])
    logs = np.array([(loss, np.log(norm)) for loss, norm in usual])
    np.testing.assert_allclose(state.mean_2, logs.mean(axis=0), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(state.variance_2, logs.var(axis=0), rtol=1e-4)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ((3.9, 1.0), ACCEPTED),  # 9 deviations of 0.1
        ((4.2, 1.0), SPIKE),  # 12
        ((-9.0, 1.0), ACCEPTED),  # a loss may fall as far as it will
        ((3.0, np.exp(1.8)), ACCEPTED),
        ((3.0, np.exp(2.4)), SPIKE),
        ((3.0, 0.0), ACCEPTED),
    ],
)
def test_a_spike_is_so_many_deviations_above_the_mean(value, expected):
    signs = np.array([1, -1] * 50)
    usual = [(3 + 0.1 * sign, np.exp(0.2 * sign)) for sign in signs]
    assert _judge(Guard(spike_after=100), [*usual, value])[0][-1] == expected
    # One update too few, or none of it wanted.
    assert _judge(Guard(spike_after=101), [*usual, value])[0][-1] == ACCEPTED
    assert _judge(Guard(0.0, spike_after=100), [*usual, value])[0][-1] == ACCEPTED


def test_a_steady_loss_may_wobble():
    usual = [(3.0, 1.0)] * 100
    assert _judge(Guard(spike_after=100), [*usual, (3.4, 1.5)])[0][-1] == ACCEPTED


@pytest.mark.parametrize(
    "changes",
    [
        {"spike_deviations": -1},
        {"spike_deviations": float("nan")},
        {"stop_after": 0},
        {"stop_after": 2.5},
        {"spike_after": 0},
    ],
    ids=str,
)
def test_impossible_guards_are_refused(changes):
    with pytest.raises(UserError, match=next(iter(changes))):
        Guard(**changes)


def test_all_finite_looks_at_every_leaf():
    tree = {"a": jnp.ones(3), "b": jnp.arange(2)}
    assert all_finite(tree)
    assert not all_finite({**tree, "c": jnp.array([0.0, jnp.nan])})
    assert not all_finite({**tree, "c": jnp.array(-jnp.inf)})


def test_nan_in_a_batch_changes_nothing_but_the_count(tmp_path):
    run = tiny_run(tmp_path, data=Hurt(), checkpoint_every=1, keep_checkpoints=9)
    ledger = train(run)
    assert (ledger.current.steps, ledger.current.skipped) == (6, 1)
    jax.tree.map(np.testing.assert_array_equal, _params(run, 4), _params(run, 3))
    different = jax.tree.map(lambda a, b: bool((a != b).any()), _params(run, 5), _params(run, 4))
    assert all(jax.tree.leaves(different))
    (row,) = _rows(tmp_path / "skipped_batches.jsonl")
    assert (row["step"], row["batch"], row["loss"]) == (4, 3, "nan")
    assert row["data_order"] == run.data.identity()["order"]
    rows = _rows(tmp_path / "metrics.jsonl")
    rates = {row["step"]: row["learning_rate"] for row in rows if row["split"] == "train"}
    # The schedule counts updates that were made.
    schedule = np.asarray(run.optimizer.schedule.build(6)(3))
    assert rates[5] == pytest.approx(float(schedule))


def test_a_resumed_run_skips_what_it_would_have_skipped(tmp_path):
    whole = tiny_run(tmp_path / "whole", data=Hurt(), steps=8)
    train(whole)
    train(tiny_run(tmp_path / "halves", data=Hurt(), steps=8, checkpoint_every=2))
    for step_dir in (tmp_path / "halves" / "checkpoints").glob("8"):
        step_dir.rename(tmp_path / "gone")
    halves = tiny_run(tmp_path / "halves", data=Hurt(), steps=8, checkpoint_every=2)
    assert train(halves).current.skipped == 1
    jax.tree.map(np.testing.assert_array_equal, _params(whole, 8), _params(halves, 8))
    assert len(_rows(halves.path / "skipped_batches.jsonl")) == 1


def test_too_many_in_a_row_end_the_run_and_keep_the_last_good_checkpoint(tmp_path):
    run = tiny_run(tmp_path, data=AlwaysHurt(), steps=30, guard=Guard(stop_after=4), log_every=1)
    with pytest.raises(UserError, match=r"4 updates in a row .* step 8 .*step 6 is kept"):
        train(run)
    assert [row["step"] for row in _rows(tmp_path / "skipped_batches.jsonl")] == [5, 6, 7, 8]
    mended = tiny_run(tmp_path, data=Counting(), steps=9, guard=Guard(stop_after=4))
    assert train(mended).current.steps == 9


def test_nan_in_a_gradient_alone_is_seen(tmp_path, monkeypatch):
    real = step.loss_and_metrics

    @jax.custom_vjp
    def poison(loss, is_bad):
        return loss

    poison.defvjp(
        lambda loss, is_bad: (loss, is_bad),
        lambda is_bad, gradient: (jnp.where(is_bad, jnp.nan, gradient), None),
    )

    def poisoned(model, router_losses, params, batch, *rngs):
        loss, metrics = real(model, router_losses, params, batch, *rngs)
        return poison(loss, batch["tokens"][0, 1] % 2 == 1), metrics

    monkeypatch.setattr(step, "loss_and_metrics", poisoned)
    odd = [int(next(Counting().train_batches(n))["tokens"][0, 1]) % 2 for n in range(6)]
    assert 0 < sum(odd) < 6
    ledger = train(tiny_run(tmp_path))
    assert ledger.current.skipped == sum(odd)
    rows = _rows(tmp_path / "skipped_batches.jsonl")
    assert [row["batch"] for row in rows] == [n for n in range(6) if odd[n]]
    assert all(np.isfinite(float(row["loss"])) for row in rows)


def test_nan_in_a_parameter_is_never_saved(tmp_path, monkeypatch):
    train(tiny_run(tmp_path))
    real = loop.begin

    def begin_hurt(*arguments):
        start = real(*arguments)
        params = dict(start.state.params)
        scale = params["final_norm"]["scale"]
        params["final_norm"] = {"scale": scale.at[0].set(jnp.nan)}
        return start._replace(state=start.state._replace(params=params))

    monkeypatch.setattr(loop, "begin", begin_hurt)
    with pytest.raises(UserError, match="not finite at step 9: not saved; step 6 is kept"):
        train(tiny_run(tmp_path, steps=12))
    monkeypatch.undo()
    assert train(tiny_run(tmp_path, steps=12)).current.skipped == 0


def test_a_rate_that_explodes_is_met_by_the_spike_guard(tmp_path):
    wild = AdamW(Cosine(peak=30.0, warmup_steps=12), max_gradient_norm=1e9)
    guard = Guard(spike_deviations=3.0, spike_after=5, stop_after=100)
    ledger = train(tiny_run(tmp_path, steps=20, optimizer=wild, guard=guard))
    assert ledger.current.skipped > 0
    reasons = {row["reason"] for row in _rows(tmp_path / "skipped_batches.jsonl")}
    assert "loss or gradient spiked" in reasons
