"""Rows gathered on a TPU and summed with weights: permute, unpermute and both their gradients.

Rows lie anywhere in HBM, and each comes by a DMA of its own into VMEM, while the rows of the tile
before are summed. Two bfloat16 rows share words of 32 bits and cannot be read apart, so the pair
comes and half of it is used. It would cost as much to lay the rows out anew.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from aquila_jax.kernels.backend import pallas_call
from aquila_jax.kernels.tiles import LANES, SUBLANES

# Rows that are gathered for one tile, as many as lanes; their weights are transposed at once.
ROWS = LANES
# The upper half of a word, and NaN: bfloat16 is the upper half of float32.
UPPER, NAN = -65536, 0x7FC00000


class _Tiling(NamedTuple):
    """How the result is cut up.

    Attributes:
        packing: rows that share a word: 2 in bfloat16, else 1.
        choices: k, rows that are summed.
        words: rows of words of the result in one tile: a multiple of 8.
        tiles: number of tiles.
    """

    packing: int
    choices: int
    words: int
    tiles: int

    @classmethod
    def of(cls, dtype: jnp.dtype, num_tokens: int, choices: int) -> "_Tiling":
        packing = 4 // dtype.itemsize
        groups = max(1, ROWS // (SUBLANES * packing * choices))
        words = SUBLANES * groups
        return cls(packing, choices, words, pl.cdiv(num_tokens, words * packing))

    @property
    def planes(self) -> int:
        """Rows that are gathered for one of words: of each place in it, each choice."""
        return self.packing * self.choices

    @property
    def rows(self) -> int:
        """Rows that one tile gathers, in the order [row of words, place in the word, choice]."""
        return self.words * self.planes

    def of_words(self, first: jax.Array | int, size: int) -> Any:
        """Rows of words, counted in rows."""
        size *= self.packing
        first *= self.packing
        return pl.ds(first if isinstance(first, int) else pl.multiple_of(first, size), size)

    def group(self, choice: int, place: int, index: jax.Array) -> jax.Array:
        """Which 8 gathered rows belong to the `index`th 8 words' rows of the result."""
        return (place * self.choices + choice) * (self.words // SUBLANES) + index

    def numbers(self, plane: int) -> Any:
        """Where the numbers of a plane's rows are among the tile's."""
        return pl.ds(plane, self.words, stride=self.planes)

    def own(self, plane: int) -> Any:
        """The same where a plane's are together."""
        return pl.ds(plane * self.words, self.words)

    def specs(self, dim: int) -> tuple[pl.BlockSpec, pl.BlockSpec, pl.BlockSpec]:
        """Blocks of numbers of rows that are sent for and that are summed, and of the result.

        Step t of the grid sends for tile t and sums tile t - 1.
        """

        def summed(t: jax.Array) -> jax.Array:
            return jnp.maximum(t - 1, 0)

        shape = (1, 1, self.rows)
        return (
            pl.BlockSpec(
                shape, lambda t: (jnp.minimum(t, self.tiles - 1), 0, 0), memory_space=pltpu.SMEM
            ),
            pl.BlockSpec(shape, lambda t: (summed(t), 0, 0)),
            pl.BlockSpec((self.words * self.packing, dim), lambda t: (summed(t), 0)),
        )

    def scratch(self, dim: int, dtype: jnp.dtype) -> list[Any]:
        """As `_Scratch` has it."""
        return [
            pltpu.VMEM((2, self.rows // SUBLANES, SUBLANES * self.packing, dim), dtype),
            pltpu.SemaphoreType.DMA((2,)),
            pltpu.VMEM((self.rows, LANES), jnp.float32),
            pltpu.VMEM((self.rows, LANES), jnp.int32),
            pltpu.VMEM((self.rows, LANES), jnp.float32),
        ]

    def vmem_bytes(self, dim: int) -> int:
        """Two tiles of gathered rows, of the result and of others, and some room."""
        return 8 * dim * (self.rows + 2 * self.words) + 4 * 2**20

    def by_tile(self, x_Nk: jax.Array, absent: int) -> jax.Array:
        """[N, k] to [tiles, 1, rows], filled up with `absent`."""
        filled = self.tiles * self.words * self.packing
        x_Nk = jnp.pad(x_Nk, ((0, filled - len(x_Nk)), (0, 0)), constant_values=absent)
        return x_Nk.reshape(self.tiles, 1, self.rows)


def gather_sum(
    rows_MD: jax.Array,
    slots_Nk: jax.Array,
    gates_Nk: jax.Array | None,
    others_ND: jax.Array | None = None,
    *,
    name: str,
    interpret: bool,
) -> tuple[jax.Array, ...]:
    """The sum over j of `gates_Nk[n, j] * rows_MD[slots_Nk[n, j]]`, in float32 in the order of j.

    Args:
        rows_MD: bfloat16 or float32.
        slots_Nk: int32; a slot outside of [0, M) adds nothing.
        gates_Nk: float32; None for ones, and then one row alone is copied bit by bit.
        others_ND: float32 or bfloat16 as the rows; for k = 1.
        name: the kernel's, in profiles.
        interpret: whether to carry it out on a CPU.

    Returns:
        The sums [N, D] in the dtype of the rows, and where there are others their float32 inner
        products [N] with the gathered rows, weights aside; what a row without a slot gets there
        is undefined.
    """
    num_tokens, num_choices = slots_Nk.shape
    num_rows, dim = rows_MD.shape
    tiling = _Tiling.of(rows_MD.dtype, num_tokens, num_choices)
    rows_MD = _padded(rows_MD, tiling.packing)
    others_ND = None if others_ND is None else _padded(others_ND, 1)
    filled_dim = rows_MD.shape[1]

    inputs = _inputs(tiling, rows_MD, num_rows, slots_Nk, gates_Nk, others_ND)
    present = [name for name, value in inputs._asdict().items() if value is not None]
    operands, in_specs = zip(*(getattr(inputs, name) for name in present), strict=True)
    _, per_row, tile = tiling.specs(filled_dim)
    out_specs = [tile]
    out_shape = [jax.ShapeDtypeStruct((num_tokens, filled_dim), rows_MD.dtype)]
    if others_ND is not None:
        out_specs.append(per_row)
        out_shape.append(jax.ShapeDtypeStruct((tiling.tiles, 1, tiling.rows), jnp.float32))
    out_ND, *products = pallas_call(
        functools.partial(_body, tiling, present),
        *operands,
        name=name,
        interpret=interpret,
        grid=(tiling.tiles + 1,),
        in_specs=list(in_specs),
        out_specs=out_specs,
        out_shape=out_shape,
        scratch_shapes=tiling.scratch(filled_dim, rows_MD.dtype),
        cost=pl.CostEstimate(
            flops=2 * slots_Nk.size * dim,
            transcendentals=0,
            bytes_accessed=slots_Nk.size * dim * 4 + num_tokens * dim * rows_MD.dtype.itemsize,
        ),
        vmem_bytes=max(16 * 2**20, tiling.vmem_bytes(filled_dim)),
    )
    return out_ND[:, :dim], *(x.reshape(-1)[:num_tokens] for x in products)


def _padded(x_ND: jax.Array, multiple: int) -> jax.Array:
    """Filled up to whole words and lanes; in models there is nothing to fill."""
    padding = ((0, -x_ND.shape[0] % multiple), (0, -x_ND.shape[1] % LANES))
    return jnp.pad(x_ND, padding) if any(after for _, after in padding) else x_ND


class _Inputs(NamedTuple):
    """Of the kernel: values and blocks outside of it, references inside.

    Attributes:
        sources: int32 first row of the words that each row is in, a valid one also where there
            is none.
        places: int32 place of the row in its words; -1 where there is none.
        gates: float32 weight of each row.
        others: rows of the tile that gathered ones are multiplied with.
        rows: in HBM, of which rows are gathered.
    """

    sources: Any
    places: Any
    gates: Any
    others: Any
    rows: Any


def _inputs(
    tiling: _Tiling,
    rows_MD: jax.Array,
    num_rows: int,
    slots_Nk: jax.Array,
    gates_Nk: jax.Array | None,
    others_ND: jax.Array | None,
) -> _Inputs:
    """Values and blocks; slots that are not in [0, num_rows) become the first row, masked."""
    slots = tiling.by_tile(slots_Nk, -1)
    is_present = (slots >= 0) & (slots < num_rows)
    slots = jnp.where(is_present, slots, 0)
    fetched, per_row, tile = tiling.specs(rows_MD.shape[1])
    return _Inputs(
        sources=(slots - slots % tiling.packing, fetched),
        places=(jnp.where(is_present, slots % tiling.packing, -1), per_row),
        gates=None if gates_Nk is None else (tiling.by_tile(gates_Nk, 0), per_row),
        others=None if others_ND is None else (others_ND, tile),
        rows=(rows_MD, pl.BlockSpec(memory_space=pl.ANY)),
    )


class _Scratch(NamedTuple):
    """What a kernel keeps in VMEM: two tiles' rows, and numbers of each row on all lanes.

    Attributes:
        buffer: [2, rows / 8, 8, D] words as they come; tiles take turns.
        semaphores: that their DMAs count on.
        numbers: of rows as they come, in the tile's order; the others have a plane's together.
        cut: by how many bits a word is moved up so that its upper half is the row's, and nothing of
            it but a sign where there is no row; of whole words, the bits that are kept, none there.
        gates: weights; in the end of a tile, inner products.
    """

    buffer: Any
    semaphores: Any
    numbers: Any
    cut: Any
    gates: Any


def _body(tiling: _Tiling, present: list[str], *refs) -> None:
    """One step: rows of this tile are sent for while those of the tile before are summed."""
    inputs = _Inputs(**{**dict.fromkeys(_Inputs._fields), **dict(zip(present, refs, strict=False))})
    scratch = _Scratch(*refs[-len(_Scratch._fields) :])
    out_ref, *products = refs[len(present) : -len(_Scratch._fields)]
    step = pl.program_id(0)
    now, before = step % 2, 1 - step % 2

    @pl.when(step > 0)
    def _() -> None:
        _wait(scratch, before)

    _lay_out(tiling, inputs, scratch)

    def group(index: jax.Array, _: None) -> None:
        _send(tiling, inputs, scratch, now, index)
        _sum(tiling, inputs, scratch, before, index, out_ref)

    jax.lax.fori_loop(0, tiling.words // SUBLANES, group, None)
    if products:
        for plane in range(tiling.planes):
            scratch.numbers[tiling.numbers(plane), :] = scratch.gates[tiling.own(plane), :]
        products[0][0] = jnp.sum(scratch.numbers[...].T, axis=0, keepdims=True)

    # The last tile is sent for twice, so that no step is a special case.
    @pl.when(step == tiling.tiles)
    def _() -> None:
        _wait(scratch, now)


def _lay_out(tiling: _Tiling, inputs: _Inputs, scratch: _Scratch) -> None:
    """What summing needs to know of each row, on all lanes, a plane's rows together."""
    scratch.numbers[...] = _down(inputs.places[0].astype(jnp.float32))
    for plane in range(tiling.planes):
        place = scratch.numbers[tiling.numbers(plane), :]
        if tiling.packing == 2:
            cut = jnp.where(place < 0, 31, jnp.where(place > 0, 0, 16))
        else:
            cut = jnp.where(place < 0, 0, -1)
        scratch.cut[tiling.own(plane), :] = cut
    if inputs.gates is not None:
        scratch.numbers[...] = _down(inputs.gates[0])
        for plane in range(tiling.planes):
            scratch.gates[tiling.own(plane), :] = scratch.numbers[tiling.numbers(plane), :]


def _wait(scratch: _Scratch, slot: jax.Array) -> None:
    """One wait for all rows of a tile: a semaphore counts bytes."""
    buffer = scratch.buffer.at[slot]
    pltpu.make_async_copy(buffer, buffer, scratch.semaphores.at[slot]).wait()


def _down(x: jax.Array) -> jax.Array:
    """[1, rows] to [rows, 128], equal on all lanes."""
    return jnp.broadcast_to(x, (LANES, x.shape[1])).T


def _send(
    tiling: _Tiling, inputs: _Inputs, scratch: _Scratch, slot: jax.Array, index: jax.Array
) -> None:
    """Starts the DMAs of the rows that belong to 8 rows of words."""

    def send(plane: jax.Array, _: None) -> None:
        group = plane * (tiling.words // SUBLANES) + index
        first = index * (SUBLANES * tiling.planes) + plane
        # What differs between the 8 is static: addresses cost more than the DMA's start.
        for offset in range(SUBLANES):
            source = inputs.sources[0, 0, first + offset * tiling.planes]
            pltpu.make_async_copy(
                inputs.rows.at[pl.ds(pl.multiple_of(source, tiling.packing), tiling.packing)],
                scratch.buffer.at[slot, group, tiling.of_words(offset, 1)],
                scratch.semaphores.at[slot],
            ).start()

    jax.lax.fori_loop(0, tiling.planes, send, None)


def _sum(
    tiling: _Tiling,
    inputs: _Inputs,
    scratch: _Scratch,
    slot: jax.Array,
    index: jax.Array,
    out_ref,
) -> None:
    """8 rows of words of the result, 128 lanes after the other."""
    own = tiling.of_words(index * SUBLANES, SUBLANES)
    is_copy = tiling.choices == 1 and inputs.gates is None
    products = [jnp.zeros((SUBLANES, LANES), jnp.float32)] * tiling.packing
    # Lanes are static: what addresses them would take longer than the sums.
    for lane in range(0, out_ref.shape[1], LANES):
        lanes = pl.ds(lane, LANES)
        sums = []
        for place in range(tiling.packing):
            total = None
            for choice in range(tiling.choices):
                group = tiling.group(choice, place, index)
                x = _row(tiling, scratch, slot, group, lanes)
                if inputs.others is not None:
                    other = pltpu.bitcast(inputs.others[own, lanes], jnp.int32)
                    if tiling.packing == 2:
                        other = other & UPPER if place else other << 16
                    products[place] += x * jax.lax.bitcast_convert_type(other, jnp.float32)
                x = x if inputs.gates is None else scratch.gates[_eight(group), :] * x
                total = x if total is None else total + x
            sums.append(total)
        if tiling.packing == 1:
            word = jax.lax.bitcast_convert_type(sums[0], jnp.int32)
        else:
            low, high = (_upper(x, is_exact=is_copy) for x in sums)
            word = jax.lax.shift_right_logical(low, 16) | high
        out_ref[own, lanes] = pltpu.bitcast(word, out_ref.dtype)
    if inputs.others is not None:
        for place in range(tiling.packing):
            scratch.gates[_eight(tiling.group(0, place, index)), :] = products[place]


def _row(
    tiling: _Tiling, scratch: _Scratch, slot: jax.Array, group: jax.Array, lanes: Any
) -> jax.Array:
    """128 lanes of 8 gathered rows, float32; zero, of either sign, where there is none."""
    words = scratch.buffer[slot, group, :, lanes]
    words = pltpu.bitcast(words, jnp.int32)
    cut = scratch.cut[_eight(group), :]
    words = (words << cut) & UPPER if tiling.packing == 2 else words & cut
    return jax.lax.bitcast_convert_type(words, jnp.float32)


def _eight(group: jax.Array) -> Any:
    return pl.ds(pl.multiple_of(group * SUBLANES, SUBLANES), SUBLANES)


def _upper(x: jax.Array, *, is_exact: bool) -> jax.Array:
    """float32 to the bits of the nearest bfloat16, in the upper half of a word; ties to even."""
    bits = jax.lax.bitcast_convert_type(x, jnp.int32)
    if is_exact:
        return bits
    odd = jax.lax.shift_right_logical(bits, 16) & 1
    return jnp.where(jnp.isnan(x), NAN, bits + 0x7FFF + odd) & UPPER
