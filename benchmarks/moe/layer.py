"""A whole mixture layer of the 8x16B shape compiled ahead of time for TPUs: its HBM.

    JAX_PLATFORMS=cpu TPU_SKIP_MDS_QUERY=1 python benchmarks/moe/layer.py RESULT.md [PEER.jsonl]

D 5120, F 20480, E 8, k 2, 16,384 tokens on one chip, parameters and activations bfloat16, strategy
dropless. PEER.jsonl is what `layer_maxtext.py` printed for the same shape. Needs jax[tpu], no TPU.
"""

import json
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from aquila_jax.config import preset
from aquila_jax.nn.moe import MixtureOfExperts

CHIPS = {"v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1", "v5e": "v5e:2x2"}
SEQUENCES, LENGTH = 4, 4096


def compiled(chip: str):
    """(pass, executable) of the layer on one chip."""
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

    def both(parameters, x, is_token, gradient):
        _, pull = jax.vjp(lambda p, x: forward(p, x, is_token), parameters, x)
        return pull(gradient)

    yield "forward", jax.jit(forward).lower(parameters, x, is_token).compile()
    yield "forward and backward", jax.jit(both).lower(parameters, x, is_token, x).compile()


def row(chip: str, name: str, executable: Any) -> dict[str, Any]:
    """Its memory, in bytes."""
    memory = executable.memory_analysis()
    return {
        "library": "ours",
        "jax": jax.__version__,
        "chip": chip,
        "pass": name,
        "arguments": memory.argument_size_in_bytes,
        "outputs": memory.output_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
    }


def table(ours: list[dict[str, Any]], peers: list[dict[str, Any]]) -> str:
    """Markdown."""
    lines = [
        "# A mixture layer of the 8x16B shape on one chip: HBM",
        "",
        "`benchmarks/moe/layer.py`: D 5120, F 20480, E 8, k 2, 16,384 tokens, bfloat16 throughout,",
        f"dropless; compiled ahead of time by jax {jax.__version__}. Gigabytes (1e9) of one layer",
        "with its parameters as arguments; the backward pass returns all gradients. Deterministic.",
        "",
        "| chip | pass | arguments | outputs | temporaries | peer's temporaries | less |",
        "|---|---|---|---|---|---|---|",
    ]
    by_key = {(peer["chip"], peer["pass"]): peer for peer in peers}
    for mine in ours:
        sizes = " | ".join(f"{mine[n] / 1e9:.2f}" for n in ("arguments", "outputs", "temporaries"))
        peer = by_key.get((mine["chip"], mine["pass"]))
        theirs = "not measured | "
        if peer:
            less = 1 - mine["temporaries"] / peer["temporaries"]
            theirs = f"{peer['temporaries'] / 1e9:.2f} | {less:.0%}"
        lines.append(f"| {mine['chip']} | {mine['pass']} | {sizes} | {theirs} |")
    if peers:
        lines += [
            "",
            f"Peer: {peers[0]['library']} (jax {peers[0]['jax']}), `RoutedMoE` with megablox, by",
            "`benchmarks/moe/layer_maxtext.py`. Neither layer is rematerialised from outside; ours",
            "computes activated units again by itself (`aquila_jax/nn/moe/experts.py`).",
        ]
    return "\n".join(lines) + "\n"


def main(result: str, peer_file: str | None) -> None:
    """Writes the table after each chip."""
    peers = []
    if peer_file:
        lines = Path(peer_file).read_text(encoding="utf-8").splitlines()
        peers = [json.loads(line) for line in lines if line.startswith("{")]
    rows = []
    for chip in CHIPS:
        for name, executable in compiled(chip):
            rows.append(row(chip, name, executable))
            print(json.dumps(rows[-1]), flush=True)
            Path(result).write_text(table(rows, peers), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else None)
