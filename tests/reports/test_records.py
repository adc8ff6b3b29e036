import json

import pytest

from aquila_jax.errors import UserError
from aquila_jax.reports import read_run

from .synthetic import certificate, four_runs, stage, write_run


def test_reads_the_lineage_and_the_certificate(tmp_path):
    runs = [read_run(directory) for directory in four_runs(tmp_path)]
    assert [len(run.stages) for run in runs] == [1, 2, 3, 1]
    last = runs[2]
    assert last.stage.name == "scale-out"
    assert last.stage.experts == 8
    assert last.stage.languages == ("en", "zh")
    assert last.total_flops == pytest.approx(6.4e13)
    assert last.environment["jax"] == "0.10.2"
    assert last.certificate is not None
    assert last.certificate.exact
    assert last.certificate.leaves[3].origin == "fresh"
    assert last.certificate.leaves[3].source == ""
    assert runs[0].certificate is None


@pytest.mark.parametrize("end", [None, "absent"])
def test_unfinished_run_has_no_end(tmp_path, end):
    entry = stage(steps=210, validation_end=None)
    if end == "absent":
        del entry["validation_end"]
    run = read_run(write_run(tmp_path / "run", [entry]))
    assert not run.stage.finished
    assert run.stage.validation_end == {}


def test_mean_is_computed_where_the_ledger_lacks_it(tmp_path):
    entry = stage(validation_end={"en": 4.0, "zh": 3.0, "fr": 2.0})
    assert read_run(write_run(tmp_path / "run", [entry])).stage.validation_end["mean"] == 3.0


@pytest.mark.parametrize("name", ["ledger.json", "metrics.jsonl"])
def test_missing_file_is_named_with_the_way_out(tmp_path, name):
    directory = write_run(tmp_path / "run", [stage()])
    (directory / name).unlink()
    with pytest.raises(UserError, match=rf"run has no {name}: train it first with `aquila train`"):
        read_run(directory)


def test_missing_directory(tmp_path):
    with pytest.raises(UserError, match="nowhere is not a directory"):
        read_run(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "ledger.json cannot be read"),
        ("[]", "holds list, not an object"),
        ("{}", "lists no stages"),
        ('{"stages": [3]}', "stage 1 is garbled"),
        ('{"stages": [{"name": "a"}]}', "stage 1 has no 'origin'"),
        (json.dumps({"stages": [stage(flops="many")]}), "stage 1 is garbled"),
        (json.dumps({"stages": [stage(origin="bought")]}), "origin 'bought', not one of scratch"),
    ],
)
def test_garbled_ledger(tmp_path, text, message):
    directory = write_run(tmp_path / "run", [stage()])
    (directory / "ledger.json").write_text(text)
    with pytest.raises(UserError, match=message):
        read_run(directory)


def test_garbled_certificate(tmp_path):
    broken = certificate("fpi", True, {}, {})
    del broken["leaves"][1]["path"]
    directory = write_run(tmp_path / "run", [stage()], certificate=broken)
    with pytest.raises(UserError, match=r"certificate.json has no 'path'"):
        read_run(directory)
