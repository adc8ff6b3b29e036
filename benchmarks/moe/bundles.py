"""Static bundle counts of the routing kernels against XLA's lowering of the same, for real TPUs.

    JAX_PLATFORMS=cpu TPU_SKIP_MDS_QUERY=1 python benchmarks/moe/bundles.py RESULT.md [CHIP ...]

`--one CHIP E k [PARTY NAME]` prints the figures of one chip and setting, or of one program.
Compiles ahead of time, needs jax[tpu] and no TPU; minutes for each chip and setting. A program
that takes more than a quarter of an hour is left out. Stopped, it goes on from RESULT.json, which
is to be deleted where kernels or jax have changed. That a kernel compiles says that it fits VMEM.
What a bundle count says and does not: see `schedules.py`.
"""

import itertools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import schedules

CHIPS = {"v5p": "v5p:2x2x1", "v5e": "v5e:2x2", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}
SETTINGS = [(8, 2), (128, 8)]
NAMES = ["route", "permute", "unpermute", "unpermute backward"]
TOKENS, DIM = 16384, 5120
# Seconds that a compiler has for a program.
LIMIT = 900


def measure(chip: str, num_experts: int, k: int, only: list[str]) -> None:
    """Prints a JSON line for every program: bundles per 1,024 tokens, spills, kernels.

    Or for one alone, `only`: its party and name.
    """
    folder = Path(tempfile.mkdtemp())
    os.environ["LIBTPU_INIT_ARGS"] = schedules.FLAGS.format(folder)
    import jax
    from jax.experimental import topologies
    from jax.sharding import SingleDeviceSharding

    device = topologies.get_topology_desc(CHIPS[chip], platform="tpu").devices[0]
    sharding = SingleDeviceSharding(device)
    for name, party, function, shapes in programs(num_experts, k):
        if only not in ([], [party, name]):
            continue
        arguments = [jax.ShapeDtypeStruct(*shape, sharding=sharding) for shape in shapes]
        jax.jit(function).lower(*arguments).compile()
        apart = folder / f"{name}-{party}"
        apart.mkdir()
        for file in folder.iterdir():
            if file.is_file():
                file.rename(apart / file.name)
        kernels = schedules.read(apart)
        row = {
            "chip": chip,
            "experts": num_experts,
            "k": k,
            "name": name,
            "party": party,
            "bundles": round(sum(kernel.cycles for kernel in kernels) * 1024 / TOKENS),
            "unbounded": sum(kernel.unbounded for kernel in kernels),
            "spills": sum(kernel.vector_spills for kernel in kernels),
            "kernels": {kernel.name: round(kernel.cycles * 1024 / TOKENS) for kernel in kernels},
        }
        print(json.dumps(row), flush=True)


