"""Settings tried for a plan."""

import dataclasses
import importlib

from aquila_jax.planning import search

from ..training.synthetic import Counting
from .four_chips import FOUR, run_of


def test_a_search_keeps_what_fits_and_puts_the_fastest_first():
    tried = []
    plans = search(run_of(), FOUR, 2, tried.append)
    assert len(tried) == 2
    assert [plan.tokens_per_day for plan in plans] == sorted(
        (plan.tokens_per_day for plan in tried if plan.fits), reverse=True
    )
    assert {plan.settings["remat"] for plan in tried} > {"full"}


def test_a_search_parts_a_batch_that_does_not_fit(plan, monkeypatch):
    room = plan.capacity - plan.memory.arguments

    def made(run, *_, **__):
        # As a compiler that asks for two and a half times the room, less with every part.
        temporaries = 2.5 * room / run.micro_batches
        memory = dataclasses.replace(plan.memory, temporaries=temporaries)
        settings = {**plan.settings, "micro_batches": run.micro_batches, "remat": run.remat}
        work = plan.work if temporaries <= room else None
        changed = dataclasses.replace(plan, memory=memory, settings=settings, work=work)
        return changed, None, None

    # The package has a function of the module's name.
    module = importlib.import_module("aquila_jax.planning.search")
    monkeypatch.setattr(module, "make_plan", made)
    tried = []
    # Twelve rows on a chip, which three parts divide.
    plans = search(run_of(data=Counting(batch_size=48, vocab_size=32)), FOUR, 3, tried.append)
    assert [plan.settings["micro_batches"] for plan in tried] == [1, 3, 3]
    assert [plan.settings["remat"] for plan in tried] == ["full", "full", "offload"]
    assert [plan.fits for plan in tried] == [False, True, True]
    assert len(plans) == 2
