"""A whole mixture layer of the 8x16B shape compiled ahead of time for TPUs: its HBM.

    JAX_PLATFORMS=cpu TPU_SKIP_MDS_QUERY=1 python benchmarks/moe/layer.py RESULT.md PEER.jsonl

D 5120, F 20480, E 8, k 2, 16,384 tokens on one chip, parameters and activations bfloat16, strategy
dropless. PEER.jsonl is what `layer_maxtext.py` printed for the same shape. Chips may be named after
it. Needs jax[tpu], no TPU.
"""

import argparse
import functools
import json
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from hbm import SIZES, sizes_of
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from aquila_jax.config import preset
from aquila_jax.nn.moe import MixtureOfExperts

CHIPS = {"v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1", "v5e": "v5e:2x2"}
SEQUENCES, LENGTH = 4, 4096
# What stands between forward and backward. Of ours alone "products" is what it keeps by itself:
# what matrix products read and give; activated units are computed again.
KEPT = ("products", "inputs")
_ORDER = ("", "all", "products", "inputs")
_THEIR_PRODUCTS = ("moe_x_sorted", "moe_mlpwi_0", "moe_mlpwi_1", "moe_mlpwo")


def lowered(chip: str) -> Iterator[tuple[str, str, Any]]:
    """(pass, what is kept, program) of the layer on one chip."""
    config = preset("aquila3_8x16b")
    layer = MixtureOfExperts(config, jnp.bfloat16)
    device = topologies.get_topology_desc(CHIPS[chip], platform="tpu").devices[0]
    sharding = SingleDeviceSharding(device)
    x = jax.ShapeDtypeStruct((SEQUENCES, LENGTH, config.embed_dim), jnp.bfloat16)
    is_token = jax.ShapeDtypeStruct((SEQUENCES, LENGTH), jnp.bool_)
    parameters = jax.eval_shape(layer.init, jax.random.key(0), x, is_token)["params"]

    def narrow(leaf: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16, sharding=sharding)

    parameters, x = jax.tree.map(narrow, parameters), narrow(x)
    is_token = jax.ShapeDtypeStruct(is_token.shape, bool, sharding=sharding)

    def forward(parameters, x, is_token):
        return layer.apply({"params": parameters}, x, is_token)

    def both(kept, parameters, x, is_token, gradient):
        def call(parameters, x):
            return forward(parameters, x, is_token)

        _, pull = jax.vjp(jax.checkpoint(call) if kept == "inputs" else call, parameters, x)
        return pull(gradient)

    yield "forward", "", jax.jit(forward).lower(parameters, x, is_token)
    for kept in KEPT:
        program = jax.jit(functools.partial(both, kept))
        yield "forward and backward", kept, program.lower(parameters, x, is_token, x)


def row(chip: str, name: str, kept: str, program: Any) -> dict[str, Any]:
    """Its memory, in bytes."""
    return {
        "library": "ours",
        "jax": jax.__version__,
        "chip": chip,
        "pass": name,
        "kept": kept,
        **sizes_of(program),
    }


def table(ours: list[dict[str, Any]], peers: list[dict[str, Any]]) -> str:
    """Markdown."""
    lines = [
        "# A mixture layer of the 8x16B shape on one chip: HBM",
        "",
        "`benchmarks/moe/layer.py`: D 5120, F 20480, E 8, k 2, 16,384 tokens, bfloat16 throughout,",
        f"dropless; compiled ahead of time by jax {jax.__version__}, libtpu {version('libtpu')}.",
        "Gigabytes (1e9) of one layer with its parameters as arguments; the backward pass returns",
        "all gradients.",
        "",
        "| chip | pass | kept | arguments | outputs | temporaries | peer's temporaries | less |",
        "|---|---|---|---|---|---|---|---|",
    ]
    mine = {(row["chip"], row["pass"], row["kept"]): row for row in ours}
    # Where the peer keeps all, ours is what it is by itself.
    mine |= {(*key[:2], "all"): row for key, row in mine.items() if key[2] == "products"}
    theirs = {(row["chip"], row["pass"], row["kept"]): row for row in peers}
    for key in sorted(mine, key=lambda key: (key[1] != "forward", _ORDER.index(key[2]))):
        sizes = " | ".join(_gigabytes(mine[key][name]) for name in SIZES)
        compared = "not measured | "
        if key in theirs:
            ours, peers_own = mine[key]["temporaries"], theirs[key]["temporaries"]
            # No "-0%".
            less = f"{round(1 - ours / peers_own, 2) + 0.0:.0%}" if ours and peers_own else ""
            compared = f"{_gigabytes(peers_own)} | {less}"
        lines.append(f"| {' | '.join(key)} | {sizes} | {compared} |")
    lines += [
        "",
        "Kept for the backward pass: `products`, what matrix products read and give; `inputs`, the",
        "layer's own, under `jax.checkpoint`; `all`, what differentiation asks the peer to keep.",
        "Ours keeps `products` by itself and computes activated units again",
        "(`aquila_jax/nn/moe/experts.py`), so that its figures under `all` are the same, and only",
        "`products` and `inputs` compare equal work. Forward alone, rows go through hidden units",
        "in parts. The peer's kept products are 3.02 GB: where its temporaries are less, some of",
        "them lie where gradients are written later; v5e has the least HBM of these chips.",
    ]
    if peers:
        lines += [
            "",
            f"Peer: {peers[0]['library']} (jax {peers[0]['jax']}), `RoutedMoE` with megablox, by",
            "`benchmarks/moe/layer_maxtext.py`; its `products` are what it names",
            ", ".join(f"`{name}`" for name in _THEIR_PRODUCTS) + ".",
        ]
    return "\n".join(lines) + "\n"


def _gigabytes(size: int | None) -> str:
    return "does not fit" if size is None else f"{size / 1e9:.2f}"


def main(result: str, peer_file: str, chips: list[str]) -> None:
    """Writes the table, and RESULT.jsonl after each chip; what that has is not measured again."""
    lines = Path(peer_file).read_text(encoding="utf-8").splitlines()
    peers = [json.loads(line) for line in lines if line.startswith("{")]
    kept_file = Path(result).with_suffix(".jsonl")
    lines = kept_file.read_text(encoding="utf-8").splitlines() if kept_file.exists() else []
    rows = [json.loads(line) for line in lines]
    for chip in chips:
        if any(known["chip"] == chip for known in rows):
            continue
        found = [row(chip, *program) for program in lowered(chip)]
        rows += found
        kept_file.write_text("\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")
    Path(result).write_text(table(rows, peers), encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("result")
    parser.add_argument("peer", help="what layer_maxtext.py printed")
    parser.add_argument("chips", nargs="*", default=list(CHIPS))
    given = parser.parse_args()
    main(given.result, given.peer, given.chips)
