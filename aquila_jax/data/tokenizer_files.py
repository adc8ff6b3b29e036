"""The files of a tokenizer, to be kept beside a model that was trained with it."""

import json
from collections.abc import Mapping
from pathlib import Path

from aquila_jax.data.gguf_tokenizer import GGUF, as_files
from aquila_jax.data.pretrained_tokenizer import JSON_FILE, MODEL_FILE, find_tokenizer
from aquila_jax.files import json_bytes, write_bytes

# What says which tokens are special, and how messages of a chat are written out.
_BESIDE = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "generation_config.json",
    "chat_template.jinja",
)
_CONFIG = "config.json"
_IDS = ("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id")


def tokenizer_files(path: str | Path) -> dict[str, bytes]:
    """All that makes a tokenizer: a directory of these files is opened as the same one.

    Args:
        path: as `open_tokenizer` takes it.

    Returns:
        Contents by name. Of a model's `config.json` only the ids of special tokens.

    Raises:
        UserError: there is no tokenizer, or it is of a kind that is not read.
    """
    file = find_tokenizer(path)
    if file.suffix == GGUF:
        return as_files(file)
    found = {JSON_FILE if file.suffix == ".json" else MODEL_FILE: file.read_bytes()}
    for name in _BESIDE:
        if (file.parent / name).is_file():
            found[name] = (file.parent / name).read_bytes()
    if (file.parent / _CONFIG).is_file():
        said = json.loads((file.parent / _CONFIG).read_bytes())
        found[_CONFIG] = json_bytes({name: said[name] for name in _IDS if name in said})
    return found


def write_tokenizer(directory: Path, contents: Mapping[str, bytes]) -> None:
    """Put a tokenizer's files into a directory, which is made; where there are none, nothing is."""
    if not contents:
        return
    directory.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        write_bytes(directory / name, content)
