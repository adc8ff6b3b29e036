"""Training tokens a second on a CPU: ours, MaxText's and transformers', in turns.

    python benchmarks/pods/cpu_training.py --maxtext PYTHON --torch .venv-parity/bin/python

One small dense model and one small mixture, float32, the same shapes and batch for all, AdamW with
clipping, full attention over whole rows, no recomputation. Each library keeps its step ready in a
process of its own (`training_peers.py`) and waits while another computes. Reported are medians over
rounds, and medians of the ratios of ours to another's turn in the same round. MaxText's Python is a
3.12 with `maxtext[tpu]==0.2.5`. Writes benchmarks/results/cpu_training.md.
"""

import argparse
import json
import math
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

from aquila_jax.files import write_text

HERE = Path(__file__).parent
THREADS = 2
DENSE = {
    "vocab": 8192,
    "embed": 512,
    "mlp": 1536,
    "layers": 4,
    "heads": 8,
    "kv_heads": 4,
    "head_dim": 64,
    "rows": 4,
    "tokens": 512,
    "experts": 0,
    "chosen": 0,
}
SHAPES = {"dense": DENSE, "mixture": {**DENSE, "mlp": 768, "experts": 8, "chosen": 2}}
VERSIONS = (
    "import importlib.metadata as m, sys; print(*(f'{n} {m.version(n)}' for n in sys.argv[1:]))"
)


class Turn(NamedTuple):
    """What a library did in a round."""

    seconds: float
    loss: float


class Party:
    """A library in a process of its own."""

    def __init__(self, child: "subprocess.Popen[str]") -> None:
        assert child.stdin
        assert child.stdout
        self._send, self._receive = child.stdin, child.stdout
        self.num_parameters = int(self._receive.readline())

    def turn(self, steps: int) -> Turn:
        """So many steps."""
        print(steps, file=self._send, flush=True)
        return Turn(**json.loads(self._receive.readline()))


@contextmanager
def party(python: str, name: str, shape: Mapping[str, int]) -> Iterator[Party]:
    """`name`, built and waiting."""
    command = [python, str(HERE / "training_peers.py"), name, json.dumps(shape)]
    # BLAS reads its number of threads from here.
    environment = os.environ | {"OMP_NUM_THREADS": str(THREADS), "JAX_PLATFORMS": "cpu"}
    if name == "maxtext":
        # This repository is not to be found from there.
        environment.pop("PYTHONPATH", None)
    with subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=environment,
    ) as child:
        try:
            yield Party(child)
        finally:
            child.terminate()


def measure(
    pythons: Mapping[str, str], shape: Mapping[str, int], rounds: int, steps: int
) -> dict[str, list[Turn]]:
    """Turns of every library by round; the first, which compiles, is left out.

    Raises:
        AssertionError: the libraries do not have as many parameters, or no model of theirs begins
            at the loss of a guess: they would not train the same.
    """
    with ExitStack() as stack:
        parties = {
            name: stack.enter_context(party(python, name, shape))
            for name, python in pythons.items()
        }
        sizes = {name: each.num_parameters for name, each in parties.items()}
        assert len(set(sizes.values())) == 1, sizes
        first = {name: each.turn(1) for name, each in parties.items()}
        guess = math.log(shape["vocab"])
        assert all(abs(turn.loss - guess) < 1 for turn in first.values()), first
        turns: dict[str, list[Turn]] = {name: [] for name in parties}
        for number in range(rounds):
            for name, each in parties.items():
                turns[name].append(each.turn(steps))
                print(f"round {number}, {name}: {turns[name][-1]}", flush=True)
    return turns


def rows(what: str, turns: Mapping[str, list[Turn]], tokens: int) -> list[str]:
    """Of the table: a row of each library."""
    ours = [turn.seconds for turn in turns["aquila_jax"]]
    lines = []
    for name, theirs in turns.items():
        speeds = [tokens / turn.seconds for turn in theirs]
        ratios = [turn.seconds / own for own, turn in zip(ours, theirs, strict=True)]
        lines.append(f"| {what} | {name} | {spread(speeds, '.0f')} | {spread(ratios, '.2f')} |")
    return lines


def spread(values: list[float], form: str) -> str:
    """Median, least and most."""
    middle, least, most = statistics.median(values), min(values), max(values)
    return f"{middle:{form}} ({least:{form}} to {most:{form}})"


def versions(python: str, *names: str) -> str:
    """Of packages in that environment."""
    command = [python, "-c", VERSIONS, *names]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def main() -> None:
    """Measure and write."""
    flags = argparse.ArgumentParser(description=__doc__)
    flags.add_argument("--maxtext", required=True, help="Python of an environment with MaxText")
    flags.add_argument("--torch", required=True, help="Python of an environment with transformers")
    flags.add_argument("--rounds", type=int, default=5)
    flags.add_argument("--steps", type=int, default=2, help="of a turn")
    flags.add_argument("--out", type=Path, default=HERE.parent / "results")
    given = flags.parse_args()
    found = []
    for what, shape in SHAPES.items():
        pythons = {"aquila_jax": sys.executable, "maxtext": given.maxtext}
        kinds = ("eager", "grouped_mm") if shape["experts"] else ("eager",)
        pythons |= {f"transformers, {kind}": given.torch for kind in kinds}
        turns = measure(pythons, shape, given.rounds, given.steps)
        found += rows(what, turns, shape["rows"] * shape["tokens"] * given.steps)
    page = report(found, given)
    write_text(given.out / "cpu_training.md", page)
    print(page)


def report(found: list[str], given: argparse.Namespace) -> str:
    """The page."""
    mixture = SHAPES["mixture"]
    return f"""# Training on a CPU, side by side

`benchmarks/pods/cpu_training.py`: {given.rounds} rounds of {given.steps} steps each in turns,
{os.cpu_count()} cores ({platform.machine()}), {THREADS} threads, load at the end
{os.getloadavg()[0]:.1f}. Ours: {versions(sys.executable, "jax", "flax")};
{versions(given.maxtext, "maxtext", "jax")}; {versions(given.torch, "torch", "transformers")}.
float32, AdamW with clipping, no recomputation. Dense: {describe(DENSE)}.
Mixture: the same with {mixture["experts"]} experts of {mixture["mlp"]} units, of which a token
visits {mixture["chosen"]}; nobody drops a token. For transformers `eager` and `grouped_mm` are how
experts are computed. All have as many parameters and begin at the loss of a guess.
Ours keeps what a step frees, as `aquila train` does; of the others nothing was set.

| | | tokens/s, median (least to most) | ours over it |
|---|---|---|---|
{chr(10).join(found)}
"""


def describe(shape: Mapping[str, int]) -> str:
    """In words."""
    return (
        f"{shape['layers']} layers, {shape['embed']} channels, {shape['heads']} heads and "
        f"{shape['kv_heads']} for keys,\n{shape['mlp']} units, a vocabulary of {shape['vocab']}; "
        f"{shape['rows']} rows of {shape['tokens']} tokens"
    )


if __name__ == "__main__":
    main()
