"""Scale-Out: a dense model's MLPs become the experts of a mixture."""

import numpy as np

from aquila_jax import axes
from aquila_jax.axes import EXPERTS, LAYERS, MLP
from aquila_jax.config import ModelConfig
from aquila_jax.growth.compose import Plan
from aquila_jax.growth.rules import Experts, Fresh, Mapped


def upcycle_plan(target: ModelConfig, router_std: float) -> Plan:
    """Sparse upcycling: every expert is a copy of the layer's MLP, the router is new.

    With gates that are renormalised over the chosen experts the function is kept exactly, and
    the language-model gradient of the router is zero until experts differ.

    Args:
        target: the mixture's configuration.
        router_std: standard deviation of the router's normal initialisation.

    References:
        Sparse Upcycling (Komatsuzaki et al., arXiv 2212.05055); AquilaMoE (arXiv 2408.06567).
    """
    layers = np.arange(target.num_layers)
    units = np.tile(np.arange(target.mlp_dim), (target.num_experts, 1))
    plan: dict[str, Mapped | Fresh] = {}
    for path, parameter in axes.parameters(target).items():
        stacked = layers if LAYERS in parameter.axes else None
        if EXPERTS in parameter.writes:
            plan[path] = Fresh(router_std)
        elif EXPERTS in parameter.axes:
            dim = parameter.axes.index(MLP) - 1
            experts = Experts(dim, units, None, f"{target.num_experts} equal experts")
            plan[path] = Mapped(path.replace("/moe/", "/mlp/"), layers=stacked, experts=experts)
        else:
            plan[path] = Mapped(path, layers=stacked)
    return plan
