"""How long growth from disk to disk takes, and in how much memory.

    python benchmarks/growth_disk.py [--mergekit PATH_OF_mergekit-moe] [--repeat 3] [--dir DIR]

Two measurements, each process by itself, peak resident memory as the operating system counts it
(pages of mapped files included):

- scale-out of a Llama-shaped bfloat16 directory of 250M random parameters to 8 experts, beside
  `mergekit-moe` on the same files (random gates, if --mergekit names it) and `cp` of the result;
- scale-up of 1.0B to 2.3B parameters (isometric, wider and deeper), beside `cp` of the result.

Ratios are of runs that follow each other, so that a noisy machine is noisy for both; the first
run of each is not counted. Ours flushes what it wrote to the disk before it gives it its name;
mergekit and cp leave that to the operating system, so they are reported a second time with a
`sync` of their files. Needs 14 GB of free disk in --dir. Writes growth_disk.md to --out.
"""

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from interop.directories import SMALL, machine, make, spread

from aquila_jax import ModelConfig
from aquila_jax.accounting import num_parameters
from aquila_jax.files import write_json, write_text

BILLION = ModelConfig(
    vocab_size=32000,
    embed_dim=2048,
    num_layers=20,
    num_heads=16,
    num_kv_heads=4,
    head_dim=128,
    mlp_dim=5632,
    qkv_bias=False,
)
LARGER = {"embed_dim": 2560, "num_layers": 30, "num_heads": 20, "mlp_dim": 7168}


OURS = "aquila grow"


class Run(NamedTuple):
    """One process.

    Attributes:
        seconds: wall time.
        peak: bytes resident at most.
    """

    seconds: float
    peak: float


