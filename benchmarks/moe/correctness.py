"""Mixtures by every strategy, backend, sharding and dtype against every expert in float64.

    JAX_PLATFORMS=cpu NPROC=16 python benchmarks/moe/correctness.py RESULT.md

Outputs and gradients by tokens, logits and weights; what is reported is the largest difference as
a share of the largest value expected. `kernels` are the Pallas kernels of routing and permutation,
carried out by the TPU interpreter, which looks for races and fills memory that nobody wrote with
NaN; `XLA` is what runs on this CPU. Matrix products are this CPU's in both. A case beyond its
dtype's tolerance ends the run with an error.
"""

import dataclasses
import functools
import importlib
import itertools
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import tpu as pltpu

from aquila_jax.config import preset
from aquila_jax.nn import Dispatch
from aquila_jax.nn.moe.experts import Weights
from aquila_jax.nn.moe.mixing import mix
from aquila_jax.sharding import Layout, MeshShape

ROWS, LENGTH, EMBED, MLP, EXPERTS = 8, 4, 128, 64, 8
ROUTINGS = ("random", "ties", "all equal", "one expert", "half empty", "padding")
TOLERANCES = {"float32": 1e-5, "bfloat16": 2**-5}
SETTINGS = (("float32", 1), ("float32", 2), ("float32", 4), ("bfloat16", 2))
INTERPRETER = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")


class Case(NamedTuple):
    """What is computed, and how."""

    strategy: str
    exchange: str
    shards: int
    backend: str
    dtype: str
    k: int


def cases() -> Iterator[Case]:
    """On one device and in shards; kernels, which take a minute each to interpret, last."""
    for dtype, k in SETTINGS:
        yield Case("reference", "", 1, "XLA", dtype, k)
        for strategy in ("dropless", "capacity"):
            yield Case(strategy, "", 1, "XLA", dtype, k)
            for exchange, shards in itertools.product(("gather", "all_to_all"), (2, 4)):
                yield Case(strategy, exchange, shards, "XLA", dtype, k)
    for dtype in TOLERANCES:
        yield Case("dropless", "", 1, "kernels", dtype, 2)


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


@functools.cache
def function(case: Case) -> Any:
    """Output and gradients."""
    config = preset(
        "toy_moe", embed_dim=EMBED, mlp_dim=MLP, num_experts=EXPERTS, experts_per_token=case.k
    )
    # Room for every token at every expert.
    dispatch = Dispatch(strategy=case.strategy, capacity_factor=EXPERTS / case.k)
    layout = None
    if case.shards > 1:
        dispatch = dataclasses.replace(dispatch, exchange=case.exchange)
        layout = Layout(MeshShape(data=8 // case.shards, expert=case.shards).build())

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


@contextmanager
def kernels() -> Iterator[None]:
    """Kernels instead of what a CPU would run."""
    backend = importlib.import_module("aquila_jax.kernels.backend")

    grouped = importlib.import_module("aquila_jax.kernels.grouped_matmul")
    by_library = grouped._dispatch

    def forced(asked: Any, *rest: Any) -> Any:
        return backend.dispatch("pallas" if asked == "auto" else asked, *rest)

    modules = [f"aquila_jax.kernels.{name}" for name in ("route", "permute")]
    with (
        mock.patch.object(importlib.import_module(modules[0]), "dispatch", forced),
        mock.patch.object(importlib.import_module(modules[1]), "dispatch", forced),
        # Their kernels, which JAX tests, would be interpreted too.
        mock.patch.object(grouped, "_dispatch", lambda _, *rest: by_library("tiles", *rest)),
        pltpu.force_tpu_interpret_mode(INTERPRETER),
    ):
        yield


def has_race() -> bool:
    """Whether the interpreter saw a race in what it carried out last."""
    shared: Any = importlib.import_module("jax._src.pallas.mosaic.interpret.interpret_pallas_call")
    return shared.races is not None and shared.races.races_found


def difference(case: Case, routing: str) -> float:
    """The largest of all arrays' differences from the reference, as a share of its largest."""
    differentiable, is_token, by = draw(routing)
    # Logits are float32 whatever the rest is.
    narrow = [x if i == 1 else jnp.asarray(x, case.dtype) for i, x in enumerate(differentiable)]
    by = jnp.asarray(by, case.dtype)
    arguments = (narrow, jnp.asarray(is_token), by)
    if case.backend == "kernels":
        with kernels():
            found = jax.block_until_ready(function(case)(*arguments))
            if has_race():
                raise SystemExit(f"{case}, {routing}: a race")
    else:
        found = function(case)(*arguments)
    wide = [np.asarray(x, np.float64) for x in narrow]
    reference = Case("reference", "", 1, "XLA", "float64", case.k)
    with jax.enable_x64(True):
        expected = function(reference)(wide, is_token, np.asarray(by, np.float64))
    shares = []
    for have, want in zip(found, expected, strict=True):
        want = np.asarray(want)
        # One gate, renormalised, is 1: its logits' gradient is 0, and what is left is rounding.
        largest = max(np.abs(want).max(), 1.0)
        shares.append(np.abs(np.asarray(have, np.float64) - want).max() / largest)
    return float(np.max(shares))  # NaN if any is


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
        "`kernels`: the Pallas kernels of routing and permutation, interpreted with unwritten",
        "memory filled with NaN, on one device; races are looked for in the last kernel that a",
        "run carries out. Matrix products are the CPU's.",
        "",
        "| strategy | exchange | expert shards | backend | dtype | k | "
        + " | ".join(ROUTINGS)
        + " |",
        "|" + "---|" * (6 + len(ROUTINGS)),
    ]
    start = time.monotonic()
    for case in cases():
        cells = []
        for routing in ROUTINGS:
            share = difference(case, routing)
            if not share <= TOLERANCES[case.dtype]:
                raise SystemExit(f"{case}, {routing}: differs by {share:.1e}")
            cells.append(f"{share:.0e}")
        named = [case.strategy, case.exchange, *map(str, case[2:]), *cells]
        lines.append("| " + " | ".join(named) + " |")
        Path(result).write_text("\n".join(lines) + "\n", encoding="utf-8")
        print(f"{time.monotonic() - start:.0f} s: {lines[-1]}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
