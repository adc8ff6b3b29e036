"""What processes must agree on."""

import pytest

from aquila_jax import UserError
from aquila_jax.hosts import Group
from aquila_jax.sharding import Layout, MeshShape
from aquila_jax.training import train
from aquila_jax.training.agreement import check_alike, share_directory, stop_vote
from tests.hosts.threads import join, leave, on_all

from .synthetic import tiny_run


def test_a_model_dir_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write to MODEL_DIR .*file/run: Not a directory"):
        train(tiny_run(tmp_path / "file" / "run"))


def test_whoever_runs_something_else_is_named_on_all():
    groups = join(3)

    def compare(group):
        facts = {
            "jax": "1",
            "seed": 3 if group.index == 2 else 0,
            **({} if group.index else {"x": 1}),
        }
        with pytest.raises(UserError, match="not every host runs what process 0 does") as refused:
            check_alike(group, "settings", facts)
        return str(refused.value)

    said = on_all(groups, compare)
    assert len(set(said)) == 1
    assert "on process 1 x is None, not 1;" in said[0]
    assert "on process 2 seed is 3, not 0, x is None, not 1" in said[0]
    leave(groups)


def test_equal_processes_and_one_alone_pass():
    groups = join(2)
    on_all(groups, lambda group: check_alike(group, "settings", {"seed": 0}))
    leave(groups)
    check_alike(Group(), "settings", {"seed": 0})


def test_directories_that_are_not_one_are_noticed(tmp_path):
    groups = join(2)

    def share(group):
        with pytest.raises(UserError, match="is not the MODEL_DIR that process 0 writes to"):
            share_directory(group, tmp_path / str(group.index))

    on_all(groups, share)
    on_all(groups, lambda group: share_directory(group, tmp_path / "common"))
    leave(groups)
    # Nothing is left of the proof.
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_alone_a_process_stops_by_the_first_signal_it_heard():
    asked: list[int] = []
    vote = stop_vote(Group(), Layout(MeshShape(data=-1).build()), asked)
    assert vote() == 0
    asked += [15, 2]
    assert vote() == 15
