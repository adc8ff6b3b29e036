"""What a growth did, leaf by leaf, in a form that can be kept beside a checkpoint."""

import dataclasses
from typing import Any

import jax

from aquila_jax import axes
from aquila_jax.config import ModelConfig
from aquila_jax.growth.compose import Plan


@dataclasses.dataclass(frozen=True)
class LeafRecord:
    """Where one target leaf comes from.

    Attributes:
        path: the target leaf.
        origin: "copied" (every unit is a whole unit of the source), "mapped" (units scaled, or
            mixed from two layers), or "fresh" (random).
        source: the source leaf; None when fresh.
        shape: the target leaf's shape.
        how: one short phrase.
    """

    path: str
    origin: str
    source: str | None
    shape: tuple[int, ...]
    how: str


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Certificate:
    """The account of one growth.

    Attributes:
        method: the width or scale-out operator.
        depth: the depth operator; "" where there is none.
        exact: whether the grown model computes the same function, up to rounding.
        source: configuration before.
        target: configuration after.
        leaves: one record for every leaf of the target.
    """

    method: str
    depth: str
    exact: bool
    source: ModelConfig
    target: ModelConfig
    leaves: tuple[LeafRecord, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        rows = [
            (leaf.origin, leaf.path, "x".join(map(str, leaf.shape)), leaf.how)
            for leaf in self.leaves
        ]
        widths = [max(len(row[i]) for row in rows) for i in range(3)]
        lines = [
            "  ".join([*(cell.ljust(w) for cell, w in zip(row, widths, strict=False)), row[3]])
            for row in rows
        ]
        kept = "function kept" if self.exact else "function not kept"
        title = " + ".join(filter(None, (self.method, self.depth)))
        return "\n".join([f"{title}: {kept}", *lines])


def certificate_of(
    plan: Plan, source: ModelConfig, target: ModelConfig, *, method: str, depth: str, exact: bool
) -> Certificate:
    """The certificate of applying `plan`."""
    leaves = tuple(
        LeafRecord(path, plan[path].origin, plan[path].source, p.shape(target), plan[path].how)
        for path, p in axes.parameters(target).items()
    )
    return Certificate(method, depth, exact, source, target, leaves)
