import dataclasses
import json

import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

from aquila_jax.errors import UserError
from aquila_jax.training import check, train
from aquila_jax.training.run import abstract_batch, build, with_saved_step
from aquila_jax.training.saved_step import compile_afresh, load_step, save_step

from .synthetic import tiny_run


def lowered_step(run):
    compiled = build(run, run.steps)
    batch = abstract_batch(run, compiled.layout)
    lowered = compiled.train_step.lower(compiled.abstract, batch)
    return compiled, lowered, list(compiled.layout.mesh.devices.flat)


@pytest.fixture(scope="module", autouse=True)
def _with_a_cache_of_every_program(tmp_path_factory):
    """JAX's cache, holding all that is compiled here, however small and quick."""
    settings = {
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("cache")),
        "jax_persistent_cache_min_compile_time_secs": 0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    kept = {name: getattr(jax.config, name) for name in settings}
    for name, value in settings.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    yield
    for name, value in kept.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A run, and its step compiled and kept."""
    directory = tmp_path_factory.mktemp("saved")
    run = tiny_run(directory / "here", steps=4)
    _, lowered, devices = lowered_step(run)
    lowered.compile()
    jax.clear_caches()  # what is asked for again is read from the disk
    save_step(directory / "step", lowered, compile_afresh(lowered), devices)
    return run, directory / "step"


def losses(run) -> list[float]:
    rows = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if row["split"] == "train"]


def test_a_run_with_a_kept_step_trains_as_one_that_compiles(saved, tmp_path, monkeypatch):
    run, path = saved
    train(run)
    there = dataclasses.replace(run, model_dir=str(tmp_path / "there"), compiled_step=str(path))
    used = []
    monkeypatch.setattr(
        "aquila_jax.training.run.load_step",
        lambda *arguments: used.append(arguments[0]) or load_step(*arguments),
    )
    train(there)
    assert used == [path]
    assert len(losses(run)) > 1
    np.testing.assert_array_equal(losses(there), losses(run))


def test_another_program_is_refused_with_one_line(saved):
    run, path = saved
    other = dataclasses.replace(run, remat="full", compiled_step=str(path))
    with pytest.raises(UserError, match=r"holds another compiled step: program is \w+ there"):
        with_saved_step(other, build(other, other.steps))
    with pytest.raises(UserError, match="holds another compiled step"):
        check(other)


def test_a_dry_run_says_that_the_step_is_not_there_yet(saved, tmp_path):
    absent = dataclasses.replace(saved[0], compiled_step=str(tmp_path / "absent"))
    assert check(absent) == [
        f"compiled_step {tmp_path / 'absent'} does not exist yet: it was not read"
    ]


def test_other_devices_and_versions_are_told(saved, monkeypatch):
    run, path = saved
    _, lowered, devices = lowered_step(run)
    with pytest.raises(UserError, match="devices is 8 of cpu there and 4 of cpu here"):
        load_step(path, lowered, devices[:4])
    monkeypatch.setattr(jax, "__version__", "9.9")
    with pytest.raises(UserError, match=r"jax is .* there and 9\.9 here"):
        load_step(path, lowered, devices)


def test_a_file_that_is_absent_or_something_else_is_told(saved, tmp_path):
    run, _ = saved
    _, lowered, devices = lowered_step(run)
    with pytest.raises(UserError, match="no compiled step at"):
        load_step(tmp_path / "absent", lowered, devices)
    (tmp_path / "text").write_text("not a step\n")
    with pytest.raises(UserError, match="is no compiled step"):
        load_step(tmp_path / "text", lowered, devices)
