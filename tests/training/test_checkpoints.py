import json
import shutil

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from aquila_jax import axes
from aquila_jax.training import AdamW, Cosine, train
from aquila_jax.training.checkpoints import Checkpoints, open_existing
from aquila_jax.training.leaves import SavedLeaves
from aquila_jax.training.manifest import MANIFEST_FILE, Damaged, read_facts
from aquila_jax.training.run import build

from .synthetic import tiny_run


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    run = tiny_run(tmp_path_factory.mktemp("trained"))
    train(run)
    return run


@pytest.fixture
def copied(trained, tmp_path):
    """A copy of a finished run, with checkpoints of steps 3 and 6."""
    shutil.copytree(trained.path, tmp_path / "run")
    return tmp_path / "run"


def _flip(path):
    content = bytearray(path.read_bytes())
    if content:
        content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content) or b"\0")


def _truncate(path):
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2] if content else b"\0")


@pytest.mark.parametrize("damage", [_flip, _truncate, lambda path: path.unlink()])
def test_damage_to_any_file_sets_the_checkpoint_aside_and_keeps_it(copied, damage, capsys):
    pristine = copied.with_name("pristine")
    newest = copied / "checkpoints" / "6"
    shutil.copytree(newest, pristine)
    files = [path.relative_to(pristine) for path in pristine.rglob("*") if path.is_file()]
    assert len(files) > 20
    for number, file in enumerate(files):
        damage(newest / file)
        with Checkpoints(copied) as checkpoints:
            with pytest.raises(Damaged, match=file.name):
                checkpoints.verify_newest()
            checkpoints.set_aside_damaged()
            assert checkpoints.latest_step == 3
        warning = capsys.readouterr().err
        assert warning.count("\n") == 1
        assert f"set aside as damaged-6-{number}, and going on from step 3" in warning
        shutil.copytree(pristine, newest)
    assert len(list((copied / "checkpoints").glob("damaged-6-*"))) == len(files)


def test_several_damaged_ones_are_set_aside_and_a_run_begins_anew(copied, capsys):
    for step in (3, 6):
        (copied / "checkpoints" / str(step) / MANIFEST_FILE).unlink()
    with Checkpoints(copied) as checkpoints:
        checkpoints.set_aside_damaged()
        assert checkpoints.latest_step is None
    assert "and none is left" in capsys.readouterr().err


def test_what_a_crash_left_unfinished_is_no_checkpoint_and_is_removed(copied):
    directory = copied / "checkpoints"
    (directory / "6").rename(directory / ".saving-6")
    (directory / ".dropping-1").mkdir()
    with Checkpoints(copied) as checkpoints:
        assert checkpoints.latest_step == 3
    assert {path.name for path in directory.iterdir()} == {"3"}


def test_reading_leaves_a_save_under_way_alone(copied):
    unfinished = copied / "checkpoints" / ".saving-9"
    unfinished.mkdir()
    with open_existing(copied) as checkpoints:
        assert checkpoints.latest_step == 6
    assert unfinished.exists()


def test_a_save_copies_the_state_before_training_goes_on(trained, tmp_path):
    compiled = build(trained, trained.steps)
    with open_existing(trained.path) as checkpoints:
        state = checkpoints.restore_state(6, compiled.abstract)
        meta = checkpoints.read_meta(6)
    before = jax.tree.map(np.array, state)
    batches = trained.data.train_batches()
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(state, meta)
        for batch in (next(batches) for _ in range(5)):
            state, _ = compiled.train_step(state, batch)  # the old state's memory is reused
        checkpoints.wait()
        restored = checkpoints.restore_state(6, compiled.abstract)
    jax.tree.map(np.testing.assert_array_equal, restored, before)


def test_policies_keep_multiples_the_best_and_the_ends_of_stages(tmp_path):
    settings = {
        "checkpoint_every": 1, "eval_every": 2, "keep_checkpoints": 1, "keep_every": 3,
        "keep_best": 1, "optimizer": AdamW(Cosine(peak=2.0, warmup_steps=4)),
    }  # fmt: skip
    for steps in (5, 10):
        train(tiny_run(tmp_path, **settings, steps=steps))
    with open_existing(tmp_path) as checkpoints:
        facts = [read_facts(checkpoints.path(step)) for step in checkpoints.steps]
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").open()]
    measured = {row["step"]: row["loss"] for row in rows if row["split"] == "validation"}
    # Such a rate does harm once it is warm.
    best = min(measured, key=lambda step: measured[step])
    assert best not in {0, 3, 5, 6, 9, 10}
    assert {fact["step"] for fact in facts} == {0, 3, 5, 6, 9, 10, best}
    assert {fact["step"] for fact in facts if fact["is_stage_end"]} == {5, 10}
    assert all(fact["validation_loss"] == measured.get(fact["step"]) for fact in facts)


@pytest.mark.parametrize(
    "error",
    [
        TimeoutError("no answer"),
        OSError(5, "Input/output error"),
        ValueError("INTERNAL: Error writing d/0: Input/output error [source locations]"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_store_that_fails_for_a_while_loses_neither_the_run_nor_a_checkpoint(
    tmp_path, monkeypatch, capsys, error
):
    """A network file system, as the operating system or TensorStore tells of it."""
    real, calls = ocp.AsyncCheckpointer.save, []

    def save(self, *arguments, **options):
        calls.append(1)
        if len(calls) in (2, 3):
            raise error
        return real(self, *arguments, **options)

    monkeypatch.setattr(ocp.AsyncCheckpointer, "save", save)
    run = tiny_run(tmp_path / "run", steps=8, checkpoint_every=2)
    ledger = train(run)
    assert ledger.current.steps == 8
    said = capsys.readouterr().err
    assert said.count("could not save a checkpoint of step 2") == 1
    assert "saving works again" in said
    assert open_existing(run.path).steps == [6, 8]
    undisturbed = tiny_run(tmp_path / "undisturbed", steps=8, checkpoint_every=2)
    train(undisturbed)
    left, right = (SavedLeaves(run.path), SavedLeaves(undisturbed.path))
    for path in axes.parameters(run.model):
        np.testing.assert_array_equal(left.read(path), right.read(path))
