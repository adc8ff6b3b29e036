"""Mixtures by every strategy, backend, sharding and dtype against every expert in float64.

    JAX_PLATFORMS=cpu NPROC=16 python benchmarks/moe/correctness.py RESULT.md

Outputs and gradients by tokens, logits and weights; what is reported is the largest difference as
a share of the largest value expected. `kernels` are the Pallas kernels of routing and permutation,
carried out by the TPU interpreter on as many devices as experts are split over; it fills memory
that nobody wrote with NaN and looks for races in every kernel. `XLA` is what runs on this CPU.
Matrix products are this CPU's in both. A case beyond its dtype's tolerance, or with a race, ends
the run with an error. It takes 18 minutes on two busy cores. Stopped, it goes on from RESULT.md,
which is to be deleted where the code has changed.
"""

import argparse
import dataclasses
import functools
import importlib
import itertools
import os
import re
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

# Programs are large and run six times: the compiler is told to hurry.
os.environ["XLA_FLAGS"] = (
    "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0 "
    "--xla_llvm_disable_expensive_passes=true"
)

import jax
import jax.numpy as jnp
import numpy as np

from aquila_jax.config import preset
from aquila_jax.kernels import invert_tpu, rows_tpu
from aquila_jax.nn import Dispatch
from aquila_jax.nn.moe.experts import Weights
from aquila_jax.nn.moe.mixing import mix
from aquila_jax.sharding import Layout, MeshShape
from tests.kernels.interpreter import Watch, interpreted

ROWS, LENGTH, EMBED, MLP, EXPERTS = 8, 4, 128, 64, 8
ROUTINGS = ("random", "ties", "all equal", "one expert", "half empty", "padding")
TOLERANCES = {"float32": 1e-5, "bfloat16": 2**-5}
CHOICES = (1, 2, 4)
SETTINGS = (("float32", 1), ("float32", 2), ("float32", 4), ("bfloat16", 2))
# Tiles so small that these few tokens fill several, as a batch does.
TILES = ((rows_tpu, "ROWS", 32), (invert_tpu, "LANES", 16), (invert_tpu, "BLOCK", 32))


class Case(NamedTuple):
    """What is computed, and how.

    Attributes:
        strategy: of `Dispatch`; "capacity" with room for all, "tight" with slots for the average,
            so that pairs are dropped.
        exchange: of `Dispatch`, with several shards.
        shards: over how many devices experts are split.
        backend: "XLA" or "kernels".
        dtype: of tokens and matrices.
        k: experts per token.
    """

    strategy: str
    exchange: str
    shards: int
    backend: str
    dtype: str
    k: int


# How experts may be split: exchange and shards.
SPLITS = (("", 1), *itertools.product(("gather", "all_to_all"), (2, 4)))


def cases() -> Iterator[Case]:
    """On one device and in shards; kernels, which take much longer to interpret, last."""
    for dtype, k in SETTINGS:
        yield Case("reference", "", 1, "XLA", dtype, k)
        for strategy, (exchange, shards) in itertools.product(("dropless", "capacity"), SPLITS):
            yield Case(strategy, exchange, shards, "XLA", dtype, k)
    yield from (Case("tight", *split, "XLA", "float32", 2) for split in SPLITS)
    for strategy, dtype, k in itertools.product(("dropless", "capacity"), TOLERANCES, CHOICES):
        yield Case(strategy, "", 1, "kernels", dtype, k)
    # Both exchanges with either number of shards, by turns.
    turns = itertools.cycle((("all_to_all", 2), ("gather", 4), ("gather", 2), ("all_to_all", 4)))
    for strategy, k, _ in itertools.product(("dropless", "capacity"), CHOICES, range(2)):
        yield Case(strategy, *next(turns), "kernels", "float32", k)
    yield Case("dropless", "all_to_all", 4, "kernels", "bfloat16", 2)
    yield Case("capacity", "gather", 2, "kernels", "bfloat16", 2)
    yield Case("tight", "", 1, "kernels", "float32", 2)
    yield Case("tight", "all_to_all", 2, "kernels", "float32", 2)


