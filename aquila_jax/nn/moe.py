"""Mixture of experts: route, evaluate experts, combine; beside them perhaps a shared expert.

This is the readable reference: every expert is evaluated on every token and the gates of those
not chosen are zero. Nothing is dropped, and the arithmetic costs E / k of what is needed.
"""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from aquila_jax.axes import BATCH, EXPERT_MLP, SHARED_MLP
from aquila_jax.config import ModelConfig
from aquila_jax.nn.layers import declare, gated_units
from aquila_jax.sharding import Layout

# The Linen collection in which mixtures leave their losses and load, stacked by depth.
ROUTER = "router"


class Routing(NamedTuple):
    """Where tokens go, and what the router is charged for.

    Attributes:
        gates_BTE: float32 weight of every expert for every token; zero where not chosen.
        load_balance_loss: E * sum over experts of (share of choices) * (mean probability);
            1 when balanced, E when all goes to one expert (Switch, arXiv 2101.03961, eq. 4).
        router_z_loss: mean of logsumexp(logits)^2 (ST-MoE, arXiv 2202.08906, eq. 5).
        load_E: share of the choices that each expert got; sums to 1.
    """

    gates_BTE: jax.Array
    load_balance_loss: jax.Array
    router_z_loss: jax.Array
    load_E: jax.Array


def route(
    logits_BTE: Float[Array, "B T E"],
    is_token_BT: Bool[Array, "B T"],
    *,
    experts_per_token: int,
    renormalize: bool,
) -> Routing:
    """Softmax over all experts, the k largest, their gates and the auxiliary losses.

    Args:
        logits_BTE: float32 router logits.
        is_token_BT: false on padding, which is routed but neither counted nor charged.
        experts_per_token: k.
        renormalize: divide the k gates by their sum.
    """
    num_experts = logits_BTE.shape[-1]
    probabilities_BTE = jax.nn.softmax(logits_BTE, axis=-1)
    _, chosen_BTk = jax.lax.top_k(probabilities_BTE, experts_per_token)
    is_chosen_BTE = jax.nn.one_hot(chosen_BTk, num_experts, dtype=logits_BTE.dtype).sum(axis=2)
    gates_BTE = probabilities_BTE * is_chosen_BTE
    if renormalize:
        gates_BTE /= gates_BTE.sum(axis=-1, keepdims=True)

    weights_BT = is_token_BT.astype(logits_BTE.dtype)
    count = jnp.maximum(weights_BT.sum(), 1.0)
    load_E = jnp.einsum("BTE,BT->E", is_chosen_BTE, weights_BT) / (count * experts_per_token)
    mean_probability_E = jnp.einsum("BTE,BT->E", probabilities_BTE, weights_BT) / count
    log_normaliser_BT = jax.nn.logsumexp(logits_BTE, axis=-1)
    return Routing(
        gates_BTE=gates_BTE,
        load_balance_loss=num_experts * jnp.sum(load_E * mean_probability_E),
        router_z_loss=jnp.sum(jnp.square(log_normaliser_BT) * weights_BT) / count,
        load_E=load_E,
    )


class MixtureOfExperts(nn.Module):
    """E gated MLPs, of which every token visits k, and perhaps one that all visit.

    The router works in float32. The shared expert (DeepSeekMoE, arXiv 2401.06066) is not routed:
    its output is added with weight 1, or with the sigmoid of a score that it has for itself.
    """

    config: ModelConfig
    dtype: DTypeLike
    layout: Layout | None = None

    @nn.compact
    def __call__(
        self, x_BTD: Float[Array, "B T D"], is_token_BT: Bool[Array, "B T"]
    ) -> Float[Array, "B T D"]:
        """The residual update, in `dtype`; leaves losses and load in the `ROUTER` collection."""
        config = self.config
        router_DE = declare(self, config, "layers/moe/router")
        # A TPU would multiply float32 in bfloat16 passes, and choices hang on small differences.
        logits_BTE = jnp.einsum(
            "BTD,DE->BTE",
            x_BTD.astype(router_DE.dtype),
            router_DE,
            precision=jax.lax.Precision.HIGHEST,
        )
        routing = route(
            logits_BTE,
            is_token_BT,
            experts_per_token=config.experts_per_token,
            renormalize=config.renormalize_gates,
        )
        for name in ("load_balance_loss", "router_z_loss", "load_E"):
            # Linen's sow collects a tuple of every call; there is one call, so keep its value.
            self.sow(ROUTER, name, getattr(routing, name), reduce_fn=lambda _, new: new)
        out_BTD = self._experts(x_BTD, routing.gates_BTE.astype(self.dtype))
        return out_BTD + self._shared_expert(x_BTD) if config.shared_mlp_dim else out_BTD

    def _experts(self, x_BTD: jax.Array, gates_BTE: jax.Array) -> jax.Array:
        """The experts' outputs, weighted and summed, one expert after the other.

        In turn rather than at once: the hidden units of one expert fit in a cache, those of all
        do not, and they are computed again for the backward pass rather than stored.
        """
        gate_EDF, up_EDF, down_EFD = (
            declare(self, self.config, f"layers/moe/{name}").astype(self.dtype)
            for name in ("gate", "up", "down")
        )

        @jax.checkpoint
        def add_expert(sum_BTD: jax.Array, expert: tuple[jax.Array, ...]) -> tuple[jax.Array, None]:
            gate_DF, up_DF, down_FD, gate_BT = expert
            hidden_BTF = gated_units(x_BTD, gate_DF, up_DF) * gate_BT[..., None]
            if self.layout is not None:
                hidden_BTF = self.layout.constrain(hidden_BTF, BATCH, None, EXPERT_MLP)
            return sum_BTD + jnp.einsum("BTF,FD->BTD", hidden_BTF, down_FD), None

        gates_EBT = jnp.moveaxis(gates_BTE, -1, 0)
        out_BTD, _ = jax.lax.scan(
            add_expert, jnp.zeros_like(x_BTD), (gate_EDF, up_EDF, down_EFD, gates_EBT)
        )
        return out_BTD

    def _shared_expert(self, x_BTD: jax.Array) -> jax.Array:
        gate_DS, up_DS, down_SD = (
            declare(self, self.config, f"layers/moe/shared_{name}").astype(self.dtype)
            for name in ("gate", "up", "down")
        )
        hidden_BTS = gated_units(x_BTD, gate_DS, up_DS)
        if self.layout is not None:
            hidden_BTS = self.layout.constrain(hidden_BTS, BATCH, None, SHARED_MLP)
        out_BTD = jnp.einsum("BTS,SD->BTD", hidden_BTS, down_SD)
        if not self.config.shared_expert_gate:
            return out_BTD
        router_D = declare(self, self.config, "layers/moe/shared_router")
        score_BT = jnp.einsum("BTD,D->BT", x_BTD.astype(router_D.dtype), router_D)
        return out_BTD * nn.sigmoid(score_BT).astype(self.dtype)[..., None]
