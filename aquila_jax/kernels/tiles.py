"""Tiles of tokens on a TPU: tokens on lanes, experts on sublanes; their scores.

A vector register holds 8 experts of 128 tokens, so that sums and maxima over experts are
operations between registers, and few experts fill registers as well as many.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from aquila_jax.kernels.spec import TINY, RouteSpec

LANES = 128
SUBLANES = 8

# What a token is; tiles are filled up with tokens that are absent.
ABSENT, PADDING, REAL = 0, 1, 2


class Tiling(NamedTuple):
    """How tokens are cut up.

    Attributes:
        num_experts: E, rounded up to whole registers.
        tile: tokens of one step of the grid.
        chunk: tokens that are in registers at a time.
        tiles: tiles of one sequence.
    """

    num_experts: int
    tile: int
    chunk: int
    tiles: int

    @classmethod
    def of(cls, num_experts: int, length: int) -> "Tiling":
        """For E experts and sequences of `length` tokens."""
        num_experts = SUBLANES * pl.cdiv(num_experts, SUBLANES)
        # 16 registers of logits at a time leave room for what is made of them; a tile is large
        # enough that its steps' fixed cost does not count, and small beside VMEM.
        power = pl.next_power_of_2(num_experts)
        chunk = max(LANES, min(1024, 16384 // power))
        tile = max(chunk, min(8192, 262144 // power))
        tile = min(tile, LANES * pl.next_power_of_2(pl.cdiv(max(length, 1), LANES)))
        return cls(num_experts, tile, min(chunk, tile), pl.cdiv(max(length, 1), tile))

    def per_token(self, rows: int) -> pl.BlockSpec:
        """A tile of [rows, N], for a grid of sequences and of tiles in each."""
        return pl.BlockSpec((rows, self.tile), lambda b, t: (0, b * self.tiles + t))

    def per_sequence(self, rows: int) -> pl.BlockSpec:
        """A sequence's part of [B, rows, 128]."""
        return pl.BlockSpec((1, rows, LANES), lambda b, t: (b, 0, 0))


def padded(
    spec: RouteSpec, tiling: Tiling, logits_NE: jax.Array, is_token_N: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Logits [E, N] and tokens' states [1, N], each sequence filled up to whole tiles."""
    logits_EN = fill(spec, tiling, logits_NE, 0)
    if added := tiling.num_experts - logits_NE.shape[1]:
        logits_EN = jnp.pad(logits_EN, ((0, added), (0, 0)), constant_values=-jnp.inf)
    state_N1 = jnp.where(is_token_N, REAL, PADDING).astype(jnp.int32)[:, None]
    return logits_EN, fill(spec, tiling, state_N1, ABSENT)


def fill(spec: RouteSpec, tiling: Tiling, x_Nr: jax.Array, value: int) -> jax.Array:
    """[N, r] to [r, N], each sequence filled up with `value` to whole tiles."""
    num_tokens, rows = x_Nr.shape
    length, filled = num_tokens // spec.sequences, tiling.tiles * tiling.tile
    x_rBT = x_Nr.T.reshape(rows, spec.sequences, length)
    if filled != length:
        x_rBT = jnp.pad(x_rBT, ((0, 0), (0, 0), (0, filled - length)), constant_values=value)
    return x_rBT.reshape(rows, spec.sequences * filled)


def unfill(spec: RouteSpec, x_rN: jax.Array, num_tokens: int) -> jax.Array:
    """The inverse of `fill`."""
    x_rBT = x_rN.reshape(x_rN.shape[0], spec.sequences, -1)[..., : num_tokens // spec.sequences]
    return x_rBT.reshape(x_rN.shape[0], num_tokens).T


class Scored(NamedTuple):
    """Of a chunk of tokens, in float32.

    Attributes:
        scores: [E, N] of which gates are made.
        probability: [E, N], sums to 1 over experts.
        softmax: [E, N] of the logits.
        normaliser: [1, N] logsumexp of the logits.
        largest: [1, N] of the logits.
        total: [1, N] sum of exp(logits - largest).
    """

    scores: jax.Array
    probability: jax.Array
    softmax: jax.Array
    normaliser: jax.Array
    largest: jax.Array
    total: jax.Array


def score(spec: RouteSpec, logits: jax.Array) -> Scored:
    """Softmax or sigmoid of a chunk of tokens, logits float32 `[E, N]`, in registers."""
    largest = jnp.max(finite(logits), axis=0, keepdims=True)
    powers = jnp.exp(logits - largest)
    total = jnp.sum(powers, axis=0, keepdims=True)
    normaliser = jnp.log(total) + largest
    scores = probability = softmax = powers * (1.0 / total)
    if spec.scores == "sigmoid":
        scores = sigmoid(logits)
        probability = scores * (1.0 / (jnp.sum(scores, axis=0, keepdims=True) + TINY))
    return Scored(scores, probability, softmax, normaliser, largest, total)


def finite(x: jax.Array) -> jax.Array:
    """NaN and -inf made the lowest float32, elementwise."""
    lowest = jnp.finfo(jnp.float32).min
    return jnp.where(x > lowest, x, lowest)


def sigmoid(x: jax.Array) -> jax.Array:
    """1 / (1 + exp(-x)), elementwise."""
    return 1.0 / (1.0 + jnp.exp(-x))
