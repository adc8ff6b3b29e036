"""What can be planned of a run."""

import dataclasses

import jax
import pytest

from aquila_jax.errors import UserError
from aquila_jax.growth import ScaleOut
from aquila_jax.planning import make_plan
from aquila_jax.sharding import MeshShape

from ..training.synthetic import MIXTURE, Counting
from .four_chips import FOUR, bytes_in_four_shards, run_of


def test_generation_and_growth_are_planned_too():
    decode, _, _ = make_plan(run_of(), FOUR, "decode")
    assert decode.tokens == 8
    # bfloat16 weights: half of training's parameters.
    assert set(decode.memory.resident) == {"parameters", "cache"}
    # An odd vocabulary, whose width is split in its place; and no expert leaves its devices.
    odd = dataclasses.replace(MIXTURE, vocab_size=33, num_heads=4, num_kv_heads=2)
    split = run_of(odd, mesh=MeshShape(data=1, expert=2, model=2), data=Counting(batch_size=8))
    # The kernels multiply bfloat16, which has no higher precision to ask for.
    with jax.default_matmul_precision("default"):
        generated, _, _ = make_plan(split, FOUR, "decode")
    assert generated.work is not None
    experts = 3 * odd.num_layers * odd.num_experts * odd.embed_dim * odd.expert_dim
    assert generated.work.ici_bytes < experts
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
