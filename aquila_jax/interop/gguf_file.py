"""Llama models from GGUF files, the format of llama.cpp, dequantized."""

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.typing import DTypeLike

from aquila_jax import axes
from aquila_jax.config import ModelConfig
from aquila_jax.data.gguf_tokenizer import read_gguf
from aquila_jax.errors import UserError
from aquila_jax.interop import arrays, layout

_NAMES: Mapping[str, str] = {
    "token_embedder/embedding": "token_embd.weight",
    "layers/pre_attention_norm/scale": "blk.{layer}.attn_norm.weight",
    "layers/attention/query": "blk.{layer}.attn_q.weight",
    "layers/attention/key": "blk.{layer}.attn_k.weight",
    "layers/attention/value": "blk.{layer}.attn_v.weight",
    "layers/attention/out": "blk.{layer}.attn_output.weight",
    "layers/pre_mlp_norm/scale": "blk.{layer}.ffn_norm.weight",
    "layers/mlp/gate": "blk.{layer}.ffn_gate.weight",
    "layers/mlp/up": "blk.{layer}.ffn_up.weight",
    "layers/mlp/down": "blk.{layer}.ffn_down.weight",
    "final_norm/scale": "output_norm.weight",
    "lm_head/kernel": "output.weight",
}
# What llama.cpp turns by position has its heads' rows in the order of interleaved pairs.
_TURNED = ("layers/attention/query", "layers/attention/key")


def load_gguf(
    path: str | Path, *, dtype: DTypeLike | None = None
) -> tuple[dict[str, Any], ModelConfig]:
    """The parameters and the configuration of a GGUF file.

    Needs the `gguf` package, which dequantizes: F32, F16, Q8_0, Q4_0, Q4_1 and what else it knows.

    Args:
        path: the file, or a directory that holds one.
        dtype: of the parameters; None is float32.

    Returns:
        Nested parameters as `Transformer` takes them, on the default device, and their
        configuration. Query and key are put into the half-split order of rotary positions.

    Raises:
        UserError: `gguf` is not installed, the file is damaged, it holds no model of the llama
            architecture, or the model cannot be expressed.
    """
    file = find_gguf(Path(path))
    # Not the tokenizer, whose many strings take a second to decode.
    reader, metadata = read_gguf(file, "general.", "llama.")
    gguf: Any = importlib.import_module("gguf")
    stored = {tensor.name: tensor for tensor in reader.tensors}
    config = _config(file, metadata, stored)
    _check_tensors(file, stored, config)

    def matrix(item: layout.Slice) -> np.ndarray:
        tensor = stored[_NAMES[item.path].format(layer=item.layer)]
        try:
            values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        except NotImplementedError as error:
            kind = tensor.tensor_type.name
            raise UserError(f"{file}: {tensor.name} is {kind}, which gguf cannot read") from error
        return _half_split(values, config.head_dim) if item.path in _TURNED else values

    target = arrays.FLOAT32 if dtype is None else arrays.float_dtype(dtype)
    params = {}
    for name, parameter in axes.parameters(config).items():
        leaf = arrays.empty(parameter.shape(config), arrays.FLOAT32)
        for layer in range(config.num_layers) if axes.LAYERS in parameter.axes else [None]:
            item = layout.Slice(name, layer)
            leaf[item.index] = layout.from_file(matrix(item), parameter, config)
        params[name] = jax.device_put(arrays.convert(leaf, target))
    return axes.unflatten(params), config


def find_gguf(path: Path) -> Path:
    """The GGUF file that `path` is, or the one in it.

    Raises:
        UserError: there is none, or there are several.
    """
    if not path.is_dir():
        if not path.is_file():
            raise UserError(f"there is no file {path}")
        return path
    found = sorted(path.glob("*.gguf"))
    if len(found) != 1:
        names = ", ".join(file.name for file in found) or "none"
        raise UserError(f"{path} must hold one .gguf file, not {names}; name the file itself")
    return found[0]


def _config(file: Path, metadata: Mapping[str, Any], stored: Mapping[str, Any]) -> ModelConfig:
    """The architecture, from the metadata of a file and the names of its tensors."""
    architecture = metadata.get("general.architecture")
    if architecture != "llama":
        raise UserError(f"{file} holds a model of {architecture!r}; only llama is read from GGUF")

    def read(key: str, default: Any = None) -> Any:
        value = metadata.get(f"llama.{key}", default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise UserError(f"{file}: llama.{key} must be one number, not {value!r}")
        # Stored in single precision: what was meant is the shortest number that rounds to it.
        return value if isinstance(value, int) else float(str(np.float32(value)))

    width, heads = read("embedding_length"), read("attention.head_count")
    head_dim = read("attention.key_length", width // max(heads, 1))
    if turned := {read("rope.dimension_count", head_dim), head_dim} - {head_dim}:
        raise UserError(f"{file}: only {turned.pop()} of {head_dim} channels of a head turn")
    if read("attention.value_length", head_dim) != head_dim:
        raise UserError(f"{file}: values are not as wide as keys, which is not supported")
    scaling = metadata.get("llama.rope.scaling.type", "none")
    if scaling != "none" or "rope_freqs.weight" in stored:
        raise UserError(f"{file}: scaled rotary positions ({scaling}) are not supported yet")
    if read("expert_count", 0):
        raise UserError(f"{file}: mixtures of experts are not read from GGUF yet")
    try:
        return ModelConfig(
            vocab_size=read(
                "vocab_size", _num_rows(stored.get(_NAMES["token_embedder/embedding"]))
            ),
            embed_dim=width,
            num_layers=read("block_count"),
            num_heads=heads,
            num_kv_heads=read("attention.head_count_kv", heads),
            head_dim=head_dim,
            mlp_dim=read("feed_forward_length"),
            context_length=read("context_length"),
            rope_theta=float(read("rope.freq_base", 1e4)),
            norm_eps=read("attention.layer_norm_rms_epsilon"),
            qkv_bias=False,
            tie_embeddings=_NAMES["lm_head/kernel"] not in stored,
        )
    except UserError as error:
        raise UserError(f"{file}: {error}") from error


def _check_tensors(file: Path, stored: Mapping[str, Any], config: ModelConfig) -> None:
    """Names and shapes are those of the configuration."""
    parameters = axes.parameters(config)
    expected = {
        _NAMES[item.path].format(layer=item.layer): layout.file_shape(parameters[item.path], config)
        for item in layout.slices(config).values()
    }
    # GGUF lists a shape's fastest dimension first.
    found = {name: tuple(int(n) for n in tensor.shape)[::-1] for name, tensor in stored.items()}
    layout.check_names_and_shapes(str(file), expected, found)


def _num_rows(tensor: Any) -> int:
    return 0 if tensor is None else int(tensor.shape[-1])


def _half_split(rows: np.ndarray, head_dim: int) -> np.ndarray:
    """Rows of heads from the order of interleaved pairs (0, h, 1, h + 1, ...) to two halves."""
    pairs = rows.reshape(-1, head_dim // 2, 2, rows.shape[-1])
    return pairs.swapaxes(1, 2).reshape(rows.shape)
