"""What each growth did, told from its certificate, as HTML."""

import math
from collections.abc import Mapping, Sequence

from aquila_jax.reports import words
from aquila_jax.reports.lineup import Entry
from aquila_jax.reports.records import MEAN, Certificate, Stage
from aquila_jax.reports.svg import esc, strips

_ORIGINS = ("copied", "mapped", "fresh")


def growths(entries: Sequence[Entry]) -> str:
    """What each growth did, by its certificate."""
    parts = [
        _growth(entry, entry.run.certificate)
        for entry in entries
        if entry.run is not None and entry.run.certificate is not None
    ]
    return "".join(parts)


def _growth(entry: Entry, certificate: Certificate) -> str:
    how = certificate.method + (f", depth by {certificate.depth}" if certificate.depth else "")
    promise = (
        "exact: the grown model computes the same function"
        if certificate.exact
        else "not exact: the function changes, and training has to make up for it"
    )
    before = entry.stages[-2] if len(entry.stages) > 1 else None
    return (
        f'<article><h3><i class="swatch {entry.style}"></i>{esc(entry.label)}: {esc(how)}</h3>'
        f"<p>{esc(promise[0].upper() + promise[1:])}. {esc(_jump(before, entry.stage))}"
        f"{esc(_measured(certificate.measured))}</p>"
        f"{_changes(certificate)}{_origins(certificate)}{_leaves(certificate)}</article>"
    )


def _jump(before: Stage | None, stage: Stage) -> str:
    ended = before.validation_end.get(MEAN) if before else None
    started = stage.validation_start.get(MEAN)
    if ended is None or started is None:
        return ""
    losses = f"from {words.loss(ended)} to {words.loss(started)}"
    return f"Validation loss went {losses} ({started - ended:+.3f})."


def _measured(measured: Mapping[str, float]) -> str:
    """What the certificate saw on its probe, where it was measured."""
    if not measured:
        return ""
    return (
        f" On a probe of {measured['num_tokens']:.0f} predictions the loss went from "
        f"{words.loss(measured['source_loss'])} to {words.loss(measured['grown_loss'])}; KL "
        f"{measured['kl']:.2g} nats, logits at most {measured['max_logit_difference']:.2g} apart."
    )


def _changes(certificate: Certificate) -> str:
    source, target = certificate.source, certificate.target
    keys = [key for key in dict.fromkeys((*source, *target)) if source.get(key) != target.get(key)]
    items = "".join(
        f"<li><b>{esc(str(key).replace('_', ' '))}</b> "
        f"{esc(source.get(key, words.MISSING))} → {esc(target.get(key, words.MISSING))}</li>"
        for key in keys
    )
    return f'<ul class="changes">{items}</ul>' if items else ""


def _origins(certificate: Certificate) -> str:
    kinds = list(dict.fromkeys((*_ORIGINS, *(leaf.origin for leaf in certificate.leaves))))
    values = dict.fromkeys(kinds, 0)
    for leaf in certificate.leaves:
        values[leaf.origin] += math.prod(leaf.shape)
    total = sum(values.values())
    if not total:
        return ""
    bar = strips([(_origin_style(kind), values[kind] / total) for kind in kinds])
    items = []
    for kind in kinds:
        leaves = sum(leaf.origin == kind for leaf in certificate.leaves)
        if leaves:
            share = values[kind] / total
            told = f"{leaves} {'leaf' if leaves == 1 else 'leaves'}, {share:.1%} of the parameters"
            items.append(f"<li>{_badge(kind)} {esc(told)}</li>")
    return f'{bar}<ul class="origins">{"".join(items)}</ul>'


def _origin_style(origin: str) -> str:
    return f"o-{origin}" if origin in _ORIGINS else "o-other"


def _badge(origin: str) -> str:
    return f'<span class="badge {_origin_style(origin)}">{esc(origin)}</span>'


def _leaves(certificate: Certificate) -> str:
    rows = "".join(
        f"<tr><td><code>{esc(leaf.path)}</code></td><td>{_badge(leaf.origin)}</td>"
        f"<td><code>{esc(leaf.source or words.MISSING)}</code></td>"
        f"<td>{' &times; '.join(map(str, leaf.shape)) or 'scalar'}</td>"
        f"<td>{esc(leaf.how)}</td></tr>"
        for leaf in certificate.leaves
    )
    header = "".join(f"<th>{name}</th>" for name in ("leaf", "origin", "from", "shape", "how"))
    return (
        f"<details><summary>All {len(certificate.leaves)} leaves</summary>"
        f'<div class="scroll"><table class="leaves"><thead><tr>{header}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div></details>"
    )