def main(argv: Sequence[str] | None = None) -> int:
    """Measure both, print and keep the result."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--mergekit", type=Path, help="the executable mergekit-moe")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--dir", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(dir=options.dir, prefix="growth_disk") as work:
        lines = [*_scale_out(options, Path(work)), *_scale_up(options, Path(work))]
    text = (
        "# Growth from disk to disk\n\n"
        f"Made by `benchmarks/growth_disk.py` on {machine()}; "
        f"median of {options.repeat} runs and half their range; GB/s of bytes written. "
        "Ours flushes to the disk before it ends; the others do so only where it is said. Other "
        "programs may run on the machine: ratios are of runs that follow each other.\n\n"
        + "\n".join(lines)
        + "\n"
    )
    options.out.mkdir(parents=True, exist_ok=True)
    write_text(options.out / "growth_disk.md", text)
    print(text)
    return 0


def _scale_out(options: argparse.Namespace, work: Path) -> list[str]:
    source = work / "dense"
    _make(source, SMALL)
    config = work / "mergekit.yaml"
    experts = "".join(f"  - source_model: {source}\n    positive_prompts: ['']\n" for _ in range(8))
    write_text(
        config,
        f"base_model: {source}\ngate_mode: random\ndtype: bfloat16\nexperts:\n{experts}",
    )
    commands = {
        OURS: _grow(
            source,
            work / "out",
            "sparse_upcycling",
            {"num_experts": 8, "experts_per_token": 2},
        )
    }
    if options.mergekit is not None:
        flag = "--i-understand-this-is-not-useful-without-training"
        commands["mergekit-moe"] = [str(options.mergekit), str(config), str(work / "out"), flag]
    title = f"Scale-out of {num_parameters(SMALL) / 1e6:.0f}M parameters to 8 experts, bfloat16"
    return _compare(options, work, title, commands)


def _scale_up(options: argparse.Namespace, work: Path) -> list[str]:
    shutil.rmtree(work / "dense")
    source = work / "billion"
    _make(source, BILLION)
    target = ModelConfig.from_dict({**BILLION.to_dict(), **LARGER})
    title = (
        f"Scale-up of {num_parameters(BILLION) / 1e9:.2f}B parameters to "
        f"{num_parameters(target) / 1e9:.2f}B, isometric, bfloat16"
    )
    commands = {OURS: _grow(source, work / "out", "isometric", LARGER)}
    return _compare(options, work, title, commands)


def _grow(source: Path, target: Path, growth: str, changes: dict[str, int]) -> list[str]:
    fields = [f"--gin.target.{name}={value}" for name, value in changes.items()]
    files = ["--from", str(source), "--to", str(target)]
    gin = f"--gin_file=gin_configs/growth/{growth}.gin"
    return [sys.executable, "-m", "aquila_jax.cli", "grow", *files, gin, *fields]


def _compare(
    options: argparse.Namespace, work: Path, title: str, commands: dict[str, list[str]]
) -> list[str]:
    """Rows of a table: every command `repeat` times in turn, ours followed by a copy."""
    rounds, size = [], 0
    for _ in range(options.repeat + 1):
        one: dict[str, Run] = {}
        for name, command in commands.items():
            one[name] = _measure(command)
            if name == OURS:
                copy = ["cp", "-r", str(work / "out"), str(work / "copy")]
                one["cp of the result"] = _measure(copy)
                one["cp, flushed"] = _flushed(one["cp of the result"], work / "copy")
                size = sum(file.stat().st_size for file in (work / "out").iterdir())
                shutil.rmtree(work / "copy")
            else:
                one[f"{name}, flushed"] = _flushed(one[name], work / "out")
            shutil.rmtree(work / "out")
        rounds.append(one)
    return _table(title, size, rounds[1:])


def _table(title: str, size: int, rounds: Sequence[dict[str, Run]]) -> list[str]:
    """Every program's medians over the rounds, and those of its ratios to ours."""
    lines = [f"## {title}", "", f"{size / 1e9:.2f} GB written.", ""]
    lines += ["| | seconds | GB/s | peak GB | time, ours to this | memory, ours to this |"]
    lines += ["|---|---|---|---|---|---|"]
    for name in rounds[0]:
        seconds = [one[name].seconds for one in rounds]
        ratios = [one[OURS].seconds / one[name].seconds for one in rounds]
        memory = [one[OURS].peak / one[name].peak for one in rounds]
        lines.append(
            f"| {name} | {spread(seconds)} | {size / 1e9 / statistics.median(seconds):.2f} | "
            f"{spread([one[name].peak / 1e9 for one in rounds])} | {spread(ratios)} | "
            f"{spread(memory)} |"
        )
    return [*lines, ""]


def _flushed(run: Run, written: Path) -> Run:
    """The run with the time that its files then take to reach the disk."""
    sync = _measure(["sync", "-d", *map(str, written.iterdir())])
    return Run(run.seconds + sync.seconds, run.peak)


def _measure(command: Sequence[str]) -> Run:
    """Run a command to its end; its output is shown only where it fails."""
    began, peak = time.monotonic(), 0
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env=environment)
        # Not the child's rusage: that begins with the memory of the process it was forked from.
        while process.poll() is None:
            peak = max(peak, _peak_so_far(process.pid))
            time.sleep(0.02)
        seconds = time.monotonic() - began
        if process.returncode:
            output.seek(0)
            raise RuntimeError(f"{command[0]} failed: {output.read().decode()[-2000:]}")
    return Run(seconds, peak)


def _peak_so_far(pid: int) -> int:
    """Bytes that a running process of Linux has had resident at most; 0 once it is gone."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    lines = [line for line in status.splitlines() if line.startswith("VmHWM")]
    return 1024 * int(lines[0].split()[1]) if lines else 0


def _make(path: Path, config: ModelConfig) -> None:
    """A directory of random weights."""
    make(path, config, "bfloat16", deviation=0.02)
    # mergekit wants one, of whatever kind.
    words = {"type": "WordLevel", "vocab": {"a": 0, "<unk>": 1}, "unk_token": "<unk>"}
    write_json(path / "tokenizer.json", {"version": "1.0", "added_tokens": [], "model": words})
    write_json(path / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"})


if __name__ == "__main__":
    sys.exit(main())
