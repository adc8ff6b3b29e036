"""The parts of the page, each a function from the line-up to HTML."""

import json
import math
from collections.abc import Sequence

from aquila_jax.reports import words
from aquila_jax.reports.axes import FLOPS, LOG_FLOPS, TOKENS, time_axis
from aquila_jax.reports.curves import line_of, loss_lines
from aquila_jax.reports.lineup import Entry, tips
from aquila_jax.reports.story import compare
from aquila_jax.reports.svg import Canvas, chart, esc
from aquila_jax.reports.table import tabulate

READING = (
    "Points and strong lines are validation loss, thin lines are training loss, against what the "
    "whole lineage spent so far; a dotted arrow is a growth. The steep first part of training "
    "from scratch is out of the frame."
)
_WIDE, _NARROW, _SMALL = (1040, 460), (420, 380), (350, 215)


def tiles(entries: Sequence[Entry]) -> str:
    """The few numbers that one looks for first."""
    last = (*tips(entries), entries[-1])[0]
    shown = [("final loss" if last.stage.finished else "loss so far", words.loss(last.last_loss))]
    for comparison in compare(entries)[:1]:
        gap = comparison.grown.last_loss - comparison.control.last_loss
        if math.isfinite(gap) and comparison.winner != "open":
            shown.append(("against from scratch", f"{gap:+.3f}"))
        if comparison.saving is not None and comparison.saving > 1:
            whose = "growing" if comparison.winner == "grown" else "from scratch"
            shown.append((f"compute saved by {whose}", f"{comparison.saving:.2f}x"))
    shown.append(("parameters", words.count(last.stage.parameters)))
    shown.append(("training FLOPs", words.power(last.total_flops)))
    shown.append(("training time", words.duration(sum(s.seconds for s in last.stages))))
    cells = (f"<div><dt>{esc(name)}</dt><dd>{esc(value)}</dd></div>" for name, value in shown)
    return f'<dl class="tiles">{"".join(cells)}</dl>'


def legend(entries: Sequence[Entry]) -> str:
    """Which colour is which run."""
    items = "".join(
        f'<li><svg class="key" viewBox="0 0 34 12" aria-hidden="true">'
        f'<path class="line validation {entry.style}" d="M1 6H33"/>'
        f'<g class="dots {entry.style}"><circle cx="17" cy="6" r="3.6"/></g></svg>'
        f"{esc(entry.legend)}</li>"
        for entry in entries
        if entry.run is not None
    )
    return f'<ul class="legend">{items}</ul>'


def stages(entries: Sequence[Entry]) -> str:
    """The table of stages."""
    table = tabulate(entries)
    head = "".join(f'<th scope="col">{esc(cell)}</th>' for cell in table.header)
    rows = []
    for entry, (name, *cells) in zip(entries, table.rows, strict=True):
        shape = words.clip(words.shape(entry.stage.model), 120)
        rest = "".join(f"<td>{esc(cell)}</td>" for cell in cells)
        swatch = f'<i class="swatch {entry.style}"></i>' if entry.run is not None else ""
        rows.append(
            f'<tr><th scope="row">{swatch}{esc(name)}<small>{esc(shape)}</small></th>{rest}</tr>'
        )
    notes = "".join(f'<p class="note">{esc(note)}.</p>' for note in table.notes)
    return (
        f'<div class="scroll"><table class="stages"><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>{notes}"
    )


def main_chart(entries: Sequence[Entry]) -> str:
    """The paper's picture, against compute or time, as wide and as narrow drawing."""
    longest = max(sum(stage.seconds for stage in entry.stages) for entry in entries)
    axes = (LOG_FLOPS, FLOPS, time_axis(longest))
    inputs, panels = [], []
    for number, axis in enumerate(axes):
        name, checked = f"axis-{number}", " checked" if number == 0 else ""
        inputs.append(
            f'<input type="radio" name="axis" id="{name}"{checked}>'
            f'<label for="{name}">{esc(axis.name)}</label>'
        )
        lines = loss_lines(entries, axis)
        drawn = []
        for kind, (width, height) in (("wide", _WIDE), ("narrow", _NARROW)):
            what = f"Loss against {axis.label} for every stage"
            canvas = Canvas(width, height, what, words.loss, "loss", ends=True)
            drawn.append(f'<div class="{kind}">{chart(lines, axis, canvas)}</div>')
        panels.append(f'<div class="panel">{"".join(drawn)}</div>')
    return f'<div class="tabs">{"".join(inputs)}<div class="panels">{"".join(panels)}</div></div>'


def language_charts(entries: Sequence[Entry]) -> str:
    """One small picture for every validated language."""
    languages = dict.fromkeys(name for entry in entries for name in entry.stage.languages)
    drawn = []
    for language in languages if len(languages) > 1 else ():
        lines = loss_lines(entries, LOG_FLOPS, language)
        # A small picture has room for a few numbers only.
        few = sum(line.kind == "validation" for line in lines) <= 4
        canvas = Canvas(*_SMALL, f"Validation loss, {language}", words.loss, "loss", ends=few)
        drawn.append(_small(f"Validation loss, {language}", chart(lines, LOG_FLOPS, canvas)))
    return _grid(drawn)


def training_charts(entries: Sequence[Entry]) -> str:
    """How the training itself went: rates, norms, the health of routers and experts."""
    wanted = (
        ("train", "learning_rate", "Learning rate", words.small),
        ("train", "tokens_per_second", "Tokens per second", words.count),
        ("train", "grad_norm", "Gradient norm", words.small),
        ("train", "load_balance_loss", "Load-balance loss", words.small),
        ("train", "router_z_loss", "Router z loss", words.small),
        ("train", "busiest_expert_load", "Busiest expert (times average)", words.small),
        ("train", "router_entropy", "Router entropy (nats)", words.small),
        ("train", "gate_confidence", "Weight of first choices", words.small),
        ("train", "dropped_fraction", "Choices dropped", words.small),
        ("validation", "expert_similarity", "Similarity of experts", words.small),
    )
    drawn = []
    for split, column, title, value in wanted:
        found = (line_of(entry, split, TOKENS, column, "plain") for entry in entries)
        lines = [line for line in found if line is not None]
        canvas = Canvas(*_SMALL, title, value, title.lower())
        drawn.append(_small(title, chart(lines, TOKENS, canvas)))
    return _grid(drawn)


def _small(title: str, picture: str) -> str:
    return f"<figure><figcaption>{esc(title)}</figcaption>{picture}</figure>" if picture else ""


def _grid(figures: Sequence[str]) -> str:
    drawn = [figure for figure in figures if figure]
    return f'<div class="grid">{"".join(drawn)}</div>' if drawn else ""


def environments(entries: Sequence[Entry]) -> str:
    """Versions and machine; runs that agree share one list."""
    groups: dict[str, list[str]] = {}
    for entry in entries:
        if entry.run is not None and entry.run.environment:
            groups.setdefault(json.dumps(dict(entry.run.environment)), []).append(entry.label)
    parts = []
    for text, labels in groups.items():
        items = "".join(
            f"<dt>{esc(key)}</dt><dd>{esc(_plain(value))}</dd>"
            for key, value in json.loads(text).items()
        )
        parts.append(f"<h3>{esc(', '.join(labels))}</h3><dl class='facts'>{items}</dl>")
    return "".join(parts)


def _plain(value: object) -> str:
    if isinstance(value, list):
        return ", ".join(map(_plain, value))
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
