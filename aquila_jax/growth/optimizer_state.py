"""Adam's moments through a growth.

A gradient is what comes in times what comes back, so it grows by the same indices as its
parameter: along an axis that a matrix reads, by what the incoming copies were written with;
along one it writes, by what the outgoing copies are read with (`Take.gradient`). The first moment
is a mean of gradients and takes those factors, the second a mean of squares and takes their
squares. For evenly split FPI at whole multiples and for "isometric" the mapped gradient is that
of the grown model; for "zero_pad" and "latent" it is where the source can tell, and 0 elsewhere.
For other methods it is a heuristic, and so is 1/E of the gradient for each of E experts.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from aquila_jax import axes
from aquila_jax.config import ModelConfig
from aquila_jax.errors import UserError
from aquila_jax.growth.certificate import Certificate
from aquila_jax.growth.compose import Plan
from aquila_jax.growth.rules import Experts, Extend, Mapped, Take

POLICIES = ("reset", "map", "keep_old_zero_new")


def grow_moments(
    plan: Plan, certificate: Certificate, moments: Any, *, power: int, policy: str
) -> dict[str, Any]:
    """A moment of the target's parameters from that of the source's.

    Args:
        plan: how the parameters grow.
        certificate: its certificate, for the two configurations.
        moments: nested like the source's parameters: Adam's mu or nu, or gradients.
        power: 1 for mu and gradients, 2 for nu.
        policy: "reset" (zeros), "map" (all that the source tells), or "keep_old_zero_new" (mapped
            on the first copy of every unit, layer and expert, zero on the others).

    Returns:
        Nested like the target's parameters, in the source's dtype.

    Raises:
        UserError: there is no such policy.
    """
    check_policy(policy)
    source, target = certificate.source, certificate.target
    flat = axes.flatten(moments)
    dtype = jnp.result_type(*flat.values())
    # A tied gradient is the sum of two that an untied model has apart.
    unknown = {"token_embedder/embedding", "lm_head/kernel"}
    is_untied = source.tie_embeddings and not target.tie_embeddings
    grown = {}
    for path, parameter in axes.parameters(target).items():
        rule = plan[path]
        if policy == "reset" or not isinstance(rule, Mapped) or (is_untied and path in unknown):
            grown[path] = jnp.zeros(parameter.shape(target), dtype)
            continue
        silent = _silent_layers(plan, target, parameter.axes[0])
        moment_rule = _moment_rule(rule, silent, power, keeps_new=policy == "map")
        leaf = moment_rule.apply(jnp.asarray(flat[rule.source]))
        is_known = _known_experts(rule.experts, leaf.ndim, keeps_new=policy == "map")
        grown[path] = leaf if is_known is None else jnp.where(is_known, leaf, 0)
    return axes.unflatten(grown)


def check_policy(policy: str) -> None:
    """`policy` is one of `POLICIES`.

    Raises:
        UserError: it is not.
    """
    if policy not in POLICIES:
        raise UserError(f"no optimizer-state policy {policy!r}; there are {', '.join(POLICIES)}")


def _silent_layers(plan: Plan, target: ModelConfig, axis: str) -> np.ndarray | None:
    """Inserted layers: nothing flows back through their zero outputs, so no leaf has a gradient."""
    out = plan["layers/attention/out"]
    if axis not in axes.LAYER_AXES or not isinstance(out, Mapped) or out.silent is None:
        return None
    return out.silent[list(axes.layers_of(target, axis))]


def _moment_rule(rule: Mapped, silent: np.ndarray | None, power: int, keeps_new: bool) -> Mapped:
    takes = []
    for old in rule.takes:
        factors = np.ones(len(old.index)) if old.gradient is None else old.gradient**power
        if not keeps_new:
            factors = np.where(_is_first(old.index), factors, 0.0)
        takes.append(Take(old.dim, old.index, factors))
    if rule.experts is not None and keeps_new:
        holders = np.bincount(rule.experts.units.reshape(-1))
        share = np.maximum(holders, 1.0) ** -power
        takes.append(Take(rule.experts.dim, np.arange(len(share)), share))
    if not keeps_new and rule.layers is not None:
        silent = ~_is_first(rule.layers)
    experts = rule.experts
    return Mapped(
        source=rule.source,
        transpose=rule.transpose,
        extend=rule.extend and Extend(rule.extend.dim, rule.extend.size, "zero"),
        layers=rule.layers,
        takes=takes,
        upper=rule.upper if keeps_new else None,
        silent=silent,
        experts=experts and Experts(experts.dim, experts.units, None, experts.what),
    )


def _is_first(index: np.ndarray) -> np.ndarray:
    first = np.zeros(len(index), bool)
    first[np.unique(index, return_index=True)[1]] = True
    return first


def _known_experts(experts: Experts | None, ndim: int, keeps_new: bool) -> jax.Array | None:
    """Bool, broadcasts against `[layers, E, ...]`: experts and units whose moments are kept."""
    if experts is None or (keeps_new and experts.redrawn is None):
        return None
    is_known = np.ones((1, *experts.units.shape), bool)
    if experts.redrawn is not None:
        is_known = ~experts.redrawn
    if not keeps_new:
        # Every hidden unit is kept by the first expert that holds it.
        first = _is_first(experts.units.reshape(-1)).reshape(experts.units.shape)
        is_known = is_known & first
    shape = [*is_known.shape[:2], *[1] * (ndim - 2)]
    shape[experts.dim + 1] = -1
    return jnp.asarray(is_known.reshape(shape))
