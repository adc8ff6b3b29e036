import dataclasses
from pathlib import Path

import pytest

from aquila_jax import UserError
from aquila_jax.growth import ScaleOut, ScaleUp
from aquila_jax.sharding import MeshShape
from aquila_jax.training import check, grow, train

from .synthetic import MIXTURE, TINY, WIDER, Counting, tiny_run


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "exactly one of steps"),
        ({"match_flops_of": "somewhere"}, "exactly one of steps"),
        ({"steps": -5, "match_flops_of": "somewhere"}, "steps must be a whole number.*-5"),
        ({"steps": 2.5}, "steps must be a whole number, 0 or more, not 2.5"),
        ({"seed": -1}, "seed must be a whole number, at least 0, at most 4,294,967,295, not -1"),
        ({"seed": 2**64}, "seed must be"),
        ({"model": 3}, r"TrainRun.model must be ModelConfig, not 3: in a gin file, a reference"),
        ({"growth": "fpi"}, r"TrainRun.growth must be ScaleUp or ScaleOut or None, not 'fpi'"),
        ({"mesh": 4}, r"TrainRun.mesh must be MeshShape, not 4"),
        ({"init_from": 3}, r"TrainRun.init_from must be str, not 3$"),
        ({"allow_changes": "seed"}, r"TrainRun.allow_changes must be tuple or list, not 'seed'$"),
        ({"data": None}, r"TrainRun.data must be TextData, TokenCache or the like, not None"),
        ({"eval_every": 2.5}, "eval_every must be a whole number, at least 1, not 2.5"),
        ({"optimizer_state": "drop"}, "no optimizer-state policy 'drop'; there are reset, map"),
        ({"remat": "some"}, "no remat 'some'; there are none, dots, projections, offload, full"),
        ({"eval_every": 0}, "eval_every must be a whole number, at least 1, not 0"),
        ({"data": Counting(vocab_size=64)}, "vocab_size 64 is larger than the model's 32"),
        ({"data": Counting(sequence_length=32)}, "sequence_length 32 is longer than .* 16"),
        ({"growth": ScaleUp()}, "set init_from"),
        (
            {
                "growth": ScaleUp(),
                "init_from": "parent",
                "init_from_model": dataclasses.replace(TINY, embed_dim=32),
            },
            "cannot grow embed_dim from 32 to 16",
        ),
        (
            {"growth": ScaleOut(), "init_from": "p", "init_from_model": TINY, "model": MIXTURE},
            "scale-out cannot change embed_dim from 16 to 24",
        ),
    ],
)
def test_settings_that_do_not_fit_are_refused_at_once(tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        tiny_run(tmp_path, **changes)


def test_an_empty_model_dir_is_refused():
    with pytest.raises(UserError, match="model_dir is empty"):
        dataclasses.replace(tiny_run(Path("x")), model_dir="")


def test_path_objects_are_kept_as_text(tmp_path):
    run = tiny_run(tmp_path, init_from=tmp_path / "parent", compiled_step=Path("step"))
    assert run == tiny_run(tmp_path, init_from=str(tmp_path / "parent"), compiled_step="step")
    moved = dataclasses.replace(run, model_dir=tmp_path / "moved")
    assert (moved.model_dir, moved.path) == (str(tmp_path / "moved"), tmp_path / "moved")


def test_check_reads_the_parent_where_it_exists(tmp_path):
    parent = tiny_run(tmp_path / "parent")
    child = {"model": WIDER, "init_from": parent.model_dir, "growth": ScaleUp()}
    assert "does not exist yet" in check(tiny_run(tmp_path / "child", **child))[0]
    train(parent)
    assert check(tiny_run(tmp_path / "child", **child)) == []
    shrunk = dataclasses.replace(WIDER, num_layers=1)
    with pytest.raises(UserError, match="cannot grow num_layers from 2 to 1"):
        check(tiny_run(tmp_path / "child", **{**child, "model": shrunk}))


def test_check_finds_a_mesh_that_does_not_fit(tmp_path):
    with pytest.raises(UserError, match=r"data=3, fsdp=1, expert=1, model=1 .* 8 devices"):
        check(tiny_run(tmp_path, mesh=MeshShape(data=3)))


def test_matching_flops_of_an_unfinished_run_is_refused(tmp_path):
    other = tiny_run(tmp_path / "parent")
    train(other)
    child = {"model": WIDER, "init_from": other.model_dir, "growth": ScaleUp()}
    grow(tiny_run(tmp_path / "child", **child))
    control = tiny_run(
        tmp_path / "control", steps=0, match_flops_of=str(tmp_path / "child"), model=WIDER
    )
    with pytest.raises(UserError, match="has made 0 of 6 steps"):
        train(control)
