"""What a growth kept and what it broke, measured."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike

from aquila_jax.config import ModelConfig
from aquila_jax.errors import UserError
from aquila_jax.growth import Certificate, GrowthResult
from aquila_jax.growth.certificate import Measurement
from aquila_jax.growth.content import content_hash
from aquila_jax.nn import Transformer


def certify(
    source: tuple[Any, ModelConfig] | GrowthResult,
    grown: GrowthResult,
    tokens: ArrayLike,
    *,
    dtype: DTypeLike = jnp.float32,
) -> Certificate:
    """The growth's certificate with both models measured on `tokens`, and content hashes.

    Args:
        source: `(params, config)` before the growth.
        grown: what the growth returned.
        tokens: int32 `[B, T]`, T at least 2; each token is predicted from those before it.
        dtype: activations are computed in.

    Returns:
        `grown.certificate` with `measured`, `source_hash` and `target_hash`; `print` shows it as
        a table, and so does a notebook.

    Raises:
        UserError: `tokens` have another shape, or ids that the source does not know.

    Examples:
        >>> import jax, aquila_jax
        >>> config = aquila_jax.preset("toy_dense", vocab_size=64, num_layers=1)
        >>> tokens = jax.random.randint(jax.random.key(0), (1, 8), 0, 64)
        >>> params = aquila_jax.Transformer(config).init(jax.random.key(1), tokens)["params"]
        >>> wider = aquila_jax.preset("toy_dense", vocab_size=64, num_layers=1, embed_dim=120)
        >>> grown = aquila_jax.scale_up(params, config, wider, method="isometric")
        >>> measured = aquila_jax.certify((params, config), grown, tokens).measured
        >>> measured.max_logit_difference < 1e-4
        True
    """
    params, config = source[0], source[1]
    # On the host: several processes have no array of devices in common yet.
    tokens = np.asarray(tokens)
    if tokens.ndim != 2 or tokens.shape[1] < 2:
        raise UserError(f"tokens must be [B, T] with T at least 2, not {tuple(tokens.shape)}")
    largest = int(tokens.max())
    if largest >= config.vocab_size:
        raise UserError(f"token {largest} is outside the source's vocabulary {config.vocab_size}")
    return dataclasses.replace(
        grown.certificate,
        source_hash=content_hash(params, config),
        target_hash=content_hash(grown.params, grown.config),
        measured=measure((params, config), (grown.params, grown.config), tokens, dtype=dtype),
    )


def measure(
    source: tuple[Any, ModelConfig],
    grown: tuple[Any, ModelConfig],
    tokens: jax.Array | np.ndarray,
    *,
    dtype: DTypeLike = jnp.float32,
) -> Measurement:
    """Both models on `tokens`, int32 `[B, T]`, row by row."""

    @jax.jit
    def compare(source_params: Any, grown_params: Any, row_T: jax.Array) -> tuple[jax.Array, ...]:
        before_TV, after_TV = (
            jnp.asarray(Transformer(config, dtype=dtype).apply({"params": params}, row_T[None]))[
                0, :-1
            ]
            for params, config in ((source_params, source[1]), (grown_params, grown[1]))
        )
        known_TV = after_TV[:, : before_TV.shape[1]]
        log_p_TV, log_q_TV = jax.nn.log_softmax(before_TV), jax.nn.log_softmax(known_TV)
        losses = [
            -jnp.take_along_axis(jax.nn.log_softmax(x), row_T[1:, None], axis=-1).sum()
            for x in (before_TV, after_TV)
        ]
        kl = jnp.sum(jnp.exp(log_p_TV) * (log_p_TV - log_q_TV))
        return jnp.abs(known_TV - before_TV).max(), kl, *losses

    rows = [[float(value) for value in compare(source[0], grown[0], row_T)] for row_T in tokens]
    differences, divergences, before, after = zip(*rows, strict=True)
    count = tokens.shape[0] * (tokens.shape[1] - 1)
    return Measurement(
        num_tokens=count,
        max_logit_difference=max(differences),
        kl=sum(divergences) / count,
        source_loss=sum(before) / count,
        grown_loss=sum(after) / count,
    )
