"""The configurations for pods are what was planned, and say it."""

import json

import jax
import pytest

from aquila_jax.cli.gin_files import configured_run
from aquila_jax.planning.topology import devices_of
from aquila_jax.training.run import abstract_batch, build
from benchmarks.pods.planned import (
    FILES,
    GUIDE,
    PAGE,
    RESULTS,
    UNREAD,
    page,
    settings_of,
    topology_of,
    with_block,
    with_summary,
)

pytest.importorskip("libtpu", reason="compiling for TPUs needs libtpu")
RESULT = json.loads(RESULTS.read_text())


def _run(path):
    return configured_run([str(path)], (), unread=UNREAD)


def test_every_stage_has_a_file_for_every_slice():
    names = {path.stem for path in FILES}
    stages, slices = ("7b", "16b", "8x16b"), ("v5p_128", "v5p_512", "v6e_256", "tpu7x_64")
    assert names == {f"{stage}_{where}" for stage in stages for where in slices}
    assert set(RESULT["configs"]) == names


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_file_is_what_was_planned_and_says_its_numbers(path):
    planned = RESULT["configs"][path.stem]
    assert settings_of(_run(path)) == planned["settings"]
    assert topology_of(path).name == planned["topology"]
    assert with_block(path.read_text(), planned) == path.read_text()
    assert planned["memory"] < planned["capacity"]


def test_page_and_guide_are_made_of_the_numbers():
    assert page(RESULT) == PAGE.read_text()
    assert with_summary(GUIDE.read_text(), RESULT) == GUIDE.read_text()


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_file_fits_its_slice_without_a_trace(path):
    run = _run(path)
    compiled = build(run, run.steps, devices_of(topology_of(path)))
    rows, parts = run.data.batch_size, run.micro_batches
    assert rows % (compiled.layout.batch_shards * parts) == 0


# Seconds each; what was planned was traced then.
@pytest.mark.parametrize("name", ["7b_v5p_128", "8x16b_v5p_128"])
def test_a_stage_passes_a_dry_run_on_its_slice(name):
    (path,) = (path for path in FILES if path.stem == name)
    run = _run(path)
    compiled = build(run, run.steps, devices_of(topology_of(path)))
    batch = abstract_batch(run, compiled.layout)
    _, metrics = jax.eval_shape(compiled.train_step, compiled.abstract, batch)
    assert metrics["loss"].shape == ()
