"""Experts on rows, against NumPy in float64: weighted or not, in one part or in several."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aquila_jax.axes import EMBED, EXPERTS
from aquila_jax.nn.moe.experts import Shards, on_slots, on_sorted_rows
from aquila_jax.planning import parse_topology
from aquila_jax.planning.topology import devices_of
from aquila_jax.sharding import Layout, MeshShape

M, E, D, F = 12, 3, 8, 16
SIZES = np.array([5, 0, 4])  # and three rows behind


def draw():
    random = np.random.default_rng(0)
    shapes = {"rows": (M, D), "gate": (E, D, F), "up": (E, D, F), "down": (E, F, D), "gates": (M,)}
    return {name: random.normal(size=shape) for name, shape in shapes.items()}


def outputs(values, sizes):
    """Of every row that is somebody's."""
    rows, gates = values["rows"], values.get("gates")
    out = []
    for row, expert in enumerate(np.repeat(np.arange(E), sizes)):
        gate = rows[row] @ values["gate"][expert]
        hidden = gate / (1 + np.exp(-gate)) * (rows[row] @ values["up"][expert])
        out.append(hidden @ values["down"][expert] * (1 if gates is None else gates[row]))
    return np.stack(out)


def slope(values, sizes, bar, name):
    """The derivative along a direction, by central differences."""
    direction = np.random.default_rng(1).normal(size=values[name].shape)
    ends = [
        (outputs({**values, name: values[name] + step * direction}, sizes) * bar).sum()
        for step in (1e-5, -1e-5)
    ]
    return direction, (ends[0] - ends[1]) / 2e-5


