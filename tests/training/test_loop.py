import json
import time

import numpy as np
import orbax.checkpoint as ocp
import pytest

from aquila_jax import UserError
from aquila_jax.growth import ScaleOut
from aquila_jax.sharding import MeshShape
from aquila_jax.training import AdamW, Cosine, evaluate, loop, train

from .synthetic import MIXTURE, WIDER, Counting, assert_equal, final_params, losses, tiny_run


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
    assert losses(tmp_path / "a") == losses(tmp_path / "b")
    assert losses(tmp_path / "a") != losses(tmp_path / "c")


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
    assert [step for step, _ in losses(hurt.path)] == list(range(1, 10))


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


def test_a_control_spends_the_flops_of_the_lineage(tmp_path):
    parent = tiny_run(tmp_path / "parent", model=WIDER)
    train(parent)
    child = tiny_run(
        tmp_path / "child", model=MIXTURE, init_from=parent.model_dir, growth=ScaleOut()
    )
    spent = train(child).totals["flops"]
    control = tiny_run(tmp_path / "control", model=MIXTURE, steps=0, match_flops_of=child.model_dir)
    assert abs(train(control).totals["flops"] - spent) <= control.flops_per_step / 2


def test_eight_devices_train_as_one_does(tmp_path):
    train(tiny_run(tmp_path / "one", model=MIXTURE, mesh=MeshShape(data=8)))
    train(
        tiny_run(
            tmp_path / "many", model=MIXTURE, mesh=MeshShape(data=2, fsdp=2, expert=2, model=1)
        )
    )
    one, many = losses(tmp_path / "one"), losses(tmp_path / "many")
    np.testing.assert_allclose([loss for _, loss in many], [loss for _, loss in one], rtol=2e-4)


def _is_unharmed(run, before):
    assert_equal(final_params(run), before)


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
    before = final_params(run)
    with pytest.raises(UserError, match=message):
        train(tiny_run(tmp_path, **changes))
    _is_unharmed(run, before)
