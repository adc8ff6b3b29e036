"""The decoder in Linen: layers, attention, mixture of experts, transformer, loss."""

from aquila_jax.nn.moe import Dispatch
from aquila_jax.nn.transformer import Transformer, forward, forward_losses

__all__ = ["Dispatch", "Transformer", "forward", "forward_losses"]
