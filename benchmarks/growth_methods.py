"""Which growth is worth its FLOPs: every method from the same source, trained on alike.

    make bench-growth        # or: python benchmarks/growth_methods.py [--steps 120] [--seeds 3] ...

Trains one small source a seed, grows it by every method to one target, and trains each child for
the same number of steps, which is the same FLOPs as the target is the same. The learning rate is
tuned for every method by itself on the first seed; the other seeds use the winner. "scratch" is
the target from a fresh initialisation. Interrupted, the same command goes on: finished runs are
kept in --runs and not made again.

Writes a CSV of every run, the summary as Markdown and the figure to --out. Two CPU cores take
about an hour; a larger study is the same script with other --source, --target and --steps.
"""

import argparse
import csv
import dataclasses
import itertools
import json
import logging
import platform
import statistics
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from aquila_jax import preset
from aquila_jax.data import TextData
from aquila_jax.errors import UserError
from aquila_jax.files import write_text
from aquila_jax.growth import ScaleUp
from aquila_jax.training import AdamW, Cosine, Interrupted, TrainRun, train

# What is compared, by the name it has in the table.
METHODS: dict[str, ScaleUp | None] = {
    "scratch": None,
    "fpi": ScaleUp("fpi"),
    "aki": ScaleUp("aki"),
    "aki_pro": ScaleUp("aki_pro"),
    "isometric": ScaleUp("isometric"),
    "isometric_uneven": ScaleUp("isometric", split="uneven"),
    "zero_pad": ScaleUp("zero_pad"),
    "latent": ScaleUp("latent"),
}
# Shares of the budget at which the loss is reported.
SHARES = (0.1, 0.3, 1.0)


class Result(NamedTuple):
    """One trained child.

    Attributes:
        method: its name in `METHODS`.
        seed: of source, data and growth.
        rate: peak learning rate.
        source_loss: where the source ended.
        losses: validation loss by step, step 0 first.
        flops_per_step: model FLOPs of a step.
    """

    method: str
    seed: int
    rate: float
    source_loss: float
    losses: dict[int, float]
    flops_per_step: float

    @property
    def final(self) -> float:
        """Loss after the whole budget."""
        return self.losses[max(self.losses)]

    def at(self, share: float) -> float:
        """Loss at the validation nearest to a share of the budget."""
        steps = max(self.losses)
        return self.losses[min(self.losses, key=lambda step: abs(step - share * steps))]

    def flops_to(self, loss: float) -> float | None:
        """FLOPs until validation first stood at or below `loss`, between validations by a line."""
        points = sorted(self.losses.items())
        if points[0][1] <= loss:
            return 0.0
        for (step, above), (next_step, below) in itertools.pairwise(points):
            if below <= loss:
                share = (above - loss) / (above - below)
                return (step + share * (next_step - step)) * self.flops_per_step
        return None


