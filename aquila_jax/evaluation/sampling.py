"""The next token, chosen from logits."""

import dataclasses

import jax
import jax.numpy as jnp

from aquila_jax.errors import UserError, check_number


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How a next token is drawn. The default is greedy: the likeliest, the first of equals.

    Attributes:
        temperature: what logits are divided by; 0 is greedy.
        top_k: draw from so many of the likeliest tokens; 0 is all.
        top_p: draw from the likeliest tokens whose probabilities reach this together (nucleus
            sampling, arXiv 1904.09751); 1 is all. Applied after `top_k`.
        seed: of the draws. A text depends on the seed, its prompt and its number among the
            prompts, and not on the batch it was generated in.

    Raises:
        UserError: a value is out of its range, or `top_k` or `top_p` is set where nothing is drawn.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise UserError(f"temperature must be 0 or more, not {self.temperature}")
        if self.top_k < 0:
            raise UserError(f"top_k must be 0 (all tokens) or more, not {self.top_k}")
        check_number("seed", self.seed, least=0, most=2**32 - 1, is_whole=True)
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p must lie above 0 and up to 1, not {self.top_p}")
        if not self.temperature and (self.top_k or self.top_p < 1):
            raise UserError("top_k and top_p change draws, and temperature 0 draws nothing: set it")


def choose(
    logits_BV: jax.Array, sampling: Sampling, rows_B: jax.Array, step: jax.Array
) -> jax.Array:
    """One token for every row, int32 `[B]`.

    Args:
        logits_BV: of the next token.
        sampling: how to draw.
        rows_B: the numbers of the prompts, which set their draws apart.
        step: how many tokens were generated before.
    """
    if not sampling.temperature:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    kept_BV = restrict(logits_BV / sampling.temperature, sampling)
    key = jax.random.fold_in(jax.random.key(sampling.seed), step)
    keys_B = jax.vmap(lambda row: jax.random.fold_in(key, row))(rows_B)
    return jax.vmap(jax.random.categorical)(keys_B, kept_BV).astype(jnp.int32)


def restrict(logits_BV: jax.Array, sampling: Sampling) -> jax.Array:
    """Logits with minus infinity where `top_k` and `top_p` leave nothing to draw."""
    if 0 < sampling.top_k < logits_BV.shape[-1]:
        least_B1 = jax.lax.top_k(logits_BV, sampling.top_k)[0][:, -1:]
        logits_BV = jnp.where(logits_BV < least_B1, -jnp.inf, logits_BV)
    if sampling.top_p < 1:
        sorted_BV = jnp.sort(logits_BV, axis=-1, descending=True)
        probabilities_BV = jax.nn.softmax(sorted_BV, axis=-1)
        # A token stays while those before it have not reached top_p, so one always stays.
        before_BV = jnp.cumsum(probabilities_BV, axis=-1) - probabilities_BV
        stays_BV = before_BV < sampling.top_p
        least_B1 = jnp.min(jnp.where(stays_BV, sorted_BV, jnp.inf), axis=-1, keepdims=True)
        logits_BV = jnp.where(logits_BV < least_B1, -jnp.inf, logits_BV)
    return logits_BV
