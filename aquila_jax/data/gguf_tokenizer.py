"""The tokenizer inside a GGUF file, written as the `tokenizer.json` that it stands for."""

import json
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from aquila_jax.errors import UserError
from aquila_jax.files import json_bytes

GGUF = ".gguf"
_PREFIX = "tokenizer.ggml."
_TEMPLATE = "tokenizer.chat_template"
# llama.cpp's kinds of tokens that are found in a text before it is cut into pieces.
_CONTROL, _USER_DEFINED = 3, 4

_DIGITS = {"type": "Digits", "individual_digits": True}
_BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}


def _split(most_digits: str) -> list[Mapping[str, Any]]:
    """The rule by which Llama 3 and Qwen 2 cut texts, which differ in how many digits stay."""
    pattern = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + most_digits +
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )  # fmt: skip
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated"}
    return [{**split, "invert": False}, {**_BYTES, "use_regex": False}]


# How texts are cut before pairs are joined, by llama.cpp's name for it.
_CUTS: Mapping[str, list[Mapping[str, Any]]] = types.MappingProxyType(
    {
        "gpt-2": [{**_BYTES, "use_regex": True}],
        "smollm": [_DIGITS, {**_BYTES, "use_regex": True}],
        "llama-bpe": _split("{1,3}"),
        "qwen2": _split(""),
    }
)
_COMPOSED = ("qwen2",)


def read_gguf(file: Path, *prefixes: str) -> tuple[Any, dict[str, Any]]:
    """A GGUF file, opened: its `gguf.GGUFReader`, and what it says under names that begin so.

    Raises:
        UserError: `gguf` is not installed, or the file is damaged.
    """
    try:
        import gguf
    except ImportError as error:
        raise UserError(
            "reading GGUF files needs the gguf package: pip install 'aquila-jax[gguf]'"
        ) from error
    try:
        reader = gguf.GGUFReader(file)
        fields = {
            name: field.contents()
            for name, field in reader.fields.items()
            if name.startswith(prefixes)
        }
    except (OSError, ValueError, IndexError, KeyError, UnicodeDecodeError) as error:
        raise UserError(f"{file} is no whole GGUF file ({error}); fetch it again") from error
    return reader, fields


def read_metadata(file: Path) -> dict[str, Any]:
    """What a GGUF file says of its tokenizer, by name, with the chat template.

    Raises:
        UserError: as `read_gguf`.
    """
    return read_gguf(file, _PREFIX, _TEMPLATE)[1]


def read_chat_settings(file: Path) -> dict[str, Any]:
    """The special tokens and the `chat_template` of a GGUF file; errors as `read_metadata`."""
    return _settings(read_metadata(file))


def _settings(said: Mapping[str, Any]) -> dict[str, Any]:
    tokens = said.get(f"{_PREFIX}tokens", [])
    values = {name.removeprefix(_PREFIX): value for name, value in said.items()}
    settings: dict[str, Any] = {
        f"{name}_token": tokens[values[key]]
        for name, key in (
            ("bos", "bos_token_id"), ("eos", "eos_token_id"),
            ("unk", "unknown_token_id"), ("pad", "padding_token_id"),
        )
        if 0 <= values.get(key, -1) < len(tokens)
    }  # fmt: skip
    if isinstance(template := said.get(_TEMPLATE), str):
        settings["chat_template"] = template
    return settings


def as_tokenizer_json(file: Path) -> tuple[bytes, dict[str, Any]]:
    """A GGUF file's byte pairs as a `tokenizer.json` and the `tokenizer_config.json` beside it.

    Args:
        file: the GGUF file.

    Returns:
        The bytes of the first, and the values of the second: its special tokens by name and
        `chat_template` where there is one.

    Raises:
        UserError: `gguf` is not installed, the file is damaged, or its tokenizer is of a kind
            that is not read.

    References:
        https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
    """
    said = read_metadata(file)
    values = {name.removeprefix(_PREFIX): value for name, value in said.items()}
    model, cut = values.get("model"), values.get("pre", "gpt-2")
    if model != "gpt2" or cut not in _CUTS:
        raise UserError(
            f"{file} has a tokenizer of kind {model!r}, cut {cut!r}; of GGUF files byte pairs are "
            f"read, cut {', '.join(_CUTS)}: put the model's tokenizer.json beside it"
        )
    tokens, kinds = values.get("tokens", []), values.get("token_type", [])
    merges = [merge.split(" ", 1) for merge in values.get("merges", [])]
    if not tokens or not merges or len(kinds) != len(tokens):
        raise UserError(f"{file} has no whole tokenizer: put the model's tokenizer.json beside it")
    added = [
        _added(i, token, special=kind == _CONTROL)
        for i, (token, kind) in enumerate(zip(tokens, kinds, strict=True))
        if kind in (_CONTROL, _USER_DEFINED)
    ]
    content = {
        "version": "1.0",
        "added_tokens": added,
        "normalizer": {"type": "NFC"} if cut in _COMPOSED else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": _CUTS[cut]},
        "post_processor": None,
        "decoder": {**_BYTES, "use_regex": True},
        "model": {
            "type": "BPE",
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": merges,
        },
    }
    return json.dumps(content).encode(), _settings(said)


def as_files(file: Path) -> dict[str, bytes]:
    """The tokenizer and chat template of a GGUF file as the files of a Hugging Face directory.

    Returns:
        Contents by name: `tokenizer.json`, `tokenizer_config.json`, and `generation_config.json`
        with the ids that begin, end and pad a text.

    Raises:
        UserError: as `as_tokenizer_json`.
    """
    tokenizer, settings = as_tokenizer_json(file)
    vocabulary = json.loads(tokenizer)["model"]["vocab"]
    names = [name for name in settings if name in ("bos_token", "eos_token", "pad_token")]
    ids = {f"{name}_id": vocabulary[settings[name]] for name in names}
    return {
        "tokenizer.json": tokenizer,
        "tokenizer_config.json": json_bytes(
            {"tokenizer_class": "PreTrainedTokenizerFast", **settings}
        ),
        "generation_config.json": json_bytes(ids),
    }


def _added(number: int, content: str, *, special: bool) -> dict[str, Any]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {"id": number, "content": content, **flags, "special": special}
