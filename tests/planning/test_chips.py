import pytest

from aquila_jax.errors import UserError
from aquila_jax.planning import CHIPS, parse_topology
from aquila_jax.planning.topology import devices_of
from aquila_jax.sharding import MeshShape


def test_a_topology_counts_chips_and_devices():
    topology = parse_topology("tpu7x:4x4x4", slices=2)
    assert (topology.num_chips, topology.num_devices) == (128, 256)
    assert topology.name == "tpu7x:4x4x4"
    assert str(topology) == "2 slices of tpu7x:4x4x4, 128 chips"


@pytest.mark.parametrize("chip", CHIPS.values(), ids=str)
def test_every_chip_has_an_example(chip):
    assert parse_topology(chip.example).chip == chip


@pytest.mark.parametrize(
    ("text", "slices", "said"),
    [
        ("v5p", 1, "as in v5e:16x16, v5p:4x4x8"),
        ("v9:2x2", 1, "no topology 'v9:2x2'"),
        ("v5p:4x4", 1, "a slice of v5p has 3 dimensions"),
        ("v5e:2x2x2", 1, "a slice of v5e has 2 dimensions"),
        ("v5e:0x4", 1, "all at least 1"),
        ("v5e:2x2", 0, "slices must be 1 or more, not 0"),
    ],
)
def test_what_is_no_topology_is_refused(text, slices, said):
    with pytest.raises(UserError, match=said):
        parse_topology(text, slices)


def test_a_mesh_may_split_a_side_of_the_torus():
    pytest.importorskip("libtpu", reason="topologies need libtpu")
    devices = devices_of(parse_topology("v6e:16x16"))
    mesh = MeshShape(data=1, fsdp=32, expert=8).build(devices)
    assert (mesh.shape["fsdp"], mesh.shape["expert"]) == (32, 8)
    assert {device.id for device in mesh.devices.flat} == {device.id for device in devices}
