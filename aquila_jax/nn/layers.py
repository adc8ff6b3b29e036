"""Parameters by their path in the vocabulary, and the small layers."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from aquila_jax import axes
from aquila_jax.axes import BATCH, EMBED, LAYER_AXES, MLP
from aquila_jax.config import ModelConfig
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


class RMSNorm(nn.Module):
    """Root-mean-square normalisation with a gain (arXiv 1910.07467), computed in float32."""

    config: ModelConfig
    parameter: str

    @nn.compact
    def __call__(self, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Normalised `x_BTD`, in its own dtype."""
        scale_D = declare(self, self.config, self.parameter)
        x = x_BTD.astype(jnp.promote_types(x_BTD.dtype, jnp.float32))
        mean_square = jnp.mean(jnp.square(x), axis=-1, keepdims=True)
        normalised = x * jax.lax.rsqrt(mean_square + self.config.norm_eps)
        return (normalised * scale_D).astype(x_BTD.dtype)


def gated_units(
    x_BTD: Float[Array, "B T D"], gate_DF: Float[Array, "D F"], up_DF: Float[Array, "D F"]
) -> Float[Array, "B T F"]:
    """The hidden units of SwiGLU (arXiv 2002.05202): silu(gate(x)) * up(x)."""
    gate_BTF = jnp.einsum("BTD,DF->BTF", x_BTD, gate_DF)
    up_BTF = jnp.einsum("BTD,DF->BTF", x_BTD, up_DF)
    return nn.silu(gate_BTF) * up_BTF


class GatedMLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    config: ModelConfig
    dtype: DTypeLike
    layout: Layout | None = None

    @nn.compact
    def __call__(self, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """The residual update, in `dtype`."""
        gate_DF, up_DF, down_FD = (
            declare(self, self.config, f"layers/mlp/{name}").astype(self.dtype)
            for name in ("gate", "up", "down")
        )
        hidden_BTF = gated_units(x_BTD, gate_DF, up_DF)
        if self.layout is not None:
            hidden_BTF = self.layout.constrain(hidden_BTF, BATCH, None, MLP)
        return jnp.einsum("BTF,FD->BTD", hidden_BTF, down_FD)


def rotary(
    x_BTNH: Float[Array, "B T N H"], positions_BT: Int[Array, "B T"], theta: float
) -> Float[Array, "B T N H"]:
    """Rotary positions (arXiv 2104.09864) in the half-split layout: i turns with i + H / 2.

    Args:
        x_BTNH: queries or keys.
        positions_BT: each token's position in its document.
        theta: base of the frequencies theta^(-2i / H).
    """
    half = x_BTNH.shape[-1] // 2
    wide = jnp.promote_types(x_BTNH.dtype, jnp.float32)
    frequencies = theta ** (-jnp.arange(half, dtype=wide) / half)
    angles = positions_BT.astype(wide)[:, :, None, None] * frequencies
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    first, second = jnp.split(x_BTNH.astype(wide), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x_BTNH.dtype)
