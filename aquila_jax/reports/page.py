"""One HTML file that needs nothing else: no network, no fonts, no other files."""

import importlib.resources
from collections.abc import Sequence
from pathlib import Path

from aquila_jax.reports import growths, sections, story, verdicts
from aquila_jax.reports.lineup import lineup
from aquila_jax.reports.records import Run
from aquila_jax.reports.svg import esc
from aquila_jax.reports.verdicts import Comparison

FLOPS_NOTE = (
    "FLOPs are model FLOPs: 6 per active matrix parameter and token, plus causal attention; "
    "recomputation and padding experts are not counted."
)


def write_page(
    runs: Sequence[Run],
    path: str | Path,
    *,
    comparisons: Sequence[Comparison] = (),
    flops_note: str = FLOPS_NOTE,
) -> Path:
    """Writes the report as one self-contained HTML file.

    Args:
        runs: The runs of one report, in any order.
        path: The file to write.
        comparisons: Of successive models on tasks, where they were compared.
        flops_note: How the FLOPs were counted, in a sentence.

    Returns:
        The path.

    Raises:
        UserError: No run was given, or one was given twice.
    """
    Path(path).write_text(render(runs, comparisons, flops_note), encoding="utf-8")
    return Path(path)


def render(
    runs: Sequence[Run],
    comparisons: Sequence[Comparison] = (),
    flops_note: str = FLOPS_NOTE,
) -> str:
    """The page as text; see `write_page`."""
    entries = lineup(runs)
    title = story.title(entries)
    lead, *more = story.sentences(entries)
    told = "".join(f"<li>{esc(sentence)}</li>" for sentence in more)
    main = (
        f'<header><p class="kicker">Training report</p><h1>{esc(title)}</h1>'
        f'<p class="lead">{esc(lead)}</p>{sections.tiles(entries)}</header>'
        f"<section><h2>Loss against compute</h2>{sections.legend(entries)}"
        f'{sections.main_chart(entries)}<p class="note">{esc(sections.READING)}</p></section>'
        + _section("What happened", f'<ul class="story">{told}</ul>' if told else "")
        + _section("Stages", sections.stages(entries) + f'<p class="note">{esc(flops_note)}</p>')
        + _section("Tasks: gained and lost", verdicts.tables(comparisons))
        + _section("Languages", sections.language_charts(entries))
        + _section("Training", sections.training_charts(entries))
        + _section("What each growth did", growths.growths(entries))
        + _section("Versions and machine", sections.environments(entries))
    )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{esc(title)}</title><style>{_asset('page.css')}</style></head>"
        f'<body><main>{main}</main><div id="tip" role="status" hidden></div>'
        f"<script>{_asset('page.js')}</script></body></html>\n"
    )


def _section(title: str, body: str) -> str:
    return f"<section><h2>{esc(title)}</h2>{body}</section>" if body else ""


def _asset(name: str) -> str:
    return (
        importlib.resources.files("aquila_jax.reports").joinpath(name).read_text(encoding="utf-8")
    )
