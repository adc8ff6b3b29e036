"""Settings tried for a plan."""

from aquila_jax.planning import search

from .four_chips import FOUR, run_of


def test_a_search_keeps_what_fits_and_puts_the_fastest_first():
    tried = []
    plans = search(run_of(), FOUR, 2, tried.append)
    assert len(tried) == 2
    assert [plan.tokens_per_day for plan in plans] == sorted(
        (plan.tokens_per_day for plan in tried if plan.fits), reverse=True
    )
    assert {plan.settings["remat"] for plan in tried} > {"full"}
