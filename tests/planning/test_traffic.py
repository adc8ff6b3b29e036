"""Bytes of collectives against closed forms, by hand and as a TPU's compiler schedules them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from aquila_jax.planning import parse_topology
from aquila_jax.planning.hlo import parse
from aquila_jax.planning.topology import devices_of
from aquila_jax.planning.traffic import Collective, traffic_of

ONE_SLICE = np.zeros(8, int)
TWO_SLICES = np.repeat([0, 1], 4)
ALL = np.arange(8)[None]
PAIRS = np.asarray([[n, n + 4] for n in range(4)])


@pytest.mark.parametrize(
    ("kind", "groups", "slices", "ici", "dcn"),
    [
        ("all-gather", ALL, ONE_SLICE, 700, 0),
        ("reduce-scatter", ALL, ONE_SLICE, 700, 0),
        ("all-reduce", ALL, ONE_SLICE, 1400, 0),
        ("all-to-all", ALL, ONE_SLICE, 700, 0),
        # Each slice gathers its four, and each chip fetches a quarter of the other slice's half.
        ("all-gather", ALL, TWO_SLICES, 600, 100),
        ("all-reduce", ALL, TWO_SLICES, 1200, 200),
        # Nothing can be shared: four of eight parts are for the other slice.
        ("all-to-all", ALL, TWO_SLICES, 300, 400),
        ("all-reduce", PAIRS, TWO_SLICES, 0, 800),
        ("collective-permute", PAIRS, ONE_SLICE, 800, 0),
        ("collective-permute", PAIRS, TWO_SLICES, 0, 800),
    ],
)
def test_bytes_sent_by_a_chip(kind, groups, slices, ici, dcn):
    once = Collective(kind, 800.0, groups, 1, "")
    assert once.sent(slices) == pytest.approx((ici, dcn))
    thrice = Collective(kind, 800.0, groups, 3, "")
    assert thrice.sent(slices) == pytest.approx((3 * ici, 3 * dcn))


def test_axes_are_those_along_which_members_differ():
    shape = [("one", 2), ("two", 2), ("three", 2)]
    assert Collective("all-gather", 1.0, PAIRS, 1, "").axes(shape) == ("one",)
    assert Collective("all-gather", 1.0, ALL, 1, "").axes(shape) == ("one", "two", "three")
    pairs = np.asarray([[0, 3], [1, 2], [4, 7], [5, 6]])
    assert Collective("all-gather", 1.0, pairs, 1, "").axes(shape) == ("two", "three")


def mesh_of_four() -> Mesh:
    pytest.importorskip("libtpu", reason="compiling for TPUs needs libtpu")
    devices = np.asarray(devices_of(parse_topology("v5e:2x2"))).reshape(2, 2)
    return Mesh(devices, ("a", "b"), axis_types=(AxisType.Auto,) * 2)


SIZE, WIDTH, LAYERS = 1024, 512, 3
WHOLE = SIZE * WIDTH * 4


def over_both(x):
    """In each of three layers: gather over a, scatter over a, exchange over b, reduce over b."""

    def layer(x, _):
        whole = jax.lax.all_gather(x, "a", axis=0, tiled=True)
        x = jax.lax.psum_scatter(jnp.sin(whole), "a", scatter_dimension=0, tiled=True)
        x = jax.lax.all_to_all(jnp.cos(x), "b", split_axis=0, concat_axis=1, tiled=True)
        x = jax.lax.all_to_all(jnp.tan(x), "b", split_axis=1, concat_axis=0, tiled=True)
        return jax.lax.psum(jnp.exp(x), "b"), None

    x, _ = jax.lax.scan(layer, x, length=LAYERS)
    return x


def test_a_program_of_known_traffic():
    mesh = mesh_of_four()
    spec = PartitionSpec("a")
    mapped = jax.shard_map(over_both, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    x = jax.ShapeDtypeStruct((SIZE, WIDTH), jnp.float32, sharding=NamedSharding(mesh, spec))
    text = jax.jit(mapped).lower(x).compile().as_text()
    traffic = traffic_of(parse(text or ""), 4)
    sums: dict[tuple[str, tuple[str, ...]], float] = {}
    for found in traffic.collectives:
        key = found.kind, found.axes([("a", 2), ("b", 2)])
        sums[key] = sums.get(key, 0.0) + found.sent(np.zeros(4, int))[0]
    half = WHOLE // 2  # what a chip holds
    expected = {
        ("all-gather", ("a",)): LAYERS * WHOLE / 2,
        ("reduce-scatter", ("a",)): LAYERS * WHOLE / 2,
        ("all-to-all", ("b",)): LAYERS * 2 * half / 2,
        ("all-reduce", ("b",)): LAYERS * half,
    }
    assert traffic.unknown_loops == 0
    assert sums == pytest.approx(expected)


@functools.cache
def gathered_by_the_compiler() -> tuple[float, int]:
    """ZeRO-3 by GSPMD: a weight in shards, used whole in each of three layers."""
    mesh = mesh_of_four()
    rows = NamedSharding(mesh, PartitionSpec(("a", "b")))
    layers = NamedSharding(mesh, PartitionSpec(None, ("a", "b")))

    def model(x, w):
        y, _ = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)
        return y

    x = jax.ShapeDtypeStruct((4096, WIDTH), jnp.bfloat16, sharding=rows)
    w = jax.ShapeDtypeStruct((LAYERS, WIDTH, WIDTH), jnp.bfloat16, sharding=layers)
    compiled = jax.jit(model, out_shardings=rows).lower(x, w).compile()
    traffic = traffic_of(parse(compiled.as_text() or ""), 4)
    sent = sum(c.sent(np.zeros(4, int))[0] for c in traffic.collectives)
    return sent, sum(c.trips for c in traffic.collectives)


def test_weights_gathered_in_a_scan_are_sent_once_a_layer():
    sent, count = gathered_by_the_compiler()
    assert count == LAYERS
    assert sent == pytest.approx(LAYERS * WIDTH * WIDTH * 2 * 3 / 4)


def test_sums_over_slices_cross_between_them():
    """Of 4096 numbers each chip has a sum of its slice's; the two slices' are added once."""
    devices = np.asarray(devices_of(parse_topology("v5p:2x2x1", slices=2))).reshape(2, 4)
    mesh = Mesh(devices, ("slice", "fsdp"), axis_types=(AxisType.Auto,) * 2)
    x = jax.ShapeDtypeStruct(
        (8, 4096), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec(("slice", "fsdp")))
    )
    whole = NamedSharding(mesh, PartitionSpec())
    compiled = jax.jit(lambda x: x.sum(0), out_shardings=whole).lower(x).compile()
    sent = [c.sent(TWO_SLICES) for c in traffic_of(parse(str(compiled.as_text())), 8).collectives]
    assert sum(dcn for _, dcn in sent) == 4096 * 4
    assert sum(ici for ici, _ in sent) == 2 * 3 / 4 * 4096 * 4


# What XLA for tpu7x writes of a collective that it gives to a SparseCore.
ON_ANOTHER_CORE = """\
HloModule program, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%given (p: f32[8,4], t: token[]) -> f32[8,4] {
  %t = token[] parameter(1)
  %p = f32[8,4]{1,0} parameter(0)
  ROOT %reduced = f32[8,4]{1,0} all-reduce(%p), channel_id=1, \
replica_groups=mesh['a'=2,'b'=2] {'b'}, use_global_device_ids=true, to_apply=%add
}, execution_thread="sparsecore"

ENTRY %main (x: f32[8,4]) -> f32[8,4] {
  %x = f32[8,4]{1,0} parameter(0)
  %ready = token[] custom-call(), custom_call_target="PrepareAsyncCallDone"
  %begun = ((f32[8,4]{1,0}, token[]), f32[8,4]{1,0}) call-start(%x, %ready), \
async_execution_thread="sparsecore", to_apply=%given
  ROOT %done = f32[8,4]{1,0} call-done(%begun)
}
"""


def test_what_another_core_of_the_chip_sends_counts_once():
    (found,) = traffic_of(parse(ON_ANOTHER_CORE), 4).collectives
    assert (found.kind, found.size, found.trips) == ("all-reduce", 8 * 4 * 4, 1)
    assert found.axes([("a", 2), ("b", 2)]) == ("b",)
