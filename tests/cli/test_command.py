"""What the commands share."""

import io
import sys

import jax
import pytest

from aquila_jax import UserError
from aquila_jax.cli.command import (
    batch_rows,
    byte_bar,
    load_model,
    look_for_no_absent_tpu,
    open_layout,
)


def test_a_mesh_is_one_device_an_axis_unless_it_is_named():
    assert open_layout(None) is open_layout("") is None
    layout = open_layout("data=2,fsdp=2,model=2")
    assert layout.mesh.size == jax.device_count() == 8
    assert layout.batch_shards == 4


@pytest.mark.parametrize(
    ("mesh", "says"),
    [
        ("data", "--mesh data is not of the form data=2,model=4"),
        ("data=", "is not of the form"),
        ("data=two", "is not of the form"),
        ("data=8,", "is not of the form"),
        ("dat=8", "--mesh names dat; there are"),
        ("data=3", "does not multiply to 8 devices"),
        ("data=0", "mesh sizes must be positive"),
        ("data=4,model=2,data=4", "names data more than once"),
    ],
)
def test_a_mesh_that_is_none_is_refused(mesh, says):
    with pytest.raises(UserError, match=says):
        open_layout(mesh)


def test_rows_are_what_was_asked_for_or_what_a_mesh_needs():
    layout = open_layout("data=4,fsdp=2")
    assert batch_rows(3, 4, layout) == 3
    assert batch_rows(None, 4, None) == 4
    assert batch_rows(None, 4, layout) == 8
    assert batch_rows(None, 9, layout) == 16


def test_a_model_comes_with_the_tokenizer_beside_it_or_the_one_named(models):
    _, config, own = load_model("one", tokenizer=None)
    assert own.encode("HI") == load_model("one", tokenizer="two")[2].encode("HI")
    assert config.vocab_size >= own.num_ids
    with pytest.raises(UserError, match="absent"):
        load_model("one", tokenizer="absent")


@pytest.mark.parametrize("is_watched", [True, False])
def test_bytes_are_shown_where_someone_watches(is_watched, monkeypatch):
    stream = io.StringIO()
    monkeypatch.setattr(stream, "isatty", lambda: is_watched, raising=False)
    monkeypatch.setattr(sys, "stderr", stream)
    with byte_bar("model") as show:
        show(512, 1024)
        show(1024, 1024)
    assert ("model: 100%" in stream.getvalue()) == is_watched


@pytest.mark.parametrize(
    ("device", "given", "expected"),
    [
        ("null", {}, "1"),
        ("accel0", {}, None),
        ("vfio", {}, None),
        ("null", {"TPU_SKIP_MDS_QUERY": "0"}, "0"),
    ],
)
def test_libtpu_is_kept_quiet_only_where_there_is_no_tpu(tmp_path, device, given, expected):
    (tmp_path / device).touch()
    environ = dict(given)
    look_for_no_absent_tpu(environ, tmp_path)
    assert environ.get("TPU_SKIP_MDS_QUERY") == expected
