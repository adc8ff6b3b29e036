"""What was planned of `gin_configs/pods`, as a file's first comment, a page, and a table.

All are made of `benchmarks/results/pod_configs.json` and nothing else, by `configs.py`; a test
makes them again and compares.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from aquila_jax.planning import Topology, parse_topology
from aquila_jax.training import TrainRun

ROOT = Path(__file__).parents[2]
FILES = tuple(sorted((ROOT / "gin_configs" / "pods").glob("*.gin")))
RESULTS = ROOT / "benchmarks" / "results" / "pod_configs.json"
PAGE = RESULTS.with_suffix(".md")
# Which has `summary`.
GUIDE = ROOT / "docs" / "pods.md"
# The stage that most scripts beside this one compile.
RUN = "gin_configs/runs/scale_out.gin"
# What the files require of a person and a plan does not read.
UNREAD = {"MODEL_DIR": "planned", "INIT_FROM": "parent"}

# arXiv 2408.06567: tokens a day on the clusters of the paper, measured, and the FLOP/s that these
# had at their peak: 480 chips of 989.5 TFLOPS for 7B, 1024 of 240 for the others.
_PAPER = {
    "7b": ("7B", 279e9, 480 * 989.5e12),
    "16b": ("16B", 70e9, 1024 * 240e12),
    "8x16b": ("8x16B", 25e9, 1024 * 240e12),
}
_TOPOLOGY = re.compile(r"aquila plan --gin_file=gin_configs/pods/(\S+) --topology=(\S+)")
_BLOCK = re.compile(r"^# Planned, .*\n(?:#   .*\n)*", flags=re.MULTILINE)
_GIB = 2**30
_DAY = 86400


def topology_of(path: Path) -> Topology:
    """Where a file is meant to run: what its command says.

    Raises:
        ValueError: its first lines have no command that plans it.
    """
    match = _TOPOLOGY.search(path.read_text())
    if match is None or match[1] != path.name:
        raise ValueError(f"{path}: no line 'aquila plan --gin_file=... --topology=...' of its own")
    return parse_topology(match[2])


def settings_of(run: TrainRun) -> dict[str, Any]:
    """What a plan depends on and a file sets."""
    mesh = run.mesh
    return {
        "mesh": {"data": mesh.data, "fsdp": mesh.fsdp, "expert": mesh.expert, "model": mesh.model},
        "batch_size": run.data.batch_size,
        "sequence_length": run.data.sequence_length,
        "micro_batches": run.micro_batches,
        "remat": run.remat,
        "dtype": run.dtype,
        "buffer_factor": run.dispatch.buffer_factor,
        "steps": run.steps,
    }


def block(planned: Mapping[str, Any]) -> str:
    """The lines of a header that tell a plan's numbers."""
    each = "chip" if parse_topology(planned["topology"]).chip.devices == 1 else "core"
    others = ", ".join(
        f"{name} {seconds:.3g} s"
        for name, seconds in planned["seconds"].items()
        if name != planned["binding"] and seconds
    )
    return (
        "# Planned, not run, by benchmarks/pods/configs.py. Times are bounds; no run is faster:\n"
        f"#   HBM         {planned['memory'] / _GIB:.1f} of {planned['capacity'] / _GIB:.1f} GiB a "
        f"{each}\n"
        f"#   step        {max(planned['seconds'].values()):.3g} s at least, bound by "
        f"{planned['binding']} ({others})\n"
        f"#   MFU         {planned['mfu']:.1%} at most\n"
        f"#   tokens/day  {planned['tokens_per_day'] / 1e9:.1f} billion at most: "
        f"{planned['run_tokens'] / planned['tokens_per_day']:.1f} days for the stage's "
        f"{planned['run_tokens'] / 1e9:,.0f}\n"
    )


def with_block(text: str, planned: Mapping[str, Any]) -> str:
    """A file's text with the block of `planned` in the place of the one that it has.

    Raises:
        ValueError: it has none, or several.
    """
    replaced, count = _BLOCK.subn(lambda _: block(planned), text)
    if count != 1:
        raise ValueError(f"{count} blocks of '# Planned, ...' in a header that must have one")
    return replaced


