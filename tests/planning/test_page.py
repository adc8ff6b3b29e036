"""What a plan tells a person, and a program."""

import dataclasses
import json

from aquila_jax import preset
from aquila_jax.planning import make_plan, page

from ..training.synthetic import Counting
from .four_chips import FOUR, run_of


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
