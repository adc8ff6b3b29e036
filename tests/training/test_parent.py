"""Runs that begin with a model from elsewhere, or with one that is only nearly theirs."""

import dataclasses

import jax
import numpy as np
import pytest

from aquila_jax import UserError, axes, save_hf, scale_up
from aquila_jax.growth import ScaleUp
from aquila_jax.sharding import MeshShape
from aquila_jax.training import check, evaluate, train
from aquila_jax.training.checkpoints import Checkpoints
from aquila_jax.training.importing import save_as_parent
from aquila_jax.training.run import build
from aquila_jax.training.start import begin
from tests.interop import test_gguf_file

from .synthetic import TINY, WIDER, Counting, tiny_run

MESH = MeshShape(data=4, fsdp=2)
PLAIN = dataclasses.replace(
    test_gguf_file.CONFIG, vocab_size=32, context_length=16, num_heads=2, num_kv_heads=2
)


@pytest.fixture
def params(random_params):
    return random_params(TINY)


def first_state(run):
    """What a run begins with, and the words for it."""
    with Checkpoints(run.path) as checkpoints:
        start = begin(run, build(run, 6), checkpoints, 6)
    return jax.tree.map(np.asarray, start.state.params), start


def assert_equal(tree, other):
    jax.tree.map(np.testing.assert_array_equal, tree, other)


def as_format(path, params, kind):
    if kind == "hugging face":
        save_hf(params, TINY, path, dtype="float32", max_shard_bytes=4000)
    else:
        save_as_parent(params, TINY, path)
    return str(path)


@pytest.mark.parametrize("kind", ["hugging face", "converted"])
def test_a_run_begins_with_a_model_from_elsewhere_and_trains(tmp_path, params, kind):
    source = as_format(tmp_path / "source", params, kind)
    run = tiny_run(tmp_path / "run", init_from=source, mesh=MESH)
    assert check(run) == []
    begun, start = first_state(run)
    assert_equal(begun, params)
    assert "not checked that ids mean the same" in start.reason
    assert "\n" not in start.reason
    stage = train(run).current
    assert (stage.origin, stage.steps) == ("restored", 6)
    # The source is as it was, and the run knows its own vocabulary from now on.
    assert_equal(first_state(tiny_run(tmp_path / "again", init_from=source))[0], params)
    with pytest.raises(UserError, match="another tokenizer"):
        evaluate(tiny_run(tmp_path / "run", data=Counting(vocab_size=31)))


def test_a_gguf_file_is_a_model_from_elsewhere(tmp_path, random_params):
    params = random_params(PLAIN)
    path = test_gguf_file.write(tmp_path / "model.gguf", params, PLAIN)
    run = tiny_run(tmp_path / "run", model=PLAIN, init_from=str(path), mesh=MESH)
    assert check(run) == []
    assert_equal(first_state(run)[0], params)


@pytest.mark.parametrize("kind", ["hugging face", "converted"])
def test_a_model_from_elsewhere_grows(tmp_path, params, kind):
    growth = ScaleUp("isometric")
    source = as_format(tmp_path / "source", params, kind)
    settings = {"model": WIDER, "init_from": source, "growth": growth}
    run = tiny_run(tmp_path / "run", **settings, mesh=MeshShape(data=8))
    expected = scale_up(params, TINY, WIDER, method="isometric").params
    assert_equal(first_state(run)[0], expected)
    assert train(run).current.origin == "scale_up"
    mapped = tiny_run(tmp_path / "other", **settings, optimizer_state="map")
    for command in (check, train):
        with pytest.raises(UserError, match=r"has none: set TrainRun.optimizer_state to 'reset'"):
            command(mapped)


def test_a_model_of_another_shape_or_none_is_refused(tmp_path, params):
    source = as_format(tmp_path / "source", params, "hugging face")
    run = tiny_run(tmp_path / "run", model=WIDER, init_from=source)
    for command in (check, train):
        with pytest.raises(UserError, match=r"embed_dim is 16 there and 24 here, .*; set growth"):
            command(run)
    assert "does not exist yet" in check(tiny_run(tmp_path / "run", init_from="nowhere"))[0]


