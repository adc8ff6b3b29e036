"""Which leaf of a checkpoint becomes which leaf of a model that is nearly the same."""

import dataclasses
import re
from collections.abc import Mapping, Sequence

from aquila_jax import axes
from aquila_jax.config import ModelConfig
from aquila_jax.errors import UserError, few

# Pairs of a pattern and what it stands for: see `assign`.
AssignmentMap = Sequence[tuple[str, str | None]]


@dataclasses.dataclass(frozen=True)
class Assignment:
    """Where the leaves of a model come from.

    Attributes:
        sources: for every leaf of the model the checkpoint's leaf; None for a fresh one.
        unused: leaves of the checkpoint that no leaf of the model is made of.
    """

    sources: Mapping[str, str | None]
    unused: tuple[str, ...] = ()

    @property
    def fresh(self) -> tuple[str, ...]:
        """Leaves of the model that are initialised, not read."""
        return tuple(leaf for leaf, source in self.sources.items() if source is None)

    def __str__(self) -> str:
        """In words, or "" where every leaf has its own name on both sides."""
        renamed = [f"{leaf} from {source}" for leaf, source in self.sources.items() if source]
        renamed = [words for words in renamed if len(set(words.split(" from "))) > 1]
        parts = (("renamed", renamed), ("freshly initialised", self.fresh), ("unused", self.unused))
        return "; ".join(f"{kind}: {few(names)}" for kind, names in parts if names)


def check_map(assignment_map: AssignmentMap) -> None:
    """Every entry is a pair of a regular expression and what to put for it.

    Raises:
        UserError: one is not.
    """
    for entry in assignment_map:
        if not isinstance(entry, Sequence) or isinstance(entry, str) or len(entry) != 2:
            raise UserError(f"assignment_map holds {entry!r}: give pairs (pattern, replacement)")
        pattern, replacement = entry
        try:
            compiled = re.compile(pattern)
        except (re.error, TypeError) as error:
            raise UserError(
                f"assignment_map's {pattern!r} is no regular expression ({error})"
            ) from error
        if not isinstance(replacement, str | None):
            raise UserError(
                f"assignment_map replaces {pattern!r} by {replacement!r}: give a path or None"
            )
        groups = re.findall(r"\\(\d+)", replacement or "")
        if any(int(group) > compiled.groups for group in groups):
            raise UserError(
                f"assignment_map's {replacement!r} names a group that {pattern!r} lacks"
            )


def assign(
    wanted: ModelConfig,
    found: ModelConfig,
    assignment_map: AssignmentMap = (),
    *,
    allow_missing: bool = False,
) -> Assignment:
    """The leaves of `found` that those of `wanted` are read from.

    Args:
        wanted: the model to make.
        found: the model of the checkpoint.
        assignment_map: (regular expression on a whole path of `wanted`, replacement that gives
            the path in `found`); the first that matches counts, and without one a leaf keeps its
            path. None for a replacement: a leaf of `wanted` is freshly initialised, a leaf of
            `found` is left unused.
        allow_missing: initialise what `found` lacks and leave what nothing uses, whatever it is.

    Raises:
        UserError: listing the leaves that are missing, unused or of another shape.
    """
    ours, theirs = axes.parameters(wanted), axes.parameters(found)
    sources = {leaf: _source(leaf, assignment_map) for leaf in ours}
    missing = [leaf for leaf, source in sources.items() if source and source not in theirs]
    used = set(sources.values())
    unused = tuple(leaf for leaf in theirs if leaf not in used)
    shapes = [
        f"{leaf} {ours[leaf].shape(wanted)} from {source} {theirs[source].shape(found)}"
        for leaf, source in sources.items()
        if source in theirs and ours[leaf].shape(wanted) != theirs[source].shape(found)
    ]
    problems = {"of another shape": shapes}
    if not allow_missing:
        problems["missing there"] = [f"{leaf} (as {sources[leaf]})" for leaf in missing]
        problems["used by nothing"] = [leaf for leaf in unused if _source(leaf, assignment_map)]
    listed = "; ".join(f"{kind}: {few(names)}" for kind, names in problems.items() if names)
    if listed:
        raise UserError(
            f"the checkpoint's leaves are not the model's: {listed}; map them in "
            "TrainRun.assignment_map (to None for what is to be fresh or unused), or set "
            "TrainRun.allow_missing"
        )
    return Assignment({**sources, **dict.fromkeys(missing)}, unused)


def _source(leaf: str, assignment_map: AssignmentMap) -> str | None:
    for pattern, replacement in assignment_map:
        if match := re.fullmatch(pattern, leaf):
            return None if replacement is None else match.expand(replacement)
    return leaf
