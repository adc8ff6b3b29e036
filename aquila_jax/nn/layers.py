"""Parameters by their path in the vocabulary, and the small layers."""

import functools
import math
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from aquila_jax import axes
from aquila_jax.axes import BATCH, EMBED, LAYER_AXES, MLP
from aquila_jax.config import ModelConfig, RopeScaling
from aquila_jax.sharding import Layout

_EMBEDDING_STD = 0.02


def declare(module: nn.Module, config: ModelConfig, path: str) -> jax.Array:
    """The float32 parameter that `aquila_jax.axes` calls `path`, inside the module that holds it.

    Inside a scan over layers a module sees one layer, so the axis of layers is left out. Initial
    values: ones for gains, zeros for biases, and for matrices a normal of variance 1 / fan-in,
    divided by 2 L where the matrix adds to the residual (GPT-2's rule).
    """
    parameter = axes.parameters(config)[path]
    layered = parameter.axes[0] in LAYER_AXES
    shape = parameter.shape(config)[1:] if layered else parameter.shape(config)
    if parameter.is_gain:
        init = nn.initializers.ones_init()
    elif not parameter.reads:
        init = nn.initializers.zeros_init()
    elif axes.VOCAB in parameter.reads:
        init = nn.initializers.normal(_EMBEDDING_STD)
    else:
        std = 1.0 / math.sqrt(parameter.fan_in(config))
        if layered and parameter.writes == (EMBED,):
            std /= math.sqrt(2 * config.num_layers)
        init = nn.initializers.normal(std)
    return module.param(path.rsplit("/", 1)[-1], init, shape, jnp.float32)


def weights(module: nn.Module, config: ModelConfig, path: str, dtype: DTypeLike) -> jax.Array:
    """The parameter that `declare` gives, rounded to the dtype of arithmetic."""
    parameter = declare(module, config, path)
    if jnp.dtype(dtype) == jnp.bfloat16 and parameter.dtype != jnp.bfloat16:
        # The conversion then changes no value, and stays where it is: XLA for TPUs (jax 0.10) moves
        # one that does ahead of the scan over layers, and keeps a rounded copy of all of them.
        parameter = jax.lax.reduce_precision(parameter, exponent_bits=8, mantissa_bits=7)
    return parameter.astype(dtype)


def rms_norm(x: Float[Array, "*B H"], gain_H: Float[Array, "H"], eps: float) -> jax.Array:
    """Root-mean-square normalisation of the last dimension (arXiv 1910.07467).

    Args:
        x: what is normalised.
        gain_H: by what every channel is multiplied afterwards.
        eps: added to the mean square.

    Returns:
        An array like `x`, computed in float32 at least.
    """
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    mean_square = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
    return (wide * jax.lax.rsqrt(mean_square + eps) * gain_H).astype(x.dtype)


