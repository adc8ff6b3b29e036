"""A mixture layer forward and backward on a CPU, every strategy, against transformers' Mixtral.

    JAX_PLATFORMS=cpu python benchmarks/moe/cpu_layer.py RESULT.md --torch .venv-parity/bin/python

Both have the same weights, tokens and number of threads, in float32, and take turns: theirs runs in
a process of its own, which waits while ours computes. Root mean squares of outputs and gradients
are compared first.
Medians of tokens a second, and of the ratios of neighbouring turns.
"""

import argparse
import functools
import importlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

THREADS = 2
STRATEGIES = ("dropless", "capacity", "reference")
THEIRS = ("eager", "grouped_mm")


class Shape(NamedTuple):
    """Of a layer: features, units of an expert, experts, choices, tokens."""

    embed: int
    mlp: int
    experts: int
    chosen: int
    tokens: int


# Mixtral's proportions, small and larger, and many small experts.
SHAPES = (
    Shape(512, 1792, 8, 2, 1024),
    Shape(1024, 3584, 8, 2, 512),
    Shape(512, 512, 32, 4, 1024),
)


def draw(shape: Shape) -> dict[str, np.ndarray]:
    """Weights, tokens and the gradient of the output: the same on both sides."""
    rng = np.random.default_rng(0)
    matrix = (shape.experts, shape.embed, shape.mlp)
    sizes = {"router": (shape.embed, shape.experts), "gate": matrix, "up": matrix}
    sizes["down"] = (shape.experts, shape.mlp, shape.embed)
    drawn = {name: rng.standard_normal(size, np.float32) for name, size in sizes.items()}
    weights = {name: x * x.shape[-2] ** -0.5 for name, x in drawn.items()}
    tokens = (1, shape.tokens, shape.embed)
    return weights | {name: rng.standard_normal(tokens, np.float32) for name in ("x", "by")}


def sizes_of(*arrays: Any) -> list[float]:
    """Root mean squares: of the output, its gradient by the tokens and that by the router."""
    return [float(np.sqrt(np.mean(np.square(np.asarray(x, np.float64))))) for x in arrays]


def ours(shape: Shape, strategy: str) -> Callable[[], tuple[float, list[float]]]:
    """A turn: seconds, and what came out."""
    import jax
    import jax.numpy as jnp

    from aquila_jax.config import preset
    from aquila_jax.nn import Dispatch
    from aquila_jax.nn.moe import MixtureOfExperts

    config = preset(
        "toy_moe",
        embed_dim=shape.embed,
        mlp_dim=shape.mlp,
        num_experts=shape.experts,
        experts_per_token=shape.chosen,
    )
    layer = MixtureOfExperts(config, jnp.float32, dispatch=Dispatch(strategy=strategy))
    values = {name: jnp.asarray(x) for name, x in draw(shape).items()}
    x, by = values.pop("x"), values.pop("by")
    is_token = jnp.ones(x.shape[:2], bool)

    @jax.jit
    def call(params, x, by):
        out, pull = jax.vjp(lambda p, x: layer.apply({"params": p}, x, is_token), params, x)
        return out, pull(by)

    def turn() -> tuple[float, list[float]]:
        start = time.perf_counter()
        out, (by_params, by_x) = jax.block_until_ready(call(values, x, by))
        return time.perf_counter() - start, sizes_of(out, by_x, by_params["router"])

    return turn


def serve(shape: Shape) -> None:
    """The side of transformers: for every name read, a turn of that implementation, as JSON."""
    torch: Any = importlib.import_module("torch")
    mixtral: Any = importlib.import_module("transformers.models.mixtral.modeling_mixtral")

    torch.set_num_threads(THREADS)
    values = {name: torch.tensor(x) for name, x in draw(shape).items()}
    config = mixtral.MixtralConfig(
        hidden_size=shape.embed,
        intermediate_size=shape.mlp,
        num_local_experts=shape.experts,
        num_experts_per_tok=shape.chosen,
    )
    blocks = {}
    for name in THEIRS:
        config._experts_implementation = name
        blocks[name] = block = mixtral.MixtralSparseMoeBlock(config)
        with torch.no_grad():
            block.gate.weight.copy_(values["router"].T)
            read = torch.cat([values["gate"], values["up"]], dim=2)
            block.experts.gate_up_proj.copy_(read.transpose(1, 2))
            block.experts.down_proj.copy_(values["down"].transpose(1, 2))
    for line in sys.stdin:
        name = line.strip()
        block, x = blocks[name], values["x"].clone().requires_grad_()
        block.experts.config._experts_implementation = name
        block.zero_grad(set_to_none=True)
        start = time.perf_counter()
        out = block(x)
        out.backward(values["by"])
        seconds = time.perf_counter() - start
        found = sizes_of(out.detach(), x.grad, block.gate.weight.grad)
        print(json.dumps([seconds, found]), flush=True)


