"""`route` on a TPU: one pass over the logits, in tiles of tokens.

Tiles come in order; what an expert has received so far is carried from tile to tile, and within a
tile comes from a product with a triangle of ones. That gives each pair's place within its expert.
Where the expert begins is known only after the last tile and is added by a second, small kernel.
Counts are float32 in between, which is exact below 2^24 pairs for one expert.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from aquila_jax.kernels.backend import pallas_call
from aquila_jax.kernels.spec import TINY, Routed, RouteSpec
from aquila_jax.kernels.tiles import (
    ABSENT,
    LANES,
    REAL,
    SUBLANES,
    Scored,
    Tiling,
    finite,
    padded,
    score,
    sigmoid,
    unfill,
)


def route_kernel(
    spec: RouteSpec,
    logits_NE: jax.Array,
    is_token_N: jax.Array,
    bias_E: jax.Array | None,
    *,
    interpret: bool,
) -> Routed:
    """`route` by the kernels; arguments as `route_reference`."""
    num_tokens, num_experts = logits_NE.shape
    num_choices = spec.experts_per_token
    tiling = Tiling.of(num_experts, num_tokens // spec.sequences)
    logits_EN, state_1N = padded(spec, tiling, logits_NE, is_token_N)
    whole = pl.BlockSpec((tiling.num_experts, LANES), lambda b, t: (0, 0))
    length = logits_EN.shape[1]
    pairs = jax.ShapeDtypeStruct((num_choices, length), jnp.int32)
    sums = jax.ShapeDtypeStruct((spec.sequences, tiling.num_experts, LANES), jnp.float32)
    gates_kN, experts_kN, ranks_kN, counts_EL, real_BEL, probability_BEL, rest_BSL = pallas_call(
        functools.partial(_route_body, spec, tiling, num_experts),
        logits_EN,
        state_1N,
        _on_lanes(tiling, bias_E),
        name="route",
        interpret=interpret,
        grid=(spec.sequences, tiling.tiles),
        in_specs=[tiling.per_token(tiling.num_experts), tiling.per_token(1), whole],
        out_specs=[
            *[tiling.per_token(num_choices)] * 3,
            whole,
            *[tiling.per_sequence(tiling.num_experts)] * 2,
            tiling.per_sequence(SUBLANES),
        ],
        out_shape=[
            jax.ShapeDtypeStruct(pairs.shape, jnp.float32),
            pairs,
            pairs,
            jax.ShapeDtypeStruct(whole.block_shape, jnp.float32),
            sums,
            sums,
            jax.ShapeDtypeStruct((spec.sequences, SUBLANES, LANES), jnp.float32),
        ],
        scratch_shapes=[pltpu.VMEM((LANES, 2 * LANES), jnp.bfloat16)],
        cost=pl.CostEstimate(
            flops=logits_EN.size * (6 * num_choices + 12),
            transcendentals=logits_EN.size,
            bytes_accessed=logits_NE.nbytes + length * (4 + 12 * num_choices),
        ),
    )
    counts_E = counts_EL[:, 0].astype(jnp.int32)
    slots_kN = _add_first(tiling, counts_E, experts_kN, ranks_kN, interpret=interpret)
    return Routed(
        gates_Nk=unfill(spec, gates_kN, num_tokens),
        experts_Nk=unfill(spec, experts_kN, num_tokens),
        slots_Nk=unfill(spec, slots_kN, num_tokens),
        counts_E=counts_E[:num_experts],
        real_counts_BE=real_BEL.sum(axis=2).astype(jnp.int32)[:, :num_experts],
        probability_sum_BE=probability_BEL.sum(axis=2)[:, :num_experts],
        z_sum=rest_BSL[:, 0].sum(),
        not_finite=rest_BSL[:, 1].sum().astype(jnp.int32),
    )


def _on_lanes(tiling: Tiling, bias_E: jax.Array | None) -> jax.Array:
    """[E, 128] of equal columns, zero where there is no bias or no expert."""
    if bias_E is None:
        return jnp.zeros((tiling.num_experts, LANES), jnp.float32)
    bias_E = jnp.pad(bias_E.astype(jnp.float32), (0, tiling.num_experts - bias_E.size))
    return jnp.broadcast_to(bias_E[:, None], (tiling.num_experts, LANES))


def _route_body(
    spec: RouteSpec,
    tiling: Tiling,
    num_experts: int,
    logits_ref,
    state_ref,
    bias_ref,
    gates_ref,
    experts_ref,
    ranks_ref,
    counts_ref,
    real_ref,
    probability_ref,
    rest_ref,
    triangle_ref,
) -> None:
    """One tile of tokens; `counts_ref` carries what the experts have received so far."""
    is_first = (pl.program_id(0) == 0) & (pl.program_id(1) == 0)

    @pl.when(is_first)
    def _() -> None:
        counts_ref[...] = jnp.zeros_like(counts_ref)
        row = jax.lax.broadcasted_iota(jnp.int32, triangle_ref.shape, 0)
        column = jax.lax.broadcasted_iota(jnp.int32, triangle_ref.shape, 1)
        # Left: ones where a row comes before a column. Right: all ones, for the sum.
        is_one = (row < column) | (column >= LANES)
        triangle_ref[...] = is_one.astype(jnp.float32).astype(jnp.bfloat16)

    @pl.when(pl.program_id(1) == 0)
    def _() -> None:
        for ref in (real_ref, probability_ref, rest_ref):
            ref[...] = jnp.zeros_like(ref)

    def chunk(index: jax.Array, _: None) -> None:
        at = pl.ds(pl.multiple_of(index * tiling.chunk, tiling.chunk), tiling.chunk)
        state = state_ref[:, at]
        is_real = state == REAL
        logits = logits_ref[:, at].astype(jnp.float32)
        scored = score(spec, logits)
        probability_ref[0] += _fold(jnp.where(is_real, scored.probability, 0.0))
        z = scored.normaliser
        rest_ref[0, 0:1] += _fold(jnp.where(is_real, z * z, 0.0))
        rest_ref[0, 1:2] += _fold(jnp.where(is_real & ~(jnp.abs(z) < jnp.inf), 1.0, 0.0))

        bias = jnp.tile(bias_ref[...], (1, tiling.chunk // LANES)) if spec.has_bias else None
        experts, gates, is_chosen = _choose(spec, tiling, num_experts, logits, scored, bias)
        gates_ref[:, at] = gates[: spec.experts_per_token]
        experts_ref[:, at] = experts[: spec.experts_per_token]

        present = jnp.where(state != ABSENT, is_chosen, 0.0)
        real_ref[0] += _fold(jnp.where(is_real, present, 0.0))
        ranks = _ranks(tiling, present, experts, counts_ref, triangle_ref)
        ranks_ref[:, at] = ranks[: spec.experts_per_token]

    jax.lax.fori_loop(0, tiling.tile // tiling.chunk, chunk, None)


def _choose(
    spec: RouteSpec,
    tiling: Tiling,
    num_experts: int,
    logits: jax.Array,
    scored: Scored,
    bias: jax.Array | None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Experts int32 and gates float32, [8, N] by choice, and [E, N] whether chosen.

    A best key is found, its expert named, and its key made -inf, k times. Before that no key is
    -inf, so that those are the chosen ones at the end. All comparisons are between registers of 8
    experts, until one register is left.
    """
    shape = (SUBLANES, logits.shape[1])
    row = jax.lax.broadcasted_iota(jnp.int32, shape, 0)
    row_as_float = row.astype(jnp.float32)
    firsts = range(0, tiling.num_experts, SUBLANES)
    keys = []
    for first in firsts:
        at = slice(first, first + SUBLANES)
        key = finite(logits[at] if bias is None else scored.scores[at] + bias[at])
        keys.append(_present(key, row, first, num_experts, -jnp.inf))
    experts = jnp.zeros(shape, jnp.float32)
    gates = jnp.zeros(shape, jnp.float32)
    for j in range(spec.experts_per_token):
        best, expert = _best(keys, firsts, row_as_float)
        offset = expert - row_as_float
        keys = [
            jnp.where(offset == first, -jnp.inf, key)
            for first, key in zip(firsts, keys, strict=True)
        ]
        if bias is not None:
            picked = jnp.zeros(shape, jnp.float32)
            for first in firsts:
                scores = scored.scores[first : first + SUBLANES]
                picked = jnp.where(offset == first, scores, picked)
            best = jnp.sum(picked, axis=0, keepdims=True)
        experts = jnp.where(row == j, expert, experts)
        gates = jnp.where(row == j, best, gates)
    if bias is None:
        # The keys were the logits. NaN in any logit is in the total, and comes back from there.
        is_softmax = spec.scores == "softmax"
        gates = jnp.exp(gates - scored.largest) if is_softmax else sigmoid(gates)
        gates *= 1.0 / scored.total if is_softmax else 1.0 + 0.0 * scored.total
        gates = jnp.where(row < spec.experts_per_token, gates, 0.0)
    if spec.renormalize:
        gates *= 1.0 / (jnp.sum(gates, axis=0, keepdims=True) + TINY)
    is_chosen = [
        _present(jnp.where(key == -jnp.inf, 1.0, 0.0), row, first, num_experts, 0.0)
        for first, key in zip(firsts, keys, strict=True)
    ]
    return experts.astype(jnp.int32), gates, jnp.concatenate(is_chosen, axis=0)


