"""Slots turned around on a TPU: what lies at a slot, and values that lie there brought back.

Both are one scalar load and one scalar store for each pair, in SMEM. A table that is too large
for it is cut up, and every part sees all pairs. Tables are copied to and from SMEM whole and not
as blocks of the grid, of which Pallas would keep two.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from aquila_jax.kernels.backend import pallas_call
from aquila_jax.kernels.tiles import LANES

# Entries of all tables that are in SMEM at a time, 768 KiB of its megabyte, and pairs of a block.
ENTRIES = 3 * 2**16
BLOCK = 4096
UNROLLED = 16


def invert(
    slots_Nk: jax.Array, *gates_Nk: jax.Array, num_rows: int, interpret: bool
) -> tuple[jax.Array, ...]:
    """The token of each row, -1 where there is none, and where given its gate (else undefined)."""
    values = [_as_int(_blocks(gates, 0)) for gates in gates_Nk]
    num_tables = 1 + len(values)
    parts, size = _parts(num_rows, num_tables)
    slots = _blocks(slots_Nk, -1)
    by_pair = _by_pair(slots.shape[2], lambda part, block: (block, 0, 0))
    shape = jax.ShapeDtypeStruct((1, parts * size), jnp.int32)
    tables = pallas_call(
        functools.partial(_invert_body, size, slots_Nk.shape[1]),
        jnp.full((1, size + LANES), -1, jnp.int32),
        slots,
        *values,
        name="invert",
        interpret=interpret,
        grid=(parts, len(slots)),
        in_specs=[pl.BlockSpec(memory_space=pl.ANY)] + [by_pair] * num_tables,
        out_specs=[pl.BlockSpec(memory_space=pl.ANY)] * num_tables,
        out_shape=[shape] * num_tables,
        scratch_shapes=[pltpu.SMEM((1, size + LANES), jnp.int32)] * num_tables,
        cost=_cost(parts * slots.size, num_tables),
    )
    token_M, *gates = (x[0, :num_rows] for x in tables)
    return token_M, *(jax.lax.bitcast_convert_type(x, jnp.float32) for x in gates)


def _invert_body(size: int, num_choices: int, empty_ref, slots_ref, *refs) -> None:
    num = (len(refs) + 1) // 3  # tables
    values_refs, out_refs, tables = refs[: num - 1], refs[num - 1 : -num], refs[-num:]
    part, block = pl.program_id(0), pl.program_id(1)
    num_tokens = slots_ref.shape[2] // num_choices

    @pl.when(block == 0)
    def _() -> None:
        pltpu.sync_copy(empty_ref, tables[0])

    def store(token: jax.Array, pair: jax.Array) -> None:
        at = _entry(slots_ref[0, 0, pair] - part * size, size)
        tables[0][0, at] = block * num_tokens + token
        for values_ref, table in zip(values_refs, tables[1:], strict=True):
            table[0, at] = values_ref[0, 0, pair]

    _for_pairs(num_tokens, num_choices, store)

    @pl.when(block == pl.num_programs(1) - 1)
    def _() -> None:
        for table, out_ref in zip(tables, out_refs, strict=True):
            pltpu.sync_copy(table.at[:, pl.ds(0, size)], _part(out_ref, part, size))


def look_up(values_M: jax.Array, slots_Nk: jax.Array, *, interpret: bool) -> jax.Array:
    """float32 [N, k]: `values_M` at each slot, zero where it is not in [0, M)."""
    parts, size = _parts(len(values_M), 1)
    table = _as_int(jnp.pad(values_M, (0, parts * size - len(values_M))))[None]
    slots = _blocks(slots_Nk, -1)
    by_pair = _by_pair(slots.shape[2], lambda block, part: (block, 0, 0))
    found = pallas_call(
        functools.partial(_look_up_body, size, parts, slots_Nk.shape[1]),
        table,
        slots,
        name="look_up",
        interpret=interpret,
        grid=(len(slots), parts),
        in_specs=[pl.BlockSpec(memory_space=pl.ANY), by_pair],
        out_specs=by_pair,
        scratch_shapes=[pltpu.SMEM((1, size + LANES), jnp.int32)],
        out_shape=jax.ShapeDtypeStruct(slots.shape, jnp.int32),
        cost=_cost(parts * slots.size, 1),
    )
    found = jax.lax.bitcast_convert_type(found, jnp.float32)
    return found.reshape(-1, slots_Nk.shape[1])[: len(slots_Nk)]


def _look_up_body(
    size: int, num_parts: int, num_choices: int, values_ref, slots_ref, found_ref, table
) -> None:
    block, part = pl.program_id(0), pl.program_id(1)

    @pl.when((block == 0) | (num_parts > 1))
    def _() -> None:
        pltpu.sync_copy(_part(values_ref, part, size), table.at[:, pl.ds(0, size)])
        table[0, size] = 0

    def load(_: jax.Array, pair: jax.Array) -> None:
        found = table[0, _entry(slots_ref[0, 0, pair] - part * size, size)]
        # One part has the slot; the others give the zero behind their last entry.
        earlier = 0 if num_parts == 1 else jnp.where(part == 0, 0, found_ref[0, 0, pair])
        found_ref[0, 0, pair] = earlier | found

    _for_pairs(slots_ref.shape[2] // num_choices, num_choices, load)


def _for_pairs(
    num_tokens: int, num_choices: int, visit: Callable[[jax.Array, jax.Array], None]
) -> None:
    """`visit(token, pair)` for all pairs of a block, several at a time, without a division."""
    together = max(1, UNROLLED // pl.next_power_of_2(num_choices))

    def tokens(index: jax.Array, _: None) -> None:
        for offset in range(together):
            token = index * together + offset
            for choice in range(num_choices):
                visit(token, index * (together * num_choices) + offset * num_choices + choice)

    jax.lax.fori_loop(0, num_tokens // together, tokens, None)


def _entry(slot: jax.Array, size: int) -> jax.Array:
    """The entry of a slot in a part of the table; what is outside shares one behind the last."""
    slot = jax.lax.bitcast_convert_type(slot, jnp.uint32)  # below zero becomes very large
    at = jnp.minimum(slot, jnp.uint32(size))
    return jax.lax.bitcast_convert_type(at, jnp.int32)


def _parts(num_rows: int, num_tables: int) -> tuple[int, int]:
    """How many parts each of so many tables has, and of how many entries."""
    parts = pl.cdiv(num_rows, ENTRIES // num_tables)
    return parts, LANES * pl.cdiv(pl.cdiv(num_rows, parts), LANES)


def _part(table_ref, part: jax.Array, size: int):
    """Of a table in HBM, [1, entries]."""
    return table_ref.at[:, pl.ds(pl.multiple_of(part * size, LANES), size)]


def _blocks(x_Nk: jax.Array, absent: int) -> jax.Array:
    """[N, k] to [blocks, 1, pairs], whole tokens and whole lanes, filled up with `absent`."""
    num_tokens, num_choices = x_Nk.shape
    most = LANES * max(1, BLOCK // (LANES * num_choices))
    block = min(most, LANES * pl.cdiv(num_tokens, LANES))
    x_Nk = jnp.pad(x_Nk, ((0, -num_tokens % block), (0, 0)), constant_values=absent)
    return x_Nk.reshape(-1, 1, block * num_choices)


def _by_pair(length: int, index_map) -> pl.BlockSpec:
    return pl.BlockSpec((1, 1, length), index_map, memory_space=pltpu.SMEM)


def _as_int(x: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.int32)


def _cost(pairs: int, tables: int) -> pl.CostEstimate:
    return pl.CostEstimate(flops=pairs, transcendentals=0, bytes_accessed=4 * pairs * (1 + tables))
