"""A growth as a plan: a rule for every leaf of the target, checked before it is carried out."""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from aquila_jax import axes
from aquila_jax.config import ModelConfig
from aquila_jax.errors import UserError
from aquila_jax.growth.rules import Fresh, Mapped, anywhere
from aquila_jax.sharding import Layout

Plan = Mapping[str, Mapped | Fresh]


def check_plan(plan: Plan, source: ModelConfig, target: ModelConfig) -> None:
    """Every target leaf is written once, and every source leaf is used.

    Raises:
        UserError: leaves are left over on either side; the message lists both.
    """
    wanted, given = set(axes.parameters(target)), set(axes.parameters(source))
    used = {rule.source for rule in plan.values() if rule.source is not None}
    problems = {
        "target leaves without a rule": wanted - set(plan),
        "rules for leaves the target lacks": set(plan) - wanted,
        "rules that read leaves the source lacks": used - given,
        "source leaves that nothing uses": given - used,
    }
    if any(problems.values()):
        listed = "; ".join(f"{what}: {sorted(paths)}" for what, paths in problems.items() if paths)
        raise UserError(f"the growth does not account for every leaf: {listed}")


def check_source(params: Mapping[str, Any], config: ModelConfig) -> None:
    """`params` has exactly the leaves and shapes of a model of `config`.

    Raises:
        UserError: naming the first leaves that are missing, unknown or of another shape.
    """
    flat, expected = axes.flatten(params), axes.parameters(config)
    if missing := sorted(set(expected) - set(flat)):
        raise UserError(f"the source parameters lack {missing}, which their config asks for")
    if unknown := sorted(set(flat) - set(expected)):
        raise UserError(f"the source parameters hold {unknown}, which their config does not have")
    for path, parameter in expected.items():
        if tuple(flat[path].shape) != parameter.shape(config):
            raise UserError(
                f"{path} has shape {tuple(flat[path].shape)}, but its config says "
                f"{parameter.shape(config)} for axes {parameter.axes}"
            )


def apply_plan(
    plan: Plan,
    params: Mapping[str, Any],
    target: ModelConfig,
    key: jax.Array | None,
    layout: Layout | None = None,
) -> dict[str, Any]:
    """The target's parameters.

    Args:
        plan: a plan that `check_plan` accepts.
        params: the source's nested parameters; not modified.
        target: configuration of the result.
        key: random key for fresh leaves; each folds its own path in, so that a leaf's values
            depend neither on the order nor on the number of the others.
        layout: under `jit`, the devices that no leaf may stand whole on: before units are taken
            along a dimension its shards are moved to another one. None leaves where things stand
            to the compiler, which would gather the leaf.

    Raises:
        UserError: a leaf is drawn at random, and there is no key.
    """
    flat = axes.flatten(params)
    dtype = jnp.result_type(*flat.values())
    grown = {}
    for path, parameter in axes.parameters(target).items():
        rule = plan[path]
        if rule.is_random and key is None:
            raise UserError(f"{path} is drawn at random: pass key=jax.random.key(seed)")
        if isinstance(rule, Mapped):
            spread = anywhere if layout is None else functools.partial(_spread, layout, parameter)
            grown[path] = rule.apply(jnp.asarray(flat[rule.source]), path, key, spread)
        else:
            assert key is not None
            grown[path] = rule.draw(parameter.shape(target), dtype, path, key)
    return axes.unflatten(grown)


def _spread(
    layout: Layout, parameter: axes.Parameter, leaf: jax.Array, dim: int | None
) -> jax.Array:
    logical = parameter.axes
    if leaf.ndim < len(logical):  # not yet repeated by expert
        logical = tuple(axis for axis in logical if axis != axes.EXPERTS)
    return layout.constrain_except(leaf, logical, dim)
