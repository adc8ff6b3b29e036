"""One tiny model for every family, and directories of theirs to damage."""

import dataclasses
import json
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from aquila_jax import save_hf
from aquila_jax.config import ModelConfig, RopeScaling

DENSE = ModelConfig(
    vocab_size=61,
    embed_dim=12,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=6,
    mlp_dim=20,
    context_length=32,
    rope_theta=100.0,
    norm_eps=1e-3,
    qkv_bias=False,
)
BIASED = dataclasses.replace(DENSE, qkv_bias=True)
MIXTURE = dataclasses.replace(DENSE, num_experts=4, experts_per_token=2)
FINE_GRAINED = dataclasses.replace(MIXTURE, qk_norm=True, expert_mlp_dim=7)
WEIGHED = dataclasses.replace(
    MIXTURE, qkv_bias=True, expert_mlp_dim=7, shared_mlp_dim=9, shared_expert_gate=True
)
LLAMA3 = RopeScaling("llama3", 8.0, 1.0, 4.0, 32)
LINEAR = RopeScaling("linear", 3.0)
CONFIGS = {
    "llama": DENSE,
    "llama, tied": dataclasses.replace(DENSE, tie_embeddings=True),
    "qwen2": BIASED,
    "qwen2, tied": dataclasses.replace(BIASED, tie_embeddings=True),
    "mistral": dataclasses.replace(DENSE, embed_dim=10),
    "mixtral": MIXTURE,
    "aquilamoe": dataclasses.replace(MIXTURE, qkv_bias=True),
    "llama, llama3 positions": dataclasses.replace(DENSE, rope_scaling=LLAMA3),
    "qwen2, linear positions": dataclasses.replace(BIASED, rope_scaling=LINEAR),
    "qwen3": dataclasses.replace(DENSE, qk_norm=True),
    "qwen3, tied": dataclasses.replace(DENSE, qk_norm=True, tie_embeddings=True),
    "qwen3_moe": FINE_GRAINED,
    "qwen3_moe, every second": dataclasses.replace(
        FINE_GRAINED, num_layers=4, moe_every=2, renormalize_gates=False, rope_scaling=LLAMA3
    ),
    "qwen2_moe": WEIGHED,
    "qwen2_moe, every third": dataclasses.replace(WEIGHED, moe_every=3, qkv_bias=False),
}


@pytest.fixture
def saved(tmp_path: Path, random_params) -> Callable[..., Path]:
    """A directory that holds a random model of a configuration, in float32."""

    def save(config: ModelConfig = DENSE, name: str = "model", **options: Any) -> Path:
        path = tmp_path / name
        save_hf(random_params(config), config, path, **{"dtype": "float32", **options})
        return path

    return save


def edit_json(path: Path, **changes: Any) -> None:
    """Change keys of a JSON object in a file; None removes one."""
    values = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({k: v for k, v in values.items() if v is not None}))


def read_raw(path: Path) -> tuple[dict[str, Any], bytes]:
    """Header and data of a safetensors file."""
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def write_raw(path: Path, header: Mapping[str, Any], data: bytes) -> None:
    """The inverse of `read_raw`."""
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def edit_tensors(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change the tensors of a safetensors file, given as dicts of dtype, shape and data."""
    header, data = read_raw(path)
    tensors = {
        name: {**entry, "data": data[slice(*entry.pop("data_offsets"))]}
        for name, entry in header.items()
        if name != "__metadata__"
    }
    change(tensors)
    packed = b"".join(tensor["data"] for tensor in tensors.values())
    end, written = 0, {}
    for name, tensor in tensors.items():
        start, end = end, end + len(tensor["data"])
        written[name] = {
            "dtype": tensor["dtype"],
            "shape": tensor["shape"],
            "data_offsets": [start, end],
        }
    write_raw(path, written, packed)