def main(argv: Sequence[str] | None = None) -> int:
    """Run what is missing, then write the tables and the figure."""
    options = _options(argv)
    logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax tells of every file it writes
    try:
        results = list(_all_runs(options))
    except Interrupted as stop:
        print(stop, file=sys.stderr)
        return 128 + stop.signum
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    options.out.mkdir(parents=True, exist_ok=True)
    _write_csv(options.out / "growth_methods.csv", results)
    chosen = _tuned(results)
    summary = _summary(options, chosen)
    write_text(options.out / "growth_methods.md", summary)
    _draw(options.out / "growth_methods.png", chosen)
    print(summary)
    return 0


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--source", default="toy_dense", help="preset of the source")
    parser.add_argument("--target", default="toy_large", help="preset of the target")
    parser.add_argument("--source_steps", type=int, default=500)
    parser.add_argument("--steps", type=int, default=120, help="of every child")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--source_rate", type=float, default=6e-3)
    parser.add_argument(
        "--rates",
        type=float,
        nargs="+",
        default=[2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3, 8e-3],
    )
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--sequence_length", type=int, default=128)
    parser.add_argument("--runs", type=Path, default=Path("runs/growth_methods"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    return parser.parse_args(argv)


def _all_runs(options: argparse.Namespace) -> Iterator[Result]:
    """Every run, the rates of the first seed before the other seeds."""
    best: dict[str, float] = {}
    for method in options.methods:
        tried = [_child(options, method, 0, rate) for rate in options.rates]
        best[method] = min(tried, key=lambda result: result.final).rate
        yield from tried
    for seed in range(1, options.seeds):
        for method in options.methods:
            yield _child(options, method, seed, best[method])


def _run(options: argparse.Namespace, name: str, seed: int, **settings: Any) -> TrainRun:
    data = TextData(
        tokenizer_path=str(options.runs / "tokenizer.model"),
        vocab_size=settings["model"].vocab_size,
        sequence_length=options.sequence_length,
        batch_size=options.batch_size,
        seed=seed + (100 if "init_from" in settings else 0),
    )
    return TrainRun(
        model_dir=str(options.runs / name),
        name=name,
        data=data,
        dtype="float32",
        seed=seed,
        eval_batches=4,
        keep_checkpoints=1,
        checkpoint_every=10**6,
        **settings,
    )


def _source(options: argparse.Namespace, seed: int) -> tuple[TrainRun, float]:
    """The source of a seed, trained, and its loss."""
    run = _run(
        options,
        f"source_{seed}",
        seed,
        model=preset(options.source),
        steps=options.source_steps,
        optimizer=AdamW(Cosine(options.source_rate, warmup_steps=options.source_steps // 20)),
        eval_every=options.source_steps,
    )
    end = train(run).current.validation_end
    assert end is not None
    return run, end["mean"]


def _child(options: argparse.Namespace, method: str, seed: int, rate: float) -> Result:
    source, source_loss = _source(options, seed)
    growth = METHODS[method]
    origin = {} if growth is None else {"init_from": source.model_dir}
    if isinstance(growth, ScaleUp):
        growth = dataclasses.replace(growth, seed=seed)
    run = _run(
        options,
        f"{method}_{seed}_{rate:g}",
        seed,
        model=preset(options.target),
        steps=options.steps,
        optimizer=AdamW(Cosine(rate, warmup_steps=max(options.steps // 15, 1))),
        eval_every=max(options.steps // 10, 1),
        growth=growth,
        **origin,
    )
    train(run)
    rows = map(json.loads, (run.path / "metrics.jsonl").read_text().splitlines())
    losses = {row["step"]: row["loss"] for row in rows if row["split"] == "validation"}
    return Result(method, seed, rate, source_loss, losses, run.flops_per_step)


def _tuned(results: Sequence[Result]) -> dict[str, list[Result]]:
    """For every method the runs with its best rate, one a seed."""
    chosen: dict[str, list[Result]] = {}
    for method in dict.fromkeys(result.method for result in results):
        mine = [result for result in results if result.method == method]
        first = [result for result in mine if result.seed == 0]
        rate = min(first, key=lambda result: result.final).rate
        chosen[method] = [result for result in mine if result.rate == rate]
    return chosen


def _write_csv(path: Path, results: Sequence[Result]) -> None:
    lines = [["method", "seed", "peak_rate", "source_loss", "step", "flops", "loss"]]
    for result in results:
        for step, loss in sorted(result.losses.items()):
            lines.append(
                [
                    result.method,
                    str(result.seed),
                    f"{result.rate:g}",
                    f"{result.source_loss:.4f}",
                    str(step),
                    f"{step * result.flops_per_step:.4g}",
                    f"{loss:.4f}",
                ]
            )
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows(lines)


def _summary(options: argparse.Namespace, chosen: dict[str, list[Result]]) -> str:
    import jax

    any_result = next(iter(chosen.values()))[0]
    budget = options.steps * any_result.flops_per_step
    sources = [r.source_loss for r in next(iter(chosen.values()))]
    scratch = {result.seed: result.final for result in chosen.get("scratch", [])}
    header = ["method", "rate", "start", *(f"{share:.0%}" for share in SHARES)]
    header += ["FLOPs to the source's loss", "FLOPs to scratch's end"]
    rows = []
    for method, results in chosen.items():
        rows.append(
            [
                method,
                f"{results[0].rate:g}",
                _spread([result.losses[0] for result in results]),
                *(_spread([result.at(share) for result in results]) for share in SHARES),
                _flops([result.flops_to(result.source_loss) for result in results], budget),
                _flops([r.flops_to(scratch.get(r.seed, -1.0)) for r in results], budget),
            ]
        )
    table = "\n".join("| " + " | ".join(row) + " |" for row in [header, ["---"] * 8, *rows])
    return (
        f"# Growth methods at equal FLOPs\n\n"
        f"Made by `benchmarks/growth_methods.py` on {platform.system()} {platform.machine()}, "
        f"Python {platform.python_version()}, jax {jax.__version__}, {jax.devices()[0].platform}.\n"
        f"Source {options.source}, {options.source_steps} steps, validation loss "
        f"{_spread(sources)}; target {options.target}, {options.steps} steps of "
        f"{options.batch_size} x {options.sequence_length} tokens, {budget:.3g} FLOPs; rates "
        f"{', '.join(f'{rate:g}' for rate in options.rates)} tried on the first of "
        f"{options.seeds} seeds.\nNats per token, mean of English and Chinese; mean over seeds and "
        "half the range. FLOPs are shares of the child's budget; - where a seed never got there."
        f"\n\n{table}\n"
    )


def _spread(values: Sequence[float]) -> str:
    return f"{statistics.mean(values):.3f} ± {(max(values) - min(values)) / 2:.3f}"


def _flops(values: Sequence[float | None], budget: float) -> str:
    known = [value / budget for value in values if value is not None]
    return f"{statistics.mean(known):.0%}" if len(known) == len(values) else "-"


def _draw(path: Path, chosen: dict[str, list[Result]]) -> None:
    """Loss against FLOPs, the mean over seeds and their range."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 5.5), layout="constrained")
    colours = plt.get_cmap("tab10")
    for number, (method, results) in enumerate(chosen.items()):
        steps = sorted(results[0].losses)
        flops = [step * results[0].flops_per_step for step in steps]
        losses = [[result.losses[step] for result in results] for step in steps]
        style = "--" if method == "scratch" else "-"
        mean = [statistics.mean(values) for values in losses]
        axes.plot(flops, mean, style, color=colours(number), label=method, marker="o", ms=3)
        low, high = [min(values) for values in losses], [max(values) for values in losses]
        axes.fill_between(flops, low, high, color=colours(number), alpha=0.12, lw=0)
    source = statistics.mean(result.source_loss for result in next(iter(chosen.values())))
    axes.axhline(source, color="0.4", lw=1, ls=":")
    axes.annotate("the source's end", (0, source), xytext=(4, -12), textcoords="offset points")
    # From scratch starts far above what the others differ by.
    grown = [r.losses[0] for name, results in chosen.items() if name != "scratch" for r in results]
    lowest = min(result.final for results in chosen.values() for result in results)
    top = max(grown, default=source)
    axes.set_ylim(lowest - 0.05, top + 0.3 * (top - lowest) + 0.1)
    if "scratch" in chosen:
        end = statistics.mean(result.final for result in chosen["scratch"])
        axes.set_title(f"from scratch, above this picture, ends at {end:.3f}", fontsize=10)
    axes.set_xlabel("training FLOPs after growth")
    axes.set_ylabel("validation loss, nats per token")
    axes.legend(frameon=False)
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    sys.exit(main())
