"""How fast checkpoints are read and written, beside safetensors' own functions on the same files.

    python benchmarks/interop/load_save.py [--repeat 5] [--dtypes bfloat16 float32] [--dir DIR]

A Llama-shaped model of 260M random parameters, in one file and in several. Reading ends with JAX
arrays on the CPU: ours stacked by layer and inputs first, safetensors' as they lie in the file.
Writing begins with such arrays; ours flushes to the disk before it ends, so safetensors' is
measured with a flush as well. Every measurement is a process of its own, timed after imports, with
the file in the page cache; programs take turns, and ratios are of runs that follow each other.
Peak memory is what the process had resident at most, mapped files included, above what it had
before; of that the model itself is taken off where it stays in memory, and the rest is given in
multiples of the largest tensor. Needs 5 GB of free disk in --dir. Writes load_save.md to --out.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from directories import SMALL, machine, make, spread

from aquila_jax import load_hf, save_hf
from aquila_jax.accounting import num_parameters
from aquila_jax.files import write_text
from aquila_jax.interop.converting import convert_files

LARGEST = SMALL.vocab_size * SMALL.embed_dim
SHARD_BYTES = 200 * 10**6
# What is measured, and whether the model stays in memory.
PROGRAMS = {
    "load_hf": True,
    "load_hf, shards": True,
    "safetensors load_file": True,
    "save_hf": False,
    "safetensors save_file": False,
    "safetensors save_file, flushed": False,
    "convert_files": False,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print and keep the result; or, in a child, do one thing and say how it went."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16"])
    parser.add_argument("--dir", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--child", nargs=2, metavar=("PROGRAM", "DIR"), help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.child is not None:
        print(json.dumps(_child(options.child[0], Path(options.child[1]))))
        return 0
    lines = [line for dtype in options.dtypes for line in _measure(options, dtype)]
    text = (
        "# Reading and writing checkpoints\n\n"
        f"Made by `benchmarks/interop/load_save.py` on {machine()}; "
        f"{num_parameters(SMALL) / 1e6:.0f}M parameters; medians of {options.repeat} runs and "
        "half their range. Files are in the page cache; other programs may run on the machine, so "
        "ratios are of runs that follow each other. Memory is above what the process had before, "
        "less the model where it stays, in multiples of the largest tensor.\n\n"
        + "\n".join(lines)
        + "\n"
    )
    options.out.mkdir(parents=True, exist_ok=True)
    write_text(options.out / "load_save.md", text)
    print(text)
    return 0


def _measure(options: argparse.Namespace, dtype: str) -> list[str]:
    size = num_parameters(SMALL) * np.dtype(jax.numpy.dtype(dtype)).itemsize
    rounds: list[dict[str, dict[str, float]]] = []
    with tempfile.TemporaryDirectory(dir=options.dir, prefix="load_save") as place:
        work = Path(place)
        make(work / "one", SMALL, dtype)
        make(work / "shards", SMALL, dtype, max_shard_bytes=SHARD_BYTES)
        for _ in range(options.repeat + 1):  # the first is not counted
            rounds.append({name: _run(name, work) for name in PROGRAMS})
    lines = [f"## {dtype}, {size / 1e9:.2f} GB", ""]
    lines += ["| | GB/s | time, to safetensors' own | peak, largest tensors |", "|---|---|---|---|"]
    for name, stays in PROGRAMS.items():
        runs = [one[name] for one in rounds[1:]]
        peer = "safetensors load_file" if stays else "safetensors save_file, flushed"
        ratios = [one[name]["seconds"] / one[peer]["seconds"] for one in rounds[1:]]
        tensor = size / num_parameters(SMALL) * LARGEST
        peaks = [(run["peak"] - stays * size) / tensor for run in runs]
        speeds = [size / 1e9 / run["seconds"] for run in runs]
        lines.append(f"| {name} | {spread(speeds)} | {spread(ratios)} | {spread(peaks)} |")
    return [*lines, ""]


def _run(name: str, work: Path) -> dict[str, float]:
    command = [sys.executable, __file__, "--child", name, str(work)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{name} failed: {done.stderr[-2000:]}")
    shutil.rmtree(work / "out", ignore_errors=True)
    return json.loads(done.stdout.splitlines()[-1])


def _child(name: str, work: Path) -> dict[str, float]:
    """One program in this process: seconds, and bytes resident at most above those before."""
    program = _program(name, work)
    before = _resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    began = time.monotonic()
    result = jax.block_until_ready(program())
    seconds = time.monotonic() - began
    del result
    return {"seconds": seconds, "peak": _resident("VmHWM") - before}


def _program(name: str, work: Path) -> Callable[[], Any]:
    """What is to be timed, with what it needs in memory already."""
    from safetensors import flax

    jax.block_until_ready(jax.numpy.zeros(1))
    single, out = work / "one" / "model.safetensors", work / "out"
    if name == "load_hf":
        return lambda: load_hf(work / "one")[0]
    if name == "load_hf, shards":
        return lambda: load_hf(work / "shards")[0]
    if name == "safetensors load_file":
        return lambda: flax.load_file(single)
    if name == "convert_files":
        return lambda: convert_files(work / "one", out) and None
    if name == "save_hf":
        params, config = load_hf(work / "one")
        dtype = params["final_norm"]["scale"].dtype
        return lambda: save_hf(params, config, out, dtype=dtype)
    tensors = flax.load_file(single)
    out.mkdir()

    def save() -> None:
        flax.save_file(tensors, out / "model.safetensors")
        if name.endswith("flushed"):
            with (out / "model.safetensors").open("rb") as file:
                os.fsync(file.fileno())

    return save


def _resident(word: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(word))


if __name__ == "__main__":
    sys.exit(main())