class RMSNorm(nn.Module):
    """`rms_norm` of the residual."""

    config: ModelConfig
    parameter: str

    @nn.compact
    def __call__(self, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Normalised `x_BTD`, in its own dtype."""
        return rms_norm(x_BTD, declare(self, self.config, self.parameter), self.config.norm_eps)


def project(
    x: Float[Array, "B T *D"], kernel: Float[Array, "..."], layout: Layout | None
) -> Float[Array, "B T ..."]:
    """Every token's vector times a matrix, whose first dimensions are that vector's: `[*D, ...]`.

    On one device the tokens are the rows of one matrix: XLA for CPUs is faster at the gradients of
    a product of two matrices than at those of others, for which it lays out anew what comes in. On
    a mesh axes stay what they are, so that each may be split.
    """
    num_axes = x.ndim - 2
    if layout is not None:
        return jnp.tensordot(x, kernel, num_axes)
    features = kernel.shape[num_axes:]
    width = math.prod(kernel.shape[:num_axes])
    rows = x.reshape(-1, width) @ kernel.reshape(width, -1)
    return rows.reshape(*x.shape[:2], *features)


def swiglu(gate: Float[Array, "*B F"], up: Float[Array, "*B F"]) -> Float[Array, "*B F"]:
    """Hidden units: silu(gate) * up (arXiv 2002.05202)."""
    return nn.silu(gate) * up


def gated_mlp(
    x_BTD: Float[Array, "B T D"],
    gate_DF: Float[Array, "D F"],
    up_DF: Float[Array, "D F"],
    down_FD: Float[Array, "F D"],
    units: str,
    layout: Layout | None,
) -> Float[Array, "B T D"]:
    """down(silu(gate(x)) * up(x)), whose hidden units are split as the axis `units` is."""

    # Activated units are computed again for the backward pass: cheap, and as large as what is
    # kept. Layers are scanned, where nothing undoes that.
    @functools.partial(jax.checkpoint, prevent_cse=False)
    def read_out(gate_BTF: jax.Array, up_BTF: jax.Array, down_FD: jax.Array) -> jax.Array:
        hidden_BTF = swiglu(gate_BTF, up_BTF)
        if layout is not None:
            hidden_BTF = layout.constrain(hidden_BTF, BATCH, None, units)
        return project(hidden_BTF, down_FD, layout)

    return read_out(project(x_BTD, gate_DF, layout), project(x_BTD, up_DF, layout), down_FD)


class GatedMLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    config: ModelConfig
    dtype: DTypeLike
    layout: Layout | None = None

    @nn.compact
    def __call__(self, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """The residual update, in `dtype`."""
        gate_DF, up_DF, down_FD = (
            weights(self, self.config, f"layers/mlp/{name}", self.dtype)
            for name in ("gate", "up", "down")
        )
        return gated_mlp(x_BTD, gate_DF, up_DF, down_FD, MLP, self.layout)


def rotary_frequencies(
    head_dim: int, theta: float, scaling: RopeScaling | None = None
) -> np.ndarray:
    """By how many radians each pair of channels turns from one position to the next.

    Args:
        head_dim: H.
        theta: base of the frequencies theta^(-2i / H).
        scaling: how they are changed.

    Returns:
        float64 `[H / 2]`.
    """
    frequencies = theta ** (-2 * np.arange(head_dim // 2) / head_dim)
    if scaling is None:
        return frequencies
    if scaling.kind == "linear":
        return frequencies / scaling.factor
    turns = scaling.original_context_length * frequencies / (2 * np.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    kept = np.clip((turns - low) / (high - low), 0, 1)
    return frequencies * (kept + (1 - kept) / scaling.factor)


class Rotation(NamedTuple):
    """By which angles every token's pairs of channels turn: the same in all layers and heads.

    Attributes:
        cos_BT1: `[B, T, 1, H / 2]`, float32 at least.
        sin_BT1: the same.
    """

    cos_BT1: jax.Array
    sin_BT1: jax.Array


def rotation(
    config: ModelConfig, positions_BT: Int[Array, "B T"], dtype: DTypeLike = jnp.float32
) -> Rotation:
    """The angles of each token's position in its document, for activations of `dtype`."""
    wide = jnp.promote_types(dtype, jnp.float32)
    frequencies = rotary_frequencies(config.head_dim, config.rope_theta, config.rope_scaling)
    radians = positions_BT.astype(wide)[:, :, None, None] * jnp.asarray(frequencies, wide)
    return Rotation(jnp.cos(radians), jnp.sin(radians))


def rotary(x_BTNH: Float[Array, "B T N H"], angles: Rotation) -> Float[Array, "B T N H"]:
    """Rotary positions (arXiv 2104.09864) in the half-split layout: i turns with i + H / 2.

    Args:
        x_BTNH: queries or keys.
        angles: by which.
    """
    cos, sin = angles
    first, second = jnp.split(x_BTNH.astype(cos.dtype), 2, axis=-1)
    out = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return out.astype(x_BTNH.dtype)
