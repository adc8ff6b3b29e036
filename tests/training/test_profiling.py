import json

import jax
import pytest

from aquila_jax.errors import UserError
from aquila_jax.training import loop, train
from aquila_jax.training.profiling import out_of_memory

from .synthetic import tiny_run


def test_a_range_of_steps_is_traced_and_changes_nothing_else(tmp_path):
    plain, traced = tiny_run(tmp_path / "plain"), tiny_run(tmp_path / "b", profile_steps=(3, 4))
    for run in (plain, traced):
        train(run)
    traces = list((traced.path / "profile").rglob("*.xplane.pb"))
    assert len(traces) == 1
    assert b"train_step" in traces[0].read_bytes()
    losses = [
        [json.loads(line)["loss"] for line in (run.path / "metrics.jsonl").open()]
        for run in (plain, traced)
    ]
    assert losses[0] == losses[1]


@pytest.mark.parametrize("steps", [(3,), (4, 3), (0, 2)])
def test_steps_that_are_no_range_are_refused(tmp_path, steps):
    with pytest.raises(UserError, match="give the first and the last step"):
        tiny_run(tmp_path, profile_steps=steps)


def test_a_device_without_room_leaves_a_profile_and_one_line(tmp_path, monkeypatch):
    run = tiny_run(tmp_path)

    def begin(*_arguments):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes")

    monkeypatch.setattr(loop, "begin", begin)
    with pytest.raises(UserError, match=r"ran out of memory \(RESOURCE_EXHAUSTED: .*memory-0.prof"):
        train(run)
    # gzip, of the profile.
    assert (tmp_path / "memory-0.prof").read_bytes()[:2] == b"\x1f\x8b"


def test_other_errors_of_devices_are_not_about_memory(tmp_path, monkeypatch):
    def begin(*_arguments):
        raise jax.errors.JaxRuntimeError("INTERNAL: something else")

    monkeypatch.setattr(loop, "begin", begin)
    with pytest.raises(jax.errors.JaxRuntimeError, match="something else"):
        train(tiny_run(tmp_path))


def test_a_profile_that_cannot_be_written_hides_nothing(tmp_path):
    error = out_of_memory(RuntimeError("RESOURCE_EXHAUSTED: 9"), tmp_path / "nowhere", 0)
    assert "RESOURCE_EXHAUSTED: 9" in str(error)
    assert "no memory profile could be written" in str(error)