def _present(x: jax.Array, row: jax.Array, first: int, num_experts: int, absent: float):
    """`absent` in place of the experts that only fill the last register."""
    return x if first + SUBLANES <= num_experts else jnp.where(row < num_experts - first, x, absent)


def _best(keys: list[jax.Array], firsts: range, row: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The largest key of each token and its expert as float32, both [1, N]; the first of equals.

    float32 holds the numbers of experts exactly, and has a minimum in hardware, unlike int32.
    """
    field = [(key, float(first)) for key, first in zip(keys, firsts, strict=True)]
    while len(field) > 1:
        # Of two the one with lower experts stays unless the other is larger.
        field = [
            (jnp.maximum(a, b), jnp.where(b > a, of_b, of_a))
            for (a, of_a), (b, of_b) in zip(field[::2], field[1::2], strict=False)
        ] + field[len(field) // 2 * 2 :]
    key, first = field[0]
    best = jnp.max(key, axis=0, keepdims=True)
    expert = jnp.where(key == best, row + first, 1e9)
    return best, jnp.min(expert, axis=0, keepdims=True)


def _ranks(
    tiling: Tiling, present: jax.Array, experts: jax.Array, counts_ref, triangle_ref
) -> jax.Array:
    """int32 [8, N] by choice: pairs of the same expert in earlier tokens. Counts these tokens."""
    num_experts = tiling.num_experts
    pieces = [present[:, at : at + LANES] for at in range(0, tiling.chunk, LANES)]
    # Zeros and ones are exact in bfloat16, for which there is no higher precision to ask for.
    sums = jnp.dot(
        jnp.concatenate(pieces, axis=0).astype(jnp.bfloat16),
        triangle_ref[...],
        precision=jax.lax.Precision.DEFAULT,
        preferred_element_type=jnp.float32,
    )
    before, total = sums[:, :LANES], sums[:, LANES:]
    counts = counts_ref[...]
    ranks = []
    for piece in range(len(pieces)):
        rows = slice(piece * num_experts, (piece + 1) * num_experts)
        ranks.append(
            _look_up(before[rows] + counts, experts[:, piece * LANES : (piece + 1) * LANES]).astype(
                jnp.int32
            )
        )
        counts += total[rows]
    counts_ref[...] = counts
    return jnp.concatenate(ranks, axis=1)


def _look_up(table: jax.Array, experts: jax.Array) -> jax.Array:
    """[8, 128]: of each token (lane) the table's [E, 128] entries for its experts."""
    row, group = experts & (SUBLANES - 1), experts >> 3
    found = jnp.zeros(experts.shape, table.dtype)
    for first in range(0, table.shape[0], SUBLANES):
        taken = jnp.take_along_axis(table[first : first + SUBLANES], row, axis=0)
        found = jnp.where(group == first // SUBLANES, taken, found)
    return found


def _fold(x: jax.Array) -> jax.Array:
    """Sum over groups of 128 tokens."""
    return functools.reduce(jnp.add, [x[:, at : at + LANES] for at in range(0, x.shape[1], LANES)])


def _add_first(
    tiling: Tiling,
    counts_E: jax.Array,
    experts_kN: jax.Array,
    ranks_kN: jax.Array,
    *,
    interpret: bool,
) -> jax.Array:
    """Ranks within experts to places among all: each plus where its expert begins."""
    num_choices, length = experts_kN.shape
    rows = pl.cdiv(tiling.num_experts, LANES)
    first_E = jnp.pad(jnp.cumsum(counts_E) - counts_E, (0, rows * LANES - tiling.num_experts))
    table = jnp.repeat(first_E.reshape(rows, LANES), SUBLANES, axis=0)
    tile = tiling.tile * math.gcd(length // tiling.tile, 8)
    block = pl.BlockSpec((num_choices, tile), lambda t: (0, t))
    return pallas_call(
        _add_first_body,
        table,
        experts_kN,
        ranks_kN,
        name="route_slots",
        interpret=interpret,
        grid=(length // tile,),
        in_specs=[pl.BlockSpec(table.shape, lambda t: (0, 0)), block, block],
        out_specs=block,
        out_shape=jax.ShapeDtypeStruct(ranks_kN.shape, jnp.int32),
        cost=pl.CostEstimate(
            flops=ranks_kN.size, transcendentals=0, bytes_accessed=12 * ranks_kN.size
        ),
    )


def _add_first_body(table_ref, experts_ref, ranks_ref, slots_ref) -> None:
    num_choices = experts_ref.shape[0]

    def chunk(index: jax.Array, _: None) -> None:
        at = pl.ds(pl.multiple_of(index * LANES, LANES), LANES)
        experts = experts_ref[:, at]
        first = jnp.zeros_like(experts)
        for row in range(0, table_ref.shape[0], SUBLANES):
            inside = experts - row // SUBLANES * LANES
            part = table_ref[row : row + num_choices]
            taken = jnp.take_along_axis(part, inside & (LANES - 1), axis=1)
            first = jnp.where((inside >= 0) & (inside < LANES), taken, first)
        slots_ref[:, at] = ranks_ref[:, at] + first

    jax.lax.fori_loop(0, experts_ref.shape[1] // LANES, chunk, None)
