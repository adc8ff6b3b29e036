"""The floating point operations that a program carries out, counted before it is compiled."""

import math
from collections.abc import Iterator
from typing import Any

# What jitted functions of megablox are called.
_GROUPED = ("gmm", "tgmm")


def executed_flops(jaxpr: Any, filled: float = 1.0) -> float:
    """Of matrix products, over all devices; a multiply and an add are two.

    XLA's own count sees a loop's body once and a custom call not at all. Here a scan's body
    counts as often as it runs, a Pallas kernel what its cost estimate says, recomputation as
    often as it happens, and a grouped product every row that is `filled` once. Of branches the
    costliest counts, of those that depend on the platform a TPU's. A `while` of unknown length
    counts once.

    Args:
        jaxpr: `jax.stages.Traced.jaxpr`.
        filled: which part of the rows of grouped products belongs to a group. Kernels pass over
            the others, but their cost estimates count them.
    """
    inner = getattr(jaxpr, "jaxpr", jaxpr)
    return sum(_equation_flops(equation, filled) for equation in inner.eqns)


def _equation_flops(equation: Any, filled: float) -> float:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        return _dot_flops(equation)
    if name.startswith("ragged_dot"):
        return 2.0 * filled * _ragged_products(equation)
    if name == "pallas_call":
        return float(getattr(params.get("cost_estimate"), "flops", 0) or 0)
    if name == "cond":
        branches, platforms = params["branches"], params.get("branches_platforms")
        if platforms is not None:
            return executed_flops(branches[_tpu_branch(platforms)], filled)
        return max(executed_flops(branch, filled) for branch in branches)
    times = filled if params.get("name") in _GROUPED else 1.0
    if name == "scan":
        times = params["length"]
    elif name == "shard_map":
        times = math.prod(params["mesh"].shape[axis] for axis in params["newly_manual_axes"])
    return times * sum(executed_flops(inner, filled) for inner in _inner(params))


def _tpu_branch(platforms: Any) -> int:
    """Which branch a TPU takes: the one that names it, else the default, which names none."""
    for index, names in enumerate(platforms):
        if names is not None and "tpu" in names:
            return index
    return next(index for index, names in enumerate(platforms) if names is None)


def _inner(params: dict[str, Any]) -> Iterator[Any]:
    """The programs that an equation holds."""
    for value in params.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            if hasattr(item, "eqns") or hasattr(getattr(item, "jaxpr", None), "eqns"):
                yield item


def _dot_flops(equation: Any) -> float:
    ((contracted, _), _) = equation.params["dimension_numbers"]
    lhs, out = equation.invars[0].aval.shape, equation.outvars[0].aval.shape
    return 2.0 * math.prod(out) * math.prod(lhs[dim] for dim in contracted)


def _ragged_products(equation: Any) -> float:
    """Multiplications of a grouped product: each row meets one group's matrix."""
    dims = equation.params["ragged_dot_dimension_numbers"]
    lhs, out = equation.invars[0].aval.shape, equation.outvars[0].aval.shape
    ((contracted, _), _) = dims.dot_dimension_numbers
    products = float(math.prod(out) * math.prod(lhs[dim] for dim in contracted))
    if set(dims.lhs_ragged_dimensions) & set(contracted):
        # The gradient of the matrices: a group's is a sum over its own rows only.
        products /= equation.invars[2].aval.shape[-1]
    return products