def compare(shape: Shape, python: str, rounds: int) -> dict[str, list[float]]:
    """Seconds of each party's turns; the first turn compiles and is left out."""
    command = [python, __file__, "--serve", *map(str, shape)]
    # The child has no need of JAX's settings, and BLAS reads its number of threads from here.
    environment = os.environ | {"OMP_NUM_THREADS": str(THREADS)}
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as child:
        assert child.stdin
        assert child.stdout
        send, receive = child.stdin, child.stdout

        def theirs(name: str) -> tuple[float, list[float]]:
            send.write(name + "\n")
            send.flush()
            seconds, found = json.loads(receive.readline())
            return seconds, found

        turns = {name: ours(shape, name) for name in STRATEGIES}
        turns |= {name: functools.partial(theirs, name) for name in THEIRS}
        _, expected = turns[STRATEGIES[0]]()
        seconds: dict[str, list[float]] = {name: [] for name in turns}
        for number in range(rounds + 1):
            for name, turn in turns.items():
                taken, found = turn()
                if number:
                    seconds[name].append(taken)
                elif name != "capacity":  # which drops some
                    np.testing.assert_allclose(found, expected, rtol=1e-4)
                print(f"{shape}, round {number}, {name}: {taken:.3f} s", flush=True)
        send.close()
    return seconds


def rows(shape: Shape, seconds: dict[str, list[float]]) -> list[str]:
    """A line for each party."""
    fastest = min(THEIRS, key=lambda name: statistics.median(seconds[name]))
    lines = []
    for name, taken in seconds.items():
        speeds = [shape.tokens / s for s in taken]
        spread = f"{statistics.median(speeds):.0f} ({min(speeds):.0f} to {max(speeds):.0f})"
        ratios = [a / b for a, b in zip(seconds[fastest], taken, strict=True)]
        whose = "transformers, " + name if name in THEIRS else "ours, " + name
        dims = " | ".join(map(str, shape))
        lines.append(
            f"| {dims} | {whose} | {spread} "
            f"| {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}) |"
        )
    return lines


def main(result: str, python: str, rounds: int) -> None:
    """Writes the table after each shape."""
    import jax

    from aquila_jax.training.freed_memory import keep_freed_memory

    keep_freed_memory()
    show = "import torch, transformers as t; print(torch.__version__, t.__version__)"
    versions = subprocess.run([python, "-c", show], capture_output=True, text=True, check=True)
    torch, transformers = versions.stdout.split()
    lines = [
        "# A mixture layer on a CPU, forward and backward, against transformers' Mixtral block",
        "",
        f"`benchmarks/moe/cpu_layer.py --rounds {rounds}`: float32, {THREADS} threads, "
        f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} at the start.",
        f"jax {jax.__version__}, torch {torch}, transformers {transformers}.",
        "Tokens a second: median (least to most); ratio to the faster of transformers' two in the",
        "same round. Root mean squares of the output and of the gradients by tokens and by the",
        "router agree to 1e-4, `capacity` aside, which drops what is above 1.25 times the average.",
        "Ours keeps freed memory for the next step, as `aquila train` does.",
        "Threads that wait for each other, as torch's do, lose more than XLA's where others",
        "compute at the same time: the ratio is this machine's.",
        "",
        "| D | F | E | k | tokens | | tokens/s | ratio |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for shape in SHAPES:
        lines += rows(shape, compare(shape, python, rounds))
        Path(result).write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve"]:
        serve(Shape(*map(int, sys.argv[2:])))
    else:
        parser = argparse.ArgumentParser()
        parser.add_argument("result")
        parser.add_argument("--torch", required=True, help="a Python that has transformers")
        parser.add_argument("--rounds", type=int, default=7)
        given = parser.parse_args()
        main(given.result, given.torch, given.rounds)
