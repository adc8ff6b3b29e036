"""The floating point operations that a program carries out, counted before it is compiled."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

# What jitted functions of megablox are called.
_GROUPED = ("gmm", "tgmm")


def executed_flops(jaxpr: Any, filled: float = 1.0) -> float:
    """Of matrix products, over all devices; a multiply and an add are two.

    XLA's own count sees a loop's body once and a custom call not at all. Here a scan's body
    counts as often as it runs, a Pallas kernel what its cost estimate says, recomputation as
    often as it happens, and a grouped product every row that is `filled` once. Of branches the
    costliest counts, of those that depend on the platform a TPU's. A `while` of unknown length
    counts once. What nobody reads does not count: compilers leave it out.

    Args:
        jaxpr: `jax.stages.Traced.jaxpr`.
        filled: which part of the rows of grouped products belongs to a group. Kernels pass over
            the others, but their cost estimates count them.
    """
    return _program_flops(jaxpr, filled)


def _program_flops(jaxpr: Any, filled: float, is_read: Sequence[bool] | None = None) -> float:
    """Of a program, of whose results some are read; None for all."""
    inner = getattr(jaxpr, "jaxpr", jaxpr)
    is_read = [True] * len(inner.outvars) if is_read is None else is_read
    return sum(_equation_flops(*live, filled) for live in _live(inner, is_read))


def _live(jaxpr: Any, is_read: Sequence[bool]) -> Iterator[tuple[Any, list[bool]]]:
    """The equations of which something is read, last ones first, and which results that is.

    And those that do more than give results.
    """
    wanted = {id(v) for v, is_one in zip(jaxpr.outvars, is_read, strict=True) if is_one}
    for equation in reversed(jaxpr.eqns):
        read = [id(variable) in wanted for variable in equation.outvars]
        # That a mesh axis is named is noted as an effect, and is none.
        does = any(type(effect).__name__ != "NamedAxisEffect" for effect in equation.effects)
        if does or any(read):
            wanted |= {id(variable) for variable in equation.invars}
            yield equation, read


def _equation_flops(equation: Any, is_read: list[bool], filled: float) -> float:
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
            return _program_flops(branches[_tpu_branch(platforms)], filled, is_read)
        return max(_program_flops(branch, filled, is_read) for branch in branches)
    times = filled if params.get("name") in _GROUPED else 1.0
    if name == "scan":
        times = params["length"]
    elif name == "shard_map":
        times = math.prod(params["mesh"].shape[axis] for axis in params["newly_manual_axes"])
    # What a loop carries it reads itself; a call's results are those of what it calls.
    is_call = name not in ("scan", "while")
    return times * sum(
        _program_flops(inner, filled, is_read if is_call and _fits(inner, is_read) else None)
        for inner in _inner(params)
    )


def _fits(jaxpr: Any, is_read: list[bool]) -> bool:
    return len(getattr(jaxpr, "jaxpr", jaxpr).outvars) == len(is_read)


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