def page(results: Mapping[str, Any]) -> str:
    """The whole of it, of what the JSON file holds."""
    versions, found = results["versions"], results["configs"]
    return "\n".join(
        [
            "# The three stages on pods, compiled\n",
            f"Python {versions['python']}, jax {versions['jax']}; no TPU. By "
            "`benchmarks/pods/configs.py`: files of `gin_configs/pods` compiled by the TPU's "
            "own compiler. Float32 parameters and moments, bfloat16 compute, rows of 4096 tokens, "
            "nothing dropped. HBM is of one device (a chip; of tpu7x half a chip). Step, MFU and "
            "tokens are a roofline's bounds (docs/planning.md says how they are made): nothing "
            "here was run.\n",
            *_table(
                (
                    *("file", "mesh", "rows x parts", "remat", "HBM, GiB", "sent, GB"),
                    *("step >=, s", "bound by", "MFU <=", "B tokens/day <=", "compile, CPU s"),
                ),
                map(_row, found.items()),
            ),
            "\nRows x parts: rows of 4096 tokens that a device takes at once, and how many such "
            "parts (micro-batches) its share of a batch has.\n",
            "## Beside the paper's rates\n",
            "The paper measured 279 billion tokens a day for 7B on 480 chips of 989.5 TFLOPS, and "
            "70 and 25 for 16B and 8x16B on 1024 chips of 240 TFLOPS. Those are runs; ours are "
            "bounds, for other chips and fewer of them, so the two columns of tokens do not "
            "compare. What does: the MFU that a slice must reach, in a run, to train as fast as "
            "the paper's cluster did. Above the bound it cannot; above 100% the slice is too small "
            "for any program. Attention counts in every MFU here, by `aquila_jax.accounting`.\n",
            *_table(
                (
                    *("", "peak FLOP/s, of the paper's cluster", "paper, B tokens/day, measured"),
                    *("ours, B tokens/day, bound", "paper's MFU", "MFU for the paper's rate"),
                    "MFU <=",
                ),
                map(_beside_paper, found.items()),
            ),
            "",
        ]
    )


def summary(results: Mapping[str, Any]) -> str:
    """The table of the guide."""
    head = "file", "HBM, GiB", "step >=, s", "bound by", "MFU <=", "B tokens/day <="
    cells = (list(_row(item)) for item in results["configs"].items())
    rows = ([row[0], row[4], *row[6:10]] for row in cells)
    return "\n".join(_table(head, rows)) + "\n"


def with_summary(text: str, results: Mapping[str, Any]) -> str:
    """A page's text with `summary` in the place of the one that it has.

    Raises:
        ValueError: it has none, or several.
    """
    made = summary(results)
    head = re.escape(made.partition("\n")[0])
    replaced, count = re.subn(rf"^{head}\n(?:\|.*\n)*", lambda _: made, text, flags=re.MULTILINE)
    if count != 1:
        raise ValueError(f"{count} tables of pods in a page that must have one")
    return replaced


def _row(item: tuple[str, Mapping[str, Any]]) -> Iterator[str]:
    name, planned = item
    settings, topology = planned["settings"], parse_topology(planned["topology"])
    mesh = {axis: size for axis, size in settings["mesh"].items() if size > 1}
    parts = settings["micro_batches"]
    shards = topology.num_devices // settings["mesh"]["model"]
    yield f"`{name}`"
    yield " x ".join(f"{axis} {size}" for axis, size in mesh.items())
    yield f"{settings['batch_size'] // shards // parts} x {parts}"
    yield settings["remat"]
    yield f"{planned['memory'] / _GIB:.1f} of {planned['capacity'] / _GIB:.1f}"
    yield f"{planned['ici_bytes'] / 1e9:,.0f}"
    yield f"{max(planned['seconds'].values()):.2f}"
    yield planned["binding"]
    yield f"{planned['mfu']:.1%}"
    yield f"{planned['tokens_per_day'] / 1e9:.1f}"
    yield f"{planned['compile_cpu_seconds']:.0f}"


def _beside_paper(item: tuple[str, Mapping[str, Any]]) -> Iterator[str]:
    name, planned = item
    stage, rate, cluster = _PAPER[name.partition("_")[0]]
    topology = parse_topology(planned["topology"])
    peak = topology.chip.flops * topology.num_chips
    flops = rate / _DAY * planned["model_flops"] / planned["tokens"]
    yield f"{stage} on {topology.name}"
    yield f"{peak / cluster:.2f}"
    yield f"{rate / 1e9:.0f}"
    yield f"{planned['tokens_per_day'] / 1e9:.1f}"
    yield f"{flops / cluster:.1%}"
    yield f"{flops / peak:.1%}"
    yield f"{planned['mfu']:.1%}"


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> Iterator[str]:
    head = list(head)
    yield f"| {' | '.join(head)} |"
    yield "|" + "---|" * len(head)
    for row in rows:
        yield f"| {' | '.join(row)} |"
