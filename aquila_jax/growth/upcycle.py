"""Scale-Out: a dense model's MLPs become the experts of a mixture."""

from aquila_jax import axes
from aquila_jax.axes import EXPERTS
from aquila_jax.config import ModelConfig
from aquila_jax.growth.compose import Fresh, Mapped, Plan


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
    plan: dict[str, Mapped | Fresh] = {}
    for path, parameter in axes.parameters(target).items():
        if EXPERTS in parameter.writes:
            plan[path] = Fresh(router_std)
        elif EXPERTS in parameter.axes:
            dim = parameter.axes.index(EXPERTS)
            plan[path] = Mapped(path.replace("/moe/", "/mlp/"), repeat=(dim, target.num_experts))
        else:
            plan[path] = Mapped(path)
    return plan