def test_leaves_are_renamed_initialised_and_left_as_asked(tmp_path, params):
    source = as_format(tmp_path / "source", params, "hugging face")
    wanted = dataclasses.replace(TINY, tie_embeddings=True, rope_theta=5.0)
    swap = ((r"(.*)/key_bias", r"\1/value_bias"), (r"(.*)/value_bias", r"\1/key_bias"))
    dropped = (("final_norm/scale|.*/mlp/gate", None), ("lm_head/.*", None))
    run = tiny_run(
        tmp_path / "run",
        model=wanted,
        init_from=source,
        assignment_map=(*swap, *dropped),
        mesh=MESH,
    )
    assert check(run) == []
    begun, start = first_state(run)
    begun, given = axes.flatten(begun), axes.flatten(params)
    assert_equal(begun["layers/attention/key_bias"], given["layers/attention/value_bias"])
    assert_equal(begun["layers/attention/value_bias"], given["layers/attention/key_bias"])
    assert_equal(begun["layers/mlp/up"], given["layers/mlp/up"])
    assert_equal(begun["final_norm/scale"], np.ones(16, np.float32))
    scratch = axes.flatten(first_state(tiny_run(tmp_path / "scratch", model=wanted))[0])
    assert_equal(begun["layers/mlp/gate"], scratch["layers/mlp/gate"])
    for words in (
        "rope_theta is 1000000.0 there and 5.0 here",
        "renamed: layers/attention/key_bias from layers/attention/value_bias",
        "freshly initialised: final_norm/scale, layers/mlp/gate",
        "lm_head/kernel",
    ):
        assert words in start.reason
    assert "\n" not in start.reason
    assert train(run).current.steps == 6


def test_two_leaves_may_have_one_source(tmp_path, params):
    source = as_format(tmp_path / "source", params, "converted")
    both = ((r"layers/mlp/up", "layers/mlp/gate"), (r".*/mlp/up", None))
    # Nothing uses the source's own `up` now, and the second pattern says that it may be left.
    run = tiny_run(tmp_path / "run", init_from=source, assignment_map=both, allow_missing=True)
    begun, _ = first_state(run)
    assert_equal(begun["layers"]["mlp"]["up"], params["layers"]["mlp"]["gate"])
    assert train(run).current.steps == 6


def test_a_nearly_right_parent_grows(tmp_path, params):
    source = as_format(tmp_path / "source", params, "hugging face")
    tied = dataclasses.replace(TINY, tie_embeddings=True)
    run = tiny_run(
        tmp_path / "run",
        model=dataclasses.replace(WIDER, tie_embeddings=True),
        init_from=source,
        init_from_model=tied,
        growth=ScaleUp("isometric"),
        assignment_map=(("lm_head/kernel", None),),
    )
    assert check(run) == []
    del params["lm_head"]
    expected = scale_up(params, tied, run.model, method="isometric").params
    begun, start = first_state(run)
    assert_equal(begun, expected)
    assert "unused: lm_head/kernel" in start.reason
    assert "grown by" in start.reason


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"allow_missing": True}, "read nothing: set init_from"),
        ({"assignment_map": (("(", None),)}, "no regular expression"),
        (
            {
                "allow_missing": True,
                "init_from": "x",
                "growth": ScaleUp(),
                "optimizer_state": "map",
            },
            "set optimizer_state to 'reset'",
        ),
    ],
)
def test_settings_that_do_not_fit_are_refused(tmp_path, changes, words):
    with pytest.raises(UserError, match=words):
        tiny_run(tmp_path, **changes)


def test_what_is_missing_is_refused_before_anything_is_written(tmp_path, random_params):
    unbiased = dataclasses.replace(TINY, qkv_bias=False)
    save_hf(random_params(unbiased), unbiased, tmp_path / "source", dtype="float32")
    settings = {"init_from": str(tmp_path / "source"), "assignment_map": ((".*/gate", None),)}
    run = tiny_run(tmp_path / "run", **settings)
    for command in (check, train):
        with pytest.raises(UserError, match="missing there: layers/attention/query_bias"):
            command(run)
    assert first_state(dataclasses.replace(run, allow_missing=True))[1].is_new
