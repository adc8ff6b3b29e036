"""What a growth did, leaf by leaf, in a form that can be kept beside a checkpoint."""

import dataclasses
import html
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

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


@dataclasses.dataclass(frozen=True)
class Measurement:
    """Both models on the same tokens.

    Attributes:
        num_tokens: predictions compared.
        max_logit_difference: largest absolute difference, over the source's vocabulary.
        kl: mean of KL(source || grown) over predictions, in nats, over the source's vocabulary.
        source_loss: negative log-likelihood of the next token under the source, in nats.
        grown_loss: the same under the grown model, with its new tokens, if any.
    """

    num_tokens: int
    max_logit_difference: float
    kl: float
    source_loss: float
    grown_loss: float


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
        dtype: of the grown parameters; "" where a plan has not been applied.
        source_hash: `content_hash` of the source's parameters; "" where it was not taken.
        target_hash: the same of the grown ones.
        measured: both on a probe batch; None where they were not compared.
    """

    method: str
    depth: str
    exact: bool
    source: ModelConfig
    target: ModelConfig
    leaves: tuple[LeafRecord, ...]
    dtype: str = ""
    source_hash: str = ""
    target_hash: str = ""
    measured: Measurement | None = None

    def num_bytes(self, leaf: LeafRecord) -> int:
        """What a leaf takes in `dtype`; 0 where that is not known."""
        return math.prod(leaf.shape) * (np.dtype(self.dtype).itemsize if self.dtype else 0)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        rows = self._rows()
        widths = [max(len(row[i]) for row in rows) for i in range(4)]
        lines = [
            "  ".join([*(cell.ljust(w) for cell, w in zip(row, widths, strict=False)), row[4]])
            for row in rows
        ]
        return "\n".join([self.title, *lines, *self._facts()])

    def _repr_html_(self) -> str:
        """The same as a table, for notebooks."""
        body = "".join(
            "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>"
            for row in self._rows()
        )
        facts = "".join(f"<li>{html.escape(fact)}</li>" for fact in self._facts())
        return (
            f"<b>{html.escape(self.title)}</b><ul>{facts}</ul><table><tr><th>origin</th>"
            f"<th>leaf</th><th>shape</th><th>bytes</th><th>how</th></tr>{body}</table>"
        )

    @property
    def title(self) -> str:
        """One line: what was done, and whether the function is kept."""
        kept = "function kept" if self.exact else "function not kept"
        return " + ".join(filter(None, (self.method, self.depth))) + f": {kept}"

    def _rows(self) -> list[tuple[str, str, str, str, str]]:
        return [
            (
                leaf.origin,
                leaf.path,
                "x".join(map(str, leaf.shape)),
                f"{self.num_bytes(leaf):,}" if self.dtype else "",
                leaf.how,
            )
            for leaf in self.leaves
        ]

    def _facts(self) -> list[str]:
        facts = []
        if self.source_hash:
            facts.append(f"source {self.source_hash}, grown {self.target_hash}")
        if self.measured is not None:
            seen = self.measured
            facts.append(
                f"on {seen.num_tokens} predictions: loss {seen.source_loss:.4f} before, "
                f"{seen.grown_loss:.4f} after; KL {seen.kl:.3g} nats; logits differ by at most "
                f"{seen.max_logit_difference:.3g}"
            )
        return facts


def certificate_of(
    plan: Plan, source: ModelConfig, target: ModelConfig, *, method: str, depth: str, exact: bool
) -> Certificate:
    """The certificate of applying `plan`."""
    leaves = tuple(
        LeafRecord(path, plan[path].origin, plan[path].source, p.shape(target), plan[path].how)
        for path, p in axes.parameters(target).items()
    )
    return Certificate(method, depth, exact, source, target, leaves)


def with_dtype(certificate: Certificate, grown: Mapping[str, Any]) -> Certificate:
    """The certificate of parameters that exist (or are traced), so that bytes can be told."""
    dtype = jnp.result_type(*axes.flatten(grown).values())
    return dataclasses.replace(certificate, dtype=str(dtype))
