import dataclasses

import pytest

from aquila_jax.planning import parse_topology
from aquila_jax.planning.roofline import Work, roofline

V5P = parse_topology("v5p:2x2x1")
# On four chips of 459e12 FLOP/s, 2765e9 B/s of HBM and 600e9 B/s of links: a second of each.
SECOND = Work(4 * 459e12, 4 * 459e12, 2765e9, 600e9, 6.25e9)


def test_every_resource_has_its_own_peak():
    bound = roofline(SECOND, V5P)
    assert dict(bound.seconds) == pytest.approx({"compute": 1, "HBM": 1, "ICI": 1, "DCN": 1})
    assert bound.mfu == pytest.approx(1)


@pytest.mark.parametrize(
    ("field", "name"),
    [
        ("executed_flops", "compute"),
        ("hbm_bytes", "HBM"),
        ("ici_bytes", "ICI"),
        ("dcn_bytes", "DCN"),
    ],
)
def test_the_slowest_binds(field, name):
    work = dataclasses.replace(SECOND, **{field: 2 * getattr(SECOND, field)})
    bound = roofline(work, V5P)
    assert (bound.binding, bound.bound, bound.mfu) == (name, pytest.approx(2), pytest.approx(0.5))


def test_chips_of_two_devices_send_for_both():
    bound = roofline(SECOND, parse_topology("tpu7x:2x2x1"))
    assert bound.seconds["ICI"] == pytest.approx(2)
    assert bound.seconds["HBM"] == pytest.approx(2 * 2765 / 7380)
