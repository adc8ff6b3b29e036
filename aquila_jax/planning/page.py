"""A plan as one page of text."""

from collections.abc import Iterator, Sequence

from aquila_jax import accounting
from aquila_jax.planning.plan import Plan

_GB, _GIB = 1e9, 2**30


def page(plan: Plan) -> str:
    """The whole plan, for a terminal."""
    parts = [_head(plan), _memory(plan)]
    if plan.fits:
        parts += [_traffic(plan), _time(plan)]
    return "\n".join(line for part in parts for line in part)


def verdict(plan: Plan) -> str:
    """Whether it fits, and by how much."""
    spare = plan.capacity - plan.memory.total
    each = _each(plan)
    if plan.fits:
        return (
            f"fits, with {spare / _GIB:.2f} GiB of {plan.capacity / _GIB:.2f} spare on each {each}"
        )
    return (
        f"does not fit: needs {plan.memory.total / _GIB:.2f} GiB of {plan.capacity / _GIB:.2f} on "
        f"each {each}, {-spare / _GIB:.2f} too much"
    )


def _each(plan: Plan) -> str:
    devices = plan.topology.chip.devices
    return "chip" if devices == 1 else f"core ({devices} a chip)"


def _head(plan: Plan) -> Iterator[str]:
    total = accounting.num_parameters(plan.model) / 1e9
    active = accounting.num_active_parameters(plan.model) / 1e9
    mesh = ", ".join(f"{name} {size}" for name, size in plan.mesh.items())
    # A batch in one part is the usual, and nothing to tell.
    told = {
        name: value for name, value in plan.settings.items() if name != "micro_batches" or value > 1
    }
    settings = ", ".join(f"{name} {value}" for name, value in told.items())
    yield f"{plan.what} on {plan.topology}: {verdict(plan)}"
    yield ""
    yield f"model      {total:.2f} B parameters, {active:.2f} B active"
    yield f"mesh       {mesh}"
    yield f"settings   {settings}"
    yield f"compiled   in {plan.compile_seconds:.1f} s, for chips that are not here"


def _memory(plan: Plan) -> Iterator[str]:
    memory = plan.memory
    yield ""
    yield f"HBM on each {_each(plan)}, GiB"
    for name, size in memory.resident.items():
        yield f"  {name:<14}{size / _GIB:9.3f}"
    if plan.fits:
        yield f"  {'temporaries':<14}{memory.temporaries / _GIB:9.3f}   gradients and activations"
        yield f"  {'outputs':<14}{memory.outputs / _GIB:9.3f}   beyond what replaces an input"
        yield f"  {'program':<14}{memory.program / _GIB:9.3f}"
        padding = memory.arguments - sum(memory.resident.values())
        yield f"  {'padding':<14}{padding / _GIB:9.3f}   of arguments, to the chip's tiles"
    else:
        yield f"  {'the rest':<14}{memory.temporaries / _GIB:9.3f}   as the compiler refused it"
    yield f"  {'total':<14}{memory.total / _GIB:9.3f}   of {plan.capacity / _GIB:.2f}"


def _traffic(plan: Plan) -> Iterator[str]:
    yield ""
    yield f"sent by each {_each(plan)} in one execution, loops times their trips"
    rows = [
        (
            sent.kind,
            " x ".join(sent.axes),
            f"{sent.count:,}",
            f"{sent.ici_bytes / _GB:.3f}",
            f"{sent.dcn_bytes / _GB:.3f}",
        )
        for sent in plan.traffic
        if sent.ici_bytes + sent.dcn_bytes >= 5e5
    ]
    assert plan.work is not None
    rows.append(
        ("all", "", "", f"{plan.work.ici_bytes / _GB:.3f}", f"{plan.work.dcn_bytes / _GB:.3f}")
    )
    yield from table(("collective", "along", "count", "ICI, GB", "DCN, GB"), rows)
    if plan.unknown_loops:
        yield f"  {plan.unknown_loops} loops of unknown length (a mixture's rounds) counted once"


def _time(plan: Plan) -> Iterator[str]:
    bound, work = plan.bound, plan.work
    assert bound is not None
    assert work is not None
    yield ""
    if plan.tokens:
        yield (
            f"model FLOPs {work.model_flops:.3e} in one execution of {plan.tokens:,} tokens; the "
            f"program's {work.executed_flops:.3e}"
        )
        yield "  matrix products and attention; scans times their length, kernels as they say"
    seconds = ", ".join(f"{name} {value:.4g} s" for name, value in bound.seconds.items() if value)
    yield f"at least {bound.bound:.4g} s, bound by {bound.binding} ({seconds})"
    if not plan.tokens:
        return
    yield f"at most {bound.mfu:.1%} MFU and {plan.tokens_per_day / 1e9:.4g} B tokens a day"
    if plan.what == "train":
        for name, tokens in plan.token_counts.items():
            days = plan.days(tokens)
            hours = days * 24 * plan.topology.num_chips
            counted = f"{tokens / 1e9:,.4g} B tokens"
            yield f"  {name}: {counted}, {days:,.1f} days, {hours:,.0f} chip-hours"
    yield "a roofline: every resource at its peak and all at once. A bound, not a measurement"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Aligned columns: the first two to the left, numbers to the right."""
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    for row in (head, *rows):
        cells = [
            f"{cell:<{width}}" if i < 2 else f"{cell:>{width}}"
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        yield "  " + "  ".join(cells).rstrip()
