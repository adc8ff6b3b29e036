"""Scale-Out: a dense model's MLPs become the experts of a mixture."""

import dataclasses

import numpy as np

from aquila_jax import axes
from aquila_jax.axes import EMBED, EXPERTS, LAYER_AXES
from aquila_jax.config import ModelConfig
from aquila_jax.growth.compose import Plan
from aquila_jax.growth.rules import Experts, Fresh, Mapped, Noise, Take


@dataclasses.dataclass(frozen=True)
class Upcycling:
    """What may be chosen beside the mixture's shape.

    Attributes:
        router_std: standard deviation of the routers (the paper prints 0.02 as a variance).
        noise: standard deviation of noise on experts, in units of a freshly initialised matrix's;
            not exact unless 0.
        noise_fraction: share of the weights that get it.
        redraw: share of every expert's hidden units that are drawn anew from their mean and
            deviation (Drop-Upcycling, arXiv 2502.19261); not exact unless 0.
        granularity: G, experts a copy of the MLP is cut into: E copies make G E experts, of which
            a token visits G k (virtual groups, arXiv 2410.07524; exact).
        compensate: multiply experts' outputs by E / k, for gates that are not renormalised.
        spread_scale: spread that factor, and G, over gate, up and down as cube roots (arXiv
            2410.07524) rather than give it to down alone; not exact.
        seed: of the choice of redrawn units.
    """

    router_std: float = 0.02
    noise: float = 0.0
    noise_fraction: float = 1.0
    redraw: float = 0.0
    granularity: int = 1
    compensate: bool = False
    spread_scale: bool = False
    seed: int = 0


def upcycle_plan(source: ModelConfig, target: ModelConfig, how: Upcycling) -> Plan:
    """The rule of every leaf of the mixture `target`.

    Experts are copies of the layer's MLP, or slices of copies, or copies with some units drawn
    anew; the shared expert holds the MLP's last units, and routed experts the others; routers are
    new. With gates that are renormalised over the chosen experts, copies and slices keep the
    function exactly, and the language-model gradient of the router is zero until experts differ.

    Slices: the G experts of a copy stand side by side and share one router column, so that a
    token's best k G experts are k whole copies (virtual groups). Each has 1 / G of its copy's
    gate, which the factor G makes up for.

    References:
        Sparse Upcycling (arXiv 2212.05055); AquilaMoE (arXiv 2408.06567); Drop-Upcycling (arXiv
        2502.19261), whose permutation of hidden units is left out as their order means nothing;
        virtual groups and weight scaling (arXiv 2410.07524); shared experts (arXiv 2401.06066).
    """
    factor = float(how.granularity)
    if how.compensate:
        factor *= target.num_experts / target.experts_per_token
    plan: dict[str, Mapped | Fresh] = {}
    for path, parameter in axes.parameters(target).items():
        axis = parameter.axes[0]
        mine = np.array(axes.layers_of(target, axis)) if axis in LAYER_AXES else None
        from_mlp = path.replace("/moe/shared_", "/mlp/").replace("/moe/", "/mlp/")
        if EXPERTS in parameter.writes:
            # Experts that are equal have no load to be balanced yet.
            std = how.router_std if parameter.reads else 0.0
            plan[path] = Fresh(std, repeat=how.granularity)
        elif EXPERTS in parameter.axes:
            dim = _hidden_dim(parameter) - 1
            scale = _scale(factor, how.spread_scale, writes_residual=EMBED in parameter.writes)
            plan[path] = Mapped(
                from_mlp,
                layers=mine,
                takes=_scaled(dim, source.mlp_dim, scale),
                experts=_experts(source, target, dim, how),
                noise=_noise(parameter, target, how),
            )
        elif "/moe/shared_" in path:
            units = np.arange(source.mlp_dim - target.shared_mlp_dim, source.mlp_dim)
            plan[path] = Mapped(from_mlp, layers=mine, takes=(Take(_hidden_dim(parameter), units),))
        else:
            plan[path] = Mapped(path, layers=mine)
    return plan


def is_upcycling_exact(target: ModelConfig, how: Upcycling) -> bool:
    """Whether the mixture computes what the dense model did."""
    # All gates of a softmax sum to 1 without being divided.
    has_all_gates = target.experts_per_token == target.num_experts
    gates_sum_to_one = target.renormalize_gates or (
        has_all_gates and target.router_scores == "softmax"
    )
    gates_sum_to_one &= target.router_scale == 1
    scales_exactly = not how.spread_scale or (how.granularity == 1 and not how.compensate)
    return gates_sum_to_one and scales_exactly and how.noise == how.redraw == 0


def _hidden_dim(parameter: axes.Parameter) -> int:
    """The dimension of the MLP's hidden units: the one that is neither stacked nor residual."""
    (dim,) = (
        dim
        for dim, axis in enumerate(parameter.axes)
        if axis not in axes.STACK_AXES and axis != EMBED
    )
    return dim


def _scale(factor: float, is_spread: bool, *, writes_residual: bool) -> float:
    if is_spread:
        return factor ** (1 / 3)
    return factor if writes_residual else 1.0


def _scaled(dim: int, size: int, scale: float) -> tuple[Take, ...]:
    return () if scale == 1 else (Take(dim, np.arange(size), np.full(size, scale)),)


def _experts(source: ModelConfig, target: ModelConfig, dim: int, how: Upcycling) -> Experts:
    """Which hidden units every expert holds."""
    routed = source.mlp_dim - target.shared_mlp_dim
    slices = np.arange(routed).reshape(how.granularity, target.expert_dim)
    units = np.tile(slices, (target.num_experts // how.granularity, 1))
    what = f"{target.num_experts} equal experts"
    if how.granularity > 1:
        what = f"{len(units)} experts, {how.granularity} to a copy"
    redrawn = None
    if how.redraw:
        count = round(how.redraw * target.expert_dim)
        num_layers = target.num_layers // target.moe_every
        ranks = np.random.default_rng(how.seed).random((num_layers, *units.shape))
        # The same units in gate, up and down: the generator starts anew for every leaf.
        redrawn = np.argsort(np.argsort(ranks, axis=-1), axis=-1) < count
        what += f", {count} of {target.expert_dim} units of each drawn anew"
    return Experts(dim, units, redrawn, what)


def _noise(parameter: axes.Parameter, target: ModelConfig, how: Upcycling) -> Noise | None:
    if not how.noise:
        return None
    std = how.noise / np.sqrt(parameter.fan_in(target))
    where = np.ones((1,) * len(parameter.axes), bool)
    what = f"noise of {how.noise:g} initial deviations"
    if how.noise_fraction < 1:
        what += f" on {how.noise_fraction:.0%} of the weights"
    return Noise(std, where, what, how.noise_fraction)
