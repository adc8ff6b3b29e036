"""The exceptions that mean: the person, or whoever starts processes, can mend this; their words."""

import math
import numbers
from collections.abc import Sequence
from typing import Any

# What a line of ours has room for of what others say.
_MOST_CHARACTERS = 300


class UserError(ValueError):
    """A mistake in what was asked for: one line that names the values and the way out.

    The command line prints the message alone and exits with `exit_code`; every other exception is
    a defect of ours and keeps its traceback.
    """

    exit_code = 2


class HostsLostError(UserError):
    """Another process of the run is not there, or no longer.

    Nothing is to be mended: the same command, started again everywhere, goes on.
    """

    exit_code = 75


def check_number(
    name: str,
    value: Any,
    *,
    least: float = -math.inf,
    most: float = math.inf,
    below: float = math.inf,
    is_whole: bool = False,
) -> None:
    """A setting is a number in its range, which is finite.

    Args:
        name: of the setting, for the message.
        value: what was given.
        least: it is no smaller.
        most: it is no larger.
        below: it is smaller than this.
        is_whole: whether it counts something.

    Raises:
        UserError: it is not.
    """
    # NumPy's numbers are both, which annotations do not know.
    kind: Any = numbers.Integral if is_whole else numbers.Real
    is_number = isinstance(value, kind) and not isinstance(value, bool)
    # An int may be larger than any float.
    is_finite = is_number and (isinstance(value, int) or math.isfinite(value))
    if is_finite and least <= value <= most and value < below:
        return
    limits = (("at least", least), ("at most", most), ("below", below))
    told = [f"{words} {limit:,.15g}" for words, limit in limits if math.isfinite(limit)]
    wanted = ", ".join(["a whole number" if is_whole else "a number", *told])
    raise UserError(f"{name} must be {wanted}, not {value!r}")


def first_line(error: BaseException) -> str:
    """What another library's error says first, cut short; its type's name where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:_MOST_CHARACTERS]


def few(names: Sequence[str], most: int = 8) -> str:
    """The first names of a list, and how many more there are."""
    rest = len(names) - most
    return ", ".join(names[:most]) + (f" and {rest} more" if rest > 0 else "")
