"""The layer: a router, experts of which every token visits k, and perhaps a shared one."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from aquila_jax.axes import SHARED_MLP
from aquila_jax.config import ModelConfig
from aquila_jax.nn.layers import declare, gated_mlp, weights
from aquila_jax.nn.moe.experts import Weights
from aquila_jax.nn.moe.mixing import mix
from aquila_jax.nn.moe.settings import DEFAULT_DISPATCH, Dispatch
from aquila_jax.sharding import Layout

# The Linen collection in which mixtures leave their losses and health, stacked by depth.
ROUTER = "router"

# The stream of random numbers that `Dispatch.jitter` draws from; without one there is no jitter.
JITTER = "jitter"


class MixtureOfExperts(nn.Module):
    """E gated MLPs, of which every token visits k, and perhaps one that all visit.

    The router works in float32. The shared expert (DeepSeekMoE, arXiv 2401.06066) is not routed:
    its output is added with weight 1, or with the sigmoid of a score that it has for itself.

    Attributes:
        config: the architecture.
        dtype: of the experts' arithmetic.
        layout: where things lie on a mesh.
        dispatch: how tokens reach their experts.
    """

    config: ModelConfig
    dtype: DTypeLike
    layout: Layout | None = None
    dispatch: Dispatch = DEFAULT_DISPATCH

    @nn.compact
    def __call__(
        self, x_BTD: Float[Array, "B T D"], is_token_BT: Bool[Array, "B T"]
    ) -> Float[Array, "B T D"]:
        """The residual update, in `dtype`; leaves a `Report` in the `ROUTER` collection."""
        config = self.config
        router_DE = declare(self, config, "layers/moe/router")
        seen_BTD = self._jittered(x_BTD.astype(router_DE.dtype))
        # A TPU would multiply float32 in bfloat16 passes, and choices hang on small differences.
        logits_BTE = jnp.einsum(
            "BTD,DE->BTE", seen_BTD, router_DE, precision=jax.lax.Precision.HIGHEST
        )
        bias_E = jnp.zeros(config.num_experts, router_DE.dtype)
        if config.router_bias:
            bias_E = declare(self, config, "layers/moe/router_bias")
        experts = Weights(
            *(
                weights(self, config, f"layers/moe/{name}", self.dtype)
                for name in ("gate", "up", "down")
            )
        )
        x_BTD = x_BTD.astype(self.dtype)
        out_BTD, report = mix(
            config, self.dispatch, x_BTD, logits_BTE, is_token_BT, bias_E, experts, self.layout
        )
        for name, value in report._asdict().items():
            # Linen's sow collects a tuple of every call; there is one call, so keep its value.
            self.sow(ROUTER, name, value, reduce_fn=lambda _, new: new)
        return out_BTD + self._shared_expert(x_BTD) if config.shared_mlp_dim else out_BTD

    def _jittered(self, x_BTD: jax.Array) -> jax.Array:
        epsilon = self.dispatch.jitter
        if not epsilon or not self.has_rng(JITTER):
            return x_BTD
        key = self.make_rng(JITTER)
        return x_BTD * jax.random.uniform(key, x_BTD.shape, x_BTD.dtype, 1 - epsilon, 1 + epsilon)

    def _shared_expert(self, x_BTD: jax.Array) -> jax.Array:
        gate_DS, up_DS, down_SD = (
            weights(self, self.config, f"layers/moe/shared_{name}", self.dtype)
            for name in ("gate", "up", "down")
        )
        out_BTD = gated_mlp(x_BTD, gate_DS, up_DS, down_SD, SHARED_MLP, self.layout)
        if not self.config.shared_expert_gate:
            return out_BTD
        router_D = declare(self, self.config, "layers/moe/shared_router")
        score_BT = jnp.einsum("BTD,D->BT", x_BTD.astype(router_D.dtype), router_D)
        return out_BTD * nn.sigmoid(score_BT).astype(self.dtype)[..., None]
