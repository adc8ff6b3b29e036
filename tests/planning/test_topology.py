"""Devices of slices that are not here."""

import importlib.util
import os

import pytest

from aquila_jax.errors import UserError
from aquila_jax.planning import parse_topology
from aquila_jax.planning.topology import devices_of

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="compiling for TPUs needs libtpu"
)


@needs_libtpu
@pytest.mark.parametrize(
    ("name", "slices", "count"), [("v5e:2x4", 1, 8), ("v5p:2x2x2", 2, 16), ("tpu7x:2x2x1", 1, 8)]
)
def test_there_are_as_many_as_the_slices_have(name, slices, count):
    topology = parse_topology(name, slices)
    devices = devices_of(topology)
    assert len(devices) == count == topology.num_chips * topology.chip.devices
    assert {device.platform for device in devices} == {"tpu"}
    assert len({getattr(device, "slice_index", 0) for device in devices}) == slices


@needs_libtpu
def test_no_such_slice_is_one_line_and_standard_error_is_whole(capfd):
    with pytest.raises(UserError, match="no topology v5e:3x5: ") as refused:
        devices_of(parse_topology("v5e:3x5"))
    assert "\n" not in str(refused.value)
    os.write(2, b"still here")
    assert capfd.readouterr().err.endswith("still here")


def test_without_libtpu_the_way_to_get_it_is_told(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'aquila-jax\[tpu\]'"):
        devices_of(parse_topology("v5e:2x2"))
