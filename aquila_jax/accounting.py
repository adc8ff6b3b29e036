"""Parameters and FLOPs of a configuration, counted from the vocabulary of axes."""

import math

from aquila_jax import axes
from aquila_jax.axes import EXPERTS
from aquila_jax.config import ModelConfig


def num_parameters(config: ModelConfig) -> int:
    """All parameters of the model."""
    return sum(math.prod(p.shape(config)) for p in axes.parameters(config).values())


def num_active_parameters(config: ModelConfig) -> int:
    """Parameters one token uses: of E experts the k it visits, of a shared expert all."""
    return sum(_active(config, p) for p in axes.parameters(config).values())


def _active(config: ModelConfig, parameter: axes.Parameter) -> int:
    count = math.prod(parameter.shape(config))
    if EXPERTS in parameter.axes and EXPERTS not in parameter.writes:
        return count * config.experts_per_token // config.num_experts
    return count


def training_flops_per_token(config: ModelConfig, sequence_length: int) -> float:
    """Model FLOPs of one forward and backward pass, for one token of a row.

    Six for every active matrix element (two forward, four backward), and for causal attention
    6 * L * T * N * H: scores and weighted values each cost 2 * T * N * H forward in each layer,
    three times that with the backward pass, halved because a token sees half the row on average.
    Embedding look-ups, biases and norms are not matrix multiplications and count nothing;
    neither do recomputation, padding of expert slots, nor experts evaluated but not chosen.

    Args:
        config: the model.
        sequence_length: T, the length of a training row.
    """
    matrices = sum(
        _active(config, parameter)
        for parameter in axes.parameters(config).values()
        if axes.is_matrix(parameter)
    )
    if config.tie_embeddings:
        matrices += config.vocab_size * config.embed_dim
    heads = config.num_heads * config.head_dim
    attention = 6 * config.num_layers * sequence_length * heads
    return float(6 * matrices + attention)
