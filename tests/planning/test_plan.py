"""Small runs planned for four chips that are not here."""

import dataclasses

import pytest

from aquila_jax import preset
from aquila_jax.sharding import mesh_shapes

from ..training.synthetic import MIXTURE, TINY
from .four_chips import bytes_in_four_shards, run_of


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


def test_meshes_multiply_and_divide_the_experts():
    shapes = mesh_shapes(16, MIXTURE)
    assert {shape.expert for shape in shapes} == {1, 2, 4}
    assert all(shape.data * shape.fsdp * shape.expert * shape.model == 16 for shape in shapes)