def check(compute, values, sizes):
    """Outputs and slopes of `compute(**values)`, float32, of rows that are somebody's."""
    used = sizes.sum()
    single = {name: jnp.asarray(value, jnp.float32) for name, value in values.items()}
    expected = outputs(values, sizes)
    np.testing.assert_allclose(jax.jit(compute)(**single)[:used], expected, 1e-4, 1e-4)
    bar = np.random.default_rng(2).normal(size=expected.shape)
    gradients = jax.jit(jax.grad(lambda single: (compute(**single)[:used] * bar).sum()))(single)
    for name, gradient in gradients.items():
        direction, expected = slope(values, sizes, bar, name)
        found = np.asarray(gradient, np.float64)
        if name in ("rows", "gates"):
            found, direction = found[:used], direction[:used]
        np.testing.assert_allclose((found * direction).sum(), expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_sorted_rows_weighted(parts):
    def compute(rows, gate, up, down, gates):
        return on_sorted_rows(rows, Shards(gate, up, down), jnp.asarray(SIZES), gates, parts)

    check(compute, draw(), SIZES)


@pytest.mark.parametrize("parts", [None, 1, 2, 4])
def test_sorted_rows_unweighted(parts):
    def compute(rows, gate, up, down):
        return on_sorted_rows(rows, Shards(gate, up, down), jnp.asarray(SIZES), parts=parts)

    values = draw()
    del values["gates"]
    check(compute, values, SIZES)


def test_slots():
    def compute(rows, gate, up, down, gates):
        return on_slots(rows, Shards(gate, up, down), gates)

    check(compute, draw(), np.array([4, 4, 4]))


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("parts", [1, 2])
def test_shards_of_a_mesh_are_gathered_and_gradients_shared_out(parts, weighted):
    layout = Layout(MeshShape(data=1, fsdp=4, model=2).build())
    matrix = (EXPERTS, EMBED, None)
    specs = ((None, None), matrix, matrix, (EXPERTS, None, EMBED), (None,))

    def on_shard(rows_MD, gate, up, down, gates_M=None):
        shards = Shards(gate, up, down, layout.mesh_axes(EMBED))
        return on_sorted_rows(rows_MD, shards, jnp.asarray(SIZES), gates_M, parts)

    def compute(rows, gate, up, down, *, gates=None):
        given = (rows, gate, up, down) if gates is None else (rows, gate, up, down, gates)
        return layout.shard_map(on_shard, specs[: len(given)], (None, None))(*given)

    values = draw()
    if not weighted:
        del values["gates"]
    check(compute, values, SIZES)


def test_a_tpu_reads_whole_matrices_as_they_lie():
    pytest.importorskip("libtpu", reason="compiling for TPUs needs libtpu")
    rows, embed, hidden = 512, 256, 384
    device = jax.sharding.SingleDeviceSharding(devices_of(parse_topology("v5e:2x2"))[0])

    def argument(*shape, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=device)

    def compute(rows_MD, gate, up, down, sizes_E):
        return on_sorted_rows(rows_MD, Shards(gate, up, down), sizes_E)

    matrices = argument(E, embed, hidden), argument(E, embed, hidden), argument(E, hidden, embed)
    sizes = argument(E, dtype=jnp.int32)
    # Tests ask for exact products, which the TPU's unit does not make of bfloat16.
    with jax.default_matmul_precision("default"):
        lowered = jax.jit(compute).lower(argument(rows, embed), *matrices, sizes)
    program = lowered.compile().as_text() or ""
    # Of any order of dimensions but their own, they would be copies.
    stack = rf"= bf16\[{E},(?:{embed},{hidden}|{hidden},{embed})\]{{([\d,]+)"
    assert set(re.findall(stack, program)) == {"2,1,0"}


def test_hidden_units_are_cut_until_they_are_few_enough(monkeypatch):
    monkeypatch.setattr("aquila_jax.nn.moe.experts._PART_BYTES", 4 * M * 256)
    values = draw()
    gate, up, down = (
        jnp.asarray(np.repeat(values[name], 64, axis), jnp.float32)
        for name, axis in (("gate", 2), ("up", 2), ("down", 1))
    )
    weights = Shards(gate, up, down)

    def widths(gates_M):
        def compute(rows_MD):
            return on_sorted_rows(rows_MD, weights, jnp.asarray(SIZES), gates_M)

        text = str(jax.make_jaxpr(compute)(jnp.zeros((M, D))))
        return {width for width in (1024, 512, 256, 128) if f"f32[{M},{width}]" in text}

    assert widths(jnp.ones(M)) == {256}
    assert widths(None) == {1024}


def test_without_gates_rows_are_in_parts_unless_a_backward_pass_follows(monkeypatch):
    rows, units, part = 4096, 256, 1024
    monkeypatch.setattr("aquila_jax.nn.moe.experts._PART_BYTES", 4 * part * units)
    matrix = jnp.zeros((E, D, units))
    weights = Shards(matrix, matrix, matrix.swapaxes(1, 2))

    def compute(rows_MD):
        return on_sorted_rows(rows_MD, weights, jnp.array([7, 1021, 3000]))

    def heights(function):
        text = str(jax.make_jaxpr(function)(jnp.zeros((rows, D))))
        return {height for height in (4096, 2048, 1024) if f"f32[{height},{units}]" in text}

    assert heights(compute) == {part}
    assert heights(lambda rows_MD: jax.vjp(compute, rows_MD)[0]) == {rows}


@pytest.mark.parametrize(("most", "width"), [(4 * M * 512, 512), (4 * M * 256, 256)])
def test_units_no_more_than_channels_are_cut_only_where_they_are_too_many(monkeypatch, most, width):
    monkeypatch.setattr("aquila_jax.nn.moe.experts._PART_BYTES", 1)
    monkeypatch.setattr("aquila_jax.nn.moe.experts._MOST_PART_BYTES", most)
    channels, units = 512, 1024
    wide = jnp.zeros((E, channels, units))
    weights = Shards(wide, wide, wide.swapaxes(1, 2))

    def compute(rows_MD):
        return on_sorted_rows(rows_MD, weights, jnp.asarray(SIZES), jnp.ones(M))

    text = str(jax.make_jaxpr(compute)(jnp.zeros((M, channels))))
    cut = {w for w in (512, 256, 128) if f"f32[{E},{channels},{w}]" in text}
    assert cut == {width}
