"""One plan that several files look at."""

import pytest

from aquila_jax.planning import Plan, make_plan


@pytest.fixture(scope="session")
def plan() -> Plan:
    from .four_chips import FOUR, run_of

    return make_plan(run_of(), FOUR)[0]