def programs(num_experts: int, k: int) -> Iterator[tuple[str, str, Callable[..., Any], list]]:
    """(name, whose, function, shapes and dtypes of its arguments)."""
    import jax.numpy as jnp

    from aquila_jax.kernels import permute, route, unpermute

    rows = TOKENS * k
    logits = ((TOKENS, num_experts), jnp.float32)
    x = ((TOKENS, DIM), jnp.bfloat16)
    rows_shape = ((rows, DIM), jnp.bfloat16)
    pairs, gates = ((TOKENS, k), jnp.int32), ((TOKENS, k), jnp.float32)
    order = ((rows,), jnp.int32)

    def our_route(logits):
        is_token = jnp.ones(TOKENS, bool)
        return route(logits, is_token, experts_per_token=k, renormalize=True, backend="pallas")

    yield "route", "ours", our_route, [logits]
    yield "route", "XLA", xla_route(k), [logits]
    yield "permute", "ours", lambda x, s: permute(x, s, backend="pallas"), [x, pairs]
    yield "permute", "XLA", lambda x, order: x[order // k], [x, order]

    def our_unpermute(rows, slots, gates):
        return unpermute(rows, slots, gates, backend="pallas")

    yield "unpermute", "ours", our_unpermute, [rows_shape, pairs, gates]
    yield "unpermute", "XLA", xla_unpermute, [rows_shape, order, gates]
    for party, backend in (("ours", "pallas"), ("XLA", "reference")):
        yield "unpermute backward", party, backward(backend), [rows_shape, pairs, gates, x]


def xla_route(k: int) -> Callable[..., Any]:
    """What route does by `lax.top_k`, `argsort` and sums, as most libraries do."""
    import jax
    import jax.numpy as jnp

    def call(logits):
        probabilities = jax.nn.softmax(logits)
        gates, experts = jax.lax.top_k(probabilities, k)
        gates /= gates.sum(axis=1, keepdims=True)
        order = jnp.argsort(experts.reshape(-1), stable=True)
        counts = jnp.bincount(experts.reshape(-1), length=logits.shape[1])
        z = jnp.sum(jax.nn.logsumexp(logits, axis=1) ** 2)
        return gates, experts, order, counts, probabilities.sum(axis=0), z

    return call


def xla_unpermute(rows, order, gates):
    """Back into the order of tokens by a second `argsort`, then the weighted sum."""
    import jax.numpy as jnp

    taken = rows[jnp.argsort(order)].reshape(*gates.shape, -1)
    return jnp.einsum("NkD,Nk->ND", taken.astype(jnp.float32), gates).astype(rows.dtype)


def backward(backend: Any) -> Callable[..., Any]:
    """Both gradients of unpermute; XLA is given the plain-JAX reference, which sorts nothing."""
    import jax

    from aquila_jax.kernels import unpermute

    def call(rows, slots, gates, gradient):
        _, pull = jax.vjp(lambda r, g: unpermute(r, slots, g, backend=backend), rows, gates)
        return pull(gradient)

    return call


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown, one line for each pair of programs."""
    import jax

    lines = [
        "# Static bundles of routing kernels, per 1,024 tokens",
        "",
        f"`benchmarks/moe/bundles.py`: {TOKENS} tokens, rows of {DIM} bfloat16, compiled ahead of",
        f"time by jax {jax.__version__} for one chip. Compilation is deterministic: no spread.",
        "XLA: softmax, `lax.top_k` and a stable `argsort` of the pairs (route), gather (permute),",
        "`argsort`, gather and einsum (unpermute), the plain-JAX reference (unpermute backward).",
        "Loops without a constant bound are counted once, which makes a figure a lower bound; ours",
        "have them only in XLA's reshapes around the kernels.",
        "tokamax has no routing or permutation of rows to compare with.",
        f"Programs had {LIMIT} s to compile, on two cores with other work.",
        "",
        "A bundle is a cycle when nothing stalls. That is no time: rows come from HBM, each by a",
        "DMA of its own, and how well these overlap no compiler says. Where permuting is bound by",
        "HBM, fewer bundles win nothing. About half of permute's issue DMAs, row by row.",
        "On tpu7x XLA's gathers are not among the TensorCore's kernels at all: there permute and",
        "the gradient of unpermute lose.",
        "",
        "| chip | E | k | program | ours | XLA | XLA / ours | our spills | unbounded, ours / XLA |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    rows = sorted(
        rows, key=lambda r: (list(CHIPS).index(r["chip"]), r["experts"], NAMES.index(r["name"]))
    )
    found = {(r["chip"], r["experts"], r["k"], r["name"], r["party"]): r for r in rows}
    totals: dict[tuple, list[int]] = {}
    for *key, party in found:
        if party != "ours" or (*key, "XLA") not in found:
            continue
        ours, xla = found[*key, "ours"], found[*key, "XLA"]
        chip, experts, k, name = key
        line = f"| {chip} | {experts} | {k} | {name} | {ours['bundles']} "
        if xla["bundles"] is None:
            lines.append(f"{line}| not compiled in {LIMIT} s | | {ours['spills']} | |")
            continue
        lines.append(
            f"{line}| {xla['bundles']} | {xla['bundles'] / ours['bundles']:.2f} | {ours['spills']} "
            f"| {ours['unbounded']} / {xla['unbounded']} |"
        )
        if name != "unpermute backward":
            total = totals.setdefault((chip, experts, k), [0, 0, 0])
            for at, figure in enumerate((ours["bundles"], xla["bundles"], 1)):
                total[at] += figure
    for (chip, experts, k), (ours, xla, programs_found) in totals.items():
        if programs_found < 3:
            continue
        lines.append(
            f"| {chip} | {experts} | {k} | **all three forward** | {ours} | {xla} "
            f"| **{xla / ours:.2f}** | | |"
        )
    return "\n".join(lines) + "\n"


def main(result: str, chips: list[str]) -> None:
    """Each program in a process of its own, where libtpu is told where to write."""
    kept = Path(result).with_suffix(".json")
    lines = kept.read_text(encoding="utf-8").splitlines() if kept.exists() else []
    rows = [json.loads(line) for line in lines]
    done = {(r["chip"], r["experts"], r["k"], r["party"], r["name"]) for r in rows}
    for chip, (num_experts, k) in itertools.product(chips, SETTINGS):
        for name, party, *_ in programs(num_experts, k):
            if (chip, num_experts, k, party, name) in done:
                continue
            command = [sys.executable, __file__, "--one", chip, str(num_experts), str(k)]
            rows.append(found_by([*command, party, name]))
            print(json.dumps(rows[-1]), flush=True)
            kept.write_text("\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")
    Path(result).write_text(table(rows), encoding="utf-8")


def found_by(command: list[str]) -> dict[str, Any]:
    """The row that a process prints; without figures where it takes longer than `LIMIT`."""
    try:
        run = subprocess.run(command, capture_output=True, text=True, check=False, timeout=LIMIT)
    except subprocess.TimeoutExpired:
        chip, experts, k, party, name = command[-5:]
        key = {"chip": chip, "experts": int(experts), "k": int(k), "name": name, "party": party}
        return {**key, "bundles": None, "unbounded": None, "spills": None}
    if run.returncode:
        raise SystemExit(f"{' '.join(command[2:])}: {run.stderr[-2000:]}")
    return json.loads(next(line for line in run.stdout.splitlines() if line[:1] == "{"))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        measure(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), sys.argv[5:])
    else:
        main(sys.argv[1], sys.argv[2:] or list(CHIPS))
