"""Small runs planned for four chips that are not here."""

import dataclasses
import json
import math
from pathlib import Path

import pytest

from aquila_jax import axes, cli, preset
from aquila_jax.errors import UserError
from aquila_jax.growth import ScaleOut
from aquila_jax.planning import Plan, make_plan, page, parse_topology, search
from aquila_jax.sharding import MeshShape, mesh_shapes

from ..training.synthetic import MIXTURE, TINY, Counting, tiny_run

pytest.importorskip("libtpu", reason="compiling for TPUs needs libtpu")
FOUR = parse_topology("v5e:2x2")


def run_of(model=TINY, **changes):
    data = Counting(batch_size=8, vocab_size=32)
    mesh = MeshShape(data=1, fsdp=4)
    settings = {"model": model, "data": data, "mesh": mesh, "dtype": "bfloat16", **changes}
    return tiny_run(Path("never-written"), steps=1000, **settings)


@pytest.fixture(scope="module")
def plan() -> Plan:
    return make_plan(run_of(), FOUR)[0]


def bytes_in_four_shards(config) -> float:
    """Of float32 parameters on one chip: what has the residual's axis is split, biases are not."""
    return 4 * sum(
        math.prod(parameter.shape(config)) / (4 if axes.EMBED in parameter.axes else 1)
        for parameter in axes.parameters(config).values()
    )


def test_parameters_and_moments_lie_in_shards(plan):
    shards = bytes_in_four_shards(TINY)
    assert plan.memory.resident["parameters"] == shards
    # Adam's two moments, and the counts of Adam and the schedule.
    assert plan.memory.resident["optimizer"] == pytest.approx(2 * shards, abs=16)
    assert plan.memory.total > sum(plan.memory.resident.values())
    assert plan.fits


def test_a_plan_counts_tokens_flops_and_days(plan):
    run = run_of()
    assert plan.tokens == 8 * 16
    assert plan.work is not None
    assert plan.bound is not None
    assert plan.work.model_flops == run.flops_per_step
    assert plan.tokens_per_day == pytest.approx(128 / plan.bound.bound * 86400)
    assert plan.token_counts == {"this run": 128_000}
    assert plan.days(128_000) == pytest.approx(1000 * plan.bound.bound / 86400)
    assert plan.work.ici_bytes > 0
    assert plan.work.dcn_bytes == 0


def test_the_papers_tokens_are_known_by_the_models_size(plan):
    model = dataclasses.replace(preset("aquila3_8x16b"), vocab_size=152064)
    assert dataclasses.replace(plan, model=model).token_counts["the paper"] == 545e9


def test_the_page_and_the_json_tell_the_same(plan):
    text = page(plan)
    assert text.splitlines()[0].startswith("train on v5e:2x2, 4 chips: fits, with ")
    assert "A bound, not a measurement" in text
    assert len(text.splitlines()) < 60
    told = json.loads(json.dumps(plan.to_dict()))
    assert told["fits"]
    assert told["tokens_per_day"] == plan.tokens_per_day
    assert f"{told['bound']['mfu']:.1%} MFU" in text


def test_a_step_that_does_not_fit_says_by_how_much():
    large = dataclasses.replace(preset("aquila3_7b"), num_layers=8)
    data = Counting(batch_size=4, sequence_length=4096)
    plan, _, _ = make_plan(run_of(large, data=data), FOUR)
    assert not plan.fits
    assert plan.memory.total > plan.capacity
    first = page(plan).splitlines()[0]
    assert "does not fit: needs" in first
    assert "too much" in first


def test_generation_and_growth_are_planned_too():
    decode, _, _ = make_plan(run_of(), FOUR, "decode")
    assert decode.tokens == 8
    # bfloat16 weights: half of training's parameters.
    assert set(decode.memory.resident) == {"parameters", "cache"}
    grown = run_of(
        MIXTURE,
        init_from="parent",
        init_from_model=dataclasses.replace(MIXTURE, num_experts=0, experts_per_token=0),
        growth=ScaleOut(),
    )
    plan, program, _ = make_plan(grown, FOUR, "growth")
    assert plan.fits
    assert plan.tokens == 0
    assert plan.memory.outputs >= bytes_in_four_shards(MIXTURE)
    assert program.what == "growth"


def test_a_run_without_a_growth_has_none_to_plan():
    with pytest.raises(UserError, match="has no growth to plan"):
        make_plan(run_of(), FOUR, "growth")


def test_a_search_keeps_what_fits_and_puts_the_fastest_first():
    tried = []
    plans = search(run_of(), FOUR, 2, tried.append)
    assert len(tried) == 2
    assert [plan.tokens_per_day for plan in plans] == sorted(
        (plan.tokens_per_day for plan in tried if plan.fits), reverse=True
    )
    assert {plan.settings["remat"] for plan in tried} > {"full"}


def test_meshes_multiply_and_divide_the_experts():
    shapes = mesh_shapes(16, MIXTURE)
    assert {shape.expert for shape in shapes} == {1, 2, 4}
    assert all(shape.data * shape.fsdp * shape.expert * shape.model == 16 for shape in shapes)


def test_the_command_needs_neither_data_nor_directories(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    small = ["--gin.MODEL='toy_dense'", "--gin.SEQUENCE_LENGTH=32", "--gin.BATCH_SIZE=4"]
    flags = ["--gin_file=gin_configs/runs/pretrain.gin", "--topology=v5e:2x2", *small]
    save = tmp_path / "step"
    assert cli.main(["plan", *flags, "--gin.VOCAB_SIZE=4096", "--json", f"--save={save}"]) == 0
    assert json.loads(capsys.readouterr().out)["fits"]
    assert save.stat().st_size > 10_000
    assert [path.name for path in tmp_path.iterdir()] == ["step"]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--topology=v5e:3x5"], "no topology v5e:3x5: "),
        (["--topology=v5e:4"], "write CHIP:AxB or CHIP:AxBxC"),
        (["--topology=v5e:2x2", "--gin.MeshShape.fsdp=3"], "does not multiply to 4 devices"),
        (["--topology=v5e:2x2", "--gin.BATCH_SIZE=6"], "batch_size 6 does not divide over the 4"),
        (["--topology=v5e:2x2", "--save=x", "--what=decode"], "--save keeps a train step"),
    ],
)
def test_mistakes_are_one_line(flags, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["plan", "--gin_file=gin_configs/runs/pretrain.gin", *flags]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