def routings(case: Case) -> tuple[str, ...]:
    """What it is tried with: all; interpreted on several devices, or in bfloat16, the worst."""
    is_short = case.backend == "kernels" and (case.shards > 1 or case.dtype == "bfloat16")
    return ("one expert", "padding") if is_short else ROUTINGS


def draw(routing: str) -> tuple[Any, ...]:
    """float32 tokens, logits and matrices; which tokens are real; the gradient of the output."""
    rng = np.random.default_rng(0)
    x, by = rng.standard_normal((2, ROWS, LENGTH, EMBED), np.float32)
    logits = rng.standard_normal((ROWS, LENGTH, EXPERTS), np.float32)
    if routing == "ties":
        logits = np.round(logits)
    elif routing == "all equal":
        logits[:] = 0.25
    elif routing == "one expert":
        logits[..., EXPERTS // 2] += 40
    elif routing == "half empty":
        logits[..., ::2] -= 40
    gate, up = rng.standard_normal((2, EXPERTS, EMBED, MLP), np.float32) * EMBED**-0.5
    down = rng.standard_normal((EXPERTS, MLP, EMBED), np.float32) * np.float32(MLP**-0.5)
    is_token = np.ones((ROWS, LENGTH), bool)
    if routing == "padding":
        is_token[1::2, LENGTH // 2 :] = False
    return (x, logits, gate, up, down), is_token, by


def function(case: Case) -> Any:
    """Output and gradients, to be compiled once and called with every routing."""
    config = preset(
        "toy_moe", embed_dim=EMBED, mlp_dim=MLP, num_experts=EXPERTS, experts_per_token=case.k
    )
    is_tight = case.strategy == "tight"
    dispatch = Dispatch(
        strategy="capacity" if is_tight else case.strategy,
        capacity_factor=1 if is_tight else EXPERTS / case.k,
    )
    layout = None
    if case.shards > 1:
        dispatch = dataclasses.replace(dispatch, exchange=case.exchange)
        layout = Layout(mesh_of(case))

    @jax.jit
    def call(differentiable, is_token, by):
        def output(x, logits, *matrices):
            bias = jnp.zeros(EXPERTS, logits.dtype)
            weights = Weights(*matrices)
            out, _ = mix(config, dispatch, x, logits, is_token, bias, weights, layout)
            # What padding says is nobody's concern: with fixed slots no expert hears it.
            return jnp.where(is_token[..., None], out, 0)

        out, pull = jax.vjp(output, *differentiable)
        return out, *pull(by)

    return call


def mesh_of(case: Case) -> Any:
    """All eight devices; for kernels, every device of which is interpreted, those of experts."""
    if case.backend == "kernels" or case.strategy == "tight":
        return MeshShape(data=1, expert=case.shards).build(jax.devices()[: case.shards])
    return MeshShape(data=8 // case.shards, expert=case.shards).build()


@contextmanager
def kernels() -> Iterator[Watch]:
    """Kernels instead of what a CPU would run."""
    backend = importlib.import_module("aquila_jax.kernels.backend")
    grouped = importlib.import_module("aquila_jax.kernels.grouped_matmul")
    by_library = grouped._dispatch

    def forced(asked: Any, *rest: Any) -> Any:
        return backend.dispatch("pallas" if asked == "auto" else asked, *rest)

    with ExitStack() as stack:
        for name in ("route", "permute"):
            module = importlib.import_module(f"aquila_jax.kernels.{name}")
            stack.enter_context(mock.patch.object(module, "dispatch", forced))
        # Their kernels, which JAX tests, would be interpreted too.
        tiles = mock.patch.object(grouped, "_dispatch", lambda _, *rest: by_library("tiles", *rest))
        stack.enter_context(tiles)
        for module, name, size in TILES:
            stack.enter_context(mock.patch.object(module, name, size))
        yield stack.enter_context(interpreted())


class Found(NamedTuple):
    """Of one case and routing.

    Attributes:
        share: the largest of all arrays' differences, as a share of its largest value.
        kernels: how many were interpreted, none of which had a race.
    """

    share: float
    kernels: int


def find(case: Case, call: Any, routing: str) -> Found:
    """Calls the case's function, and the reference."""
    differentiable, is_token, by = draw(routing)
    # Logits are float32 whatever the rest is.
    narrow = [x if i == 1 else jnp.asarray(x, case.dtype) for i, x in enumerate(differentiable)]
    by = jnp.asarray(by, case.dtype)
    arguments = (narrow, jnp.asarray(is_token), by)
    carried_out = 0
    if case.backend == "kernels":
        with kernels() as watch:
            found = jax.block_until_ready(call(*arguments))
        carried_out = watch.kernels
    else:
        found = call(*arguments)
    wide = [np.asarray(x, np.float64) for x in narrow]
    with jax.enable_x64(True):
        expected = reference(reference_of(case))(wide, is_token, np.asarray(by, np.float64))
    shares = []
    for have, want in zip(found, expected, strict=True):
        want = np.asarray(want)
        # One gate, renormalised, is 1: its logits' gradient is 0, and what is left is rounding.
        largest = max(np.abs(want).max(), 1.0)
        shares.append(np.abs(np.asarray(have, np.float64) - want).max() / largest)
    return Found(float(np.max(shares)), carried_out)  # NaN if any is


reference = functools.cache(function)


def reference_of(case: Case) -> Case:
    """Every expert on every token; where pairs are dropped, the same ones, in float64 by XLA."""
    if case.strategy == "tight":
        return case._replace(backend="XLA", dtype="float64")
    return Case("reference", "", 1, "XLA", "float64", case.k)


def main(result: str) -> None:
    """Writes the table after each case."""
    lines = [
        "# Mixtures against every expert in float64",
        "",
        f"`benchmarks/moe/correctness.py`: E {EXPERTS}, D {EMBED}, F {MLP}, {ROWS} x {LENGTH} "
        f"tokens, jax {jax.__version__}.",
        "Outputs and gradients by tokens, logits and weights; the largest difference as a share of",
        "the largest expected value, or of 1 where that is below. float32 may differ by "
        f"{TOLERANCES['float32']:.0e}, bfloat16 by {TOLERANCES['bfloat16']:.1e}.",
        "`kernels`: the Pallas kernels of routing and permutation, interpreted on as many devices",
        "as there are shards, with unwritten memory filled with NaN and every kernel of every run",
        "looked at for races. `tight`: slots for the average alone, against the same in float64.",
        "Matrix products are the CPU's. Empty cells were not tried: what is interpreted on several",
        "devices or in bfloat16 is tried with what is worst for it.",
        "",
        "| strategy | exchange | expert shards | backend | dtype | k | "
        + " | ".join(ROUTINGS)
        + " |",
        "|" + "---|" * (6 + len(ROUTINGS)),
    ]
    start, (kept, carried_out) = time.monotonic(), finished(Path(result))
    for case in cases():
        named = "| " + " | ".join([case.strategy, case.exchange, *map(str, case[2:])]) + " |"
        if named not in kept:
            cells, call = [], function(case)
            for routing in ROUTINGS:
                if routing not in routings(case):
                    cells.append("")
                    continue
                found = find(case, call, routing)
                carried_out += found.kernels
                if not found.share <= TOLERANCES[case.dtype]:
                    raise SystemExit(f"{case}, {routing}: differs by {found.share:.1e}")
                cells.append(f"{found.share:.0e}")
            kept[named] = " | ".join(cells) + " |"
            print(f"{time.monotonic() - start:.0f} s: {named} {kept[named]}", flush=True)
        lines.append(f"{named} {kept[named]}")
        last = f"\n{carried_out} kernels were interpreted, and none has a race.\n"
        Path(result).write_text("\n".join(lines) + "\n" + last, encoding="utf-8")


def finished(result: Path) -> tuple[dict[str, str], int]:
    """Rows of a run that was stopped, by what is in front of their cells; and its kernels."""
    text = result.read_text(encoding="utf-8") if result.exists() else ""
    ran = re.search(r"^(\d+) kernels were", text, re.MULTILINE)
    found = re.findall(r"^((?:\|[^|]*){6}\|) (.*\d.*)$", text, re.MULTILINE)
    return {named: cells for named, cells in found if "e-0" in cells}, int(ran[1]) if ran else 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("result")
    main(parser.parse_args().result)
