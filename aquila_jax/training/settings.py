"""The settings of a run beside those it was last trained with: what may change."""

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from aquila_jax.errors import UserError

# Where a run lies, how it was told to go on and what is traced is no part of what it computes;
# steps are compared as the number that they come to.
_LEFT_OUT = (
    "model_dir",
    "allow_changes",
    "steps",
    "match_flops_of",
    "compiled_step",
    "profile_steps",
)


def flatten(settings: Any) -> dict[str, Any]:
    """Every setting of a dataclass by its dotted name, as JSON has it.

    A value that is a dataclass gives its kind, and each of its fields.
    """
    return json.loads(json.dumps(dict(_flatten("", settings)), default=str))


def is_covered(name: str, allowed: Sequence[str]) -> bool:
    """Whether `allowed` names this setting, or one that it is part of."""
    return any(name == one or name.startswith(f"{one}.") for one in allowed)


def compare(
    saved: Mapping[str, Any],
    current: Mapping[str, Any],
    *,
    is_order_changed: bool,
    allowed: Sequence[str],
) -> list[str]:
    """A line for each setting that is another one now.

    Args:
        saved: what `flatten` gave when the checkpoint was written.
        current: what it gives now.
        is_order_changed: whether the data would come in another order.
        allowed: settings that may change even so.

    Raises:
        UserError: the order of the data changed, by settings that `allowed` does not name.
    """
    names = [name for name in {**saved, **current} if saved.get(name) != current.get(name)]
    lines = {
        name: f"{name} was {_show(saved, name)} and is {_show(current, name)} now"
        for name in names
        if not is_covered(name, _LEFT_OUT)
    }
    if is_order_changed:
        to_blame = [name for name in lines if is_covered(name, ("data",))]
        refused = [name for name in to_blame or ["data"] if not is_covered(name, allowed)]
        if refused:
            said = [lines.get(name, f"what {name} reads has changed") for name in refused]
            raise UserError(
                f"{'; '.join(said)}: batches from here on would be other ones than those of the "
                "run so far; set it back, or allow it by name: "
                f"TrainRun.allow_changes = {tuple(refused)!r}"
            )
    return list(lines.values())


def _flatten(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    if not dataclasses.is_dataclass(value):
        known = isinstance(value, (str, int, float, tuple, list, Mapping, type(None)))
        # Anything else is data of the caller's own kind, whose settings are not to be seen.
        yield name, value if known else type(value).__name__
        return
    if name:
        yield name, type(value).__name__
    for field in dataclasses.fields(value):
        yield from _flatten(f"{name}.{field.name}".lstrip("."), getattr(value, field.name))


def _show(settings: Mapping[str, Any], name: str) -> str:
    return json.dumps(settings[name], ensure_ascii=False) if name in settings else "not set"
