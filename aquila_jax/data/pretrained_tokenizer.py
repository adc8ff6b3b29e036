"""Tokenizers that come with pretrained models: `tokenizer.json` and sentencepiece's `.model`.

Ids are those of the file, equal to what `transformers` gives without adding tokens of its own.
Nothing here imports TensorFlow.
"""

import functools
import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from aquila_jax.data.gguf_tokenizer import GGUF, as_tokenizer_json
from aquila_jax.errors import UserError, first_line

if TYPE_CHECKING:
    import sentencepiece
    import tokenizers

JSON_FILE = "tokenizer.json"
MODEL_FILE = "tokenizer.model"
# Of a MODEL_DIR or a token cache: the tokenizer it was made with.
TOKENIZER_DIR = "tokenizer"
# Where the directory of a pretrained model says which of its tokens begin, end and pad a text.
_SPECIAL_FILES = ("tokenizer_config.json", "special_tokens_map.json")
_ID_FILES = ("generation_config.json", "config.json")
# What a text's end is called, for a file with nothing beside it that says so.
_ENDS = ("</s>", "<|endoftext|>", "<|end_of_text|>", "<|im_end|>", "<eos>", "[EOS]")
# seqio's own: padding, end and unknown.
_SEQIO_IDS = (0, 1, 2)


class Tokenizer(Protocol):
    """What is asked of a tokenizer.

    Attributes:
        num_ids: ids lie below this.
        eos_id: ends a document.
        bos_id: begins one; None where the model was trained without.
        pad_id: fills a row; `eos_id` where the file has no padding.
        unk_id: for what cannot be spelled; None where everything can.
        is_seqios: whether ids 0, 1 and 2 are padding, end and unknown, and no text gives an id 0.
        digest: of what ids mean.
    """

    num_ids: int
    eos_id: int
    bos_id: int | None
    pad_id: int
    unk_id: int | None
    is_seqios: bool
    digest: str

    def encode(self, text: str) -> list[int]:
        """The ids of a text, special tokens in it included and none added."""
        ...

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids, special tokens written out."""
        ...


def open_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer of a pretrained model, or one that `TextData.prepare` trained.

    Args:
        path: a `tokenizer.json`, a sentencepiece model, a GGUF file with byte pairs, or a
            directory that holds one of them, itself or, as a MODEL_DIR, in `tokenizer/`. Which
            tokens are special is read from the files beside it, too, or from the GGUF file.

    Raises:
        UserError: there is none, it is damaged, nothing says which token ends a text, or the
            package that reads it is not installed.

    References:
        https://huggingface.co/docs/tokenizers, https://github.com/google/sentencepiece
    """
    file = find_tokenizer(path)
    if file.suffix == GGUF:
        return _opened_gguf(file, file.stat().st_mtime_ns)
    beside = {
        name: (file.parent / name).read_bytes()
        for name in (*_SPECIAL_FILES, *_ID_FILES)
        if (file.parent / name).is_file()
    }
    return _opened(file, file.read_bytes(), tuple(beside.items()))


def beginning_id(tokenizer: Tokenizer) -> int:
    """What a pretrained model reads before a text: its begin token, else the end of another."""
    return tokenizer.eos_id if tokenizer.bos_id is None else tokenizer.bos_id


def start_id(tokenizer: Tokenizer) -> int:
    """What is before a text in training: padding in seqio, else as `beginning_id`."""
    return tokenizer.pad_id if tokenizer.is_seqios else beginning_id(tokenizer)


def check_vocab_size(tokenizer: Tokenizer, vocab_size: int) -> None:
    """A model of `vocab_size` embeddings has one for every id.

    Raises:
        UserError: the tokenizer has more ids.
    """
    if tokenizer.num_ids > vocab_size:
        raise UserError(
            f"the tokenizer has {tokenizer.num_ids} ids and the model {vocab_size}: they are of "
            "two models"
        )


def find_tokenizer(path: str | Path) -> Path:
    """The file of a tokenizer: the path itself, or what a directory holds.

    Raises:
        UserError: there is none, or a directory holds several.
    """
    path = Path(path)
    if not path.is_dir():
        if not path.is_file():
            raise UserError(
                f"no tokenizer at {path}: name one that is there, or call TextData.prepare()"
            )
        return path
    for folder in (path, path / TOKENIZER_DIR):
        for name in (JSON_FILE, MODEL_FILE):
            if (folder / name).is_file():
                return folder / name
    found = sorted(path.glob("*.model")) or sorted(path.glob(f"*{GGUF}"))
    if len(found) != 1:
        names = ", ".join(file.name for file in found) or "none"
        raise UserError(
            f"{path} holds no {JSON_FILE}, and of sentencepiece models and GGUF files {names}: "
            "name the file"
        )
    return found[0]


@functools.lru_cache(maxsize=4)
def _opened(file: Path, content: bytes, beside: tuple[tuple[str, bytes], ...]) -> Tokenizer:
    said = {name: _json_object(file.parent / name, text) for name, text in beside}
    kind = JsonTokenizer if file.suffix == ".json" else SentencePieceTokenizer
    return kind(file, content, said)


@functools.lru_cache(maxsize=4)
def _opened_gguf(file: Path, modified: int) -> Tokenizer:
    del modified  # of a file that was written anew, the tokenizer is read anew
    content, config = as_tokenizer_json(file)
    return JsonTokenizer(file, content, {_SPECIAL_FILES[0]: config})


class JsonTokenizer:
    """A `tokenizer.json`, read by the `tokenizers` package; a `Tokenizer`.

    Args:
        file: for messages.
        content: of the file.
        said: the JSON objects of the files beside it, by name.

    Raises:
        UserError: as `open_tokenizer`.
    """

    is_seqios = False

    def __init__(self, file: Path, content: bytes, said: Mapping[str, Mapping[str, Any]]) -> None:
        try:
            import tokenizers
        except ImportError as error:
            raise UserError(
                f"reading {file} needs the tokenizers package: pip install 'aquila-jax[data]'"
            ) from error
        try:
            self._tokenizer = tokenizers.Tokenizer.from_buffer(content)
        except Exception as error:  # the package raises plain Exception
            raise UserError(
                f"{file} is no whole tokenizer.json ({first_line(error)}); fetch it again"
            ) from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        _add_tokens(file, self._tokenizer, said.get(_SPECIAL_FILES[0], {}))
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        self.num_ids = max(vocabulary.values(), default=-1) + 1
        special = _SpecialTokens(said, vocabulary)
        added = [token.content for token in self._tokenizer.get_added_tokens_decoder().values()]
        ends = [vocabulary[name] for name in _ENDS if name in added]
        self.eos_id = _checked_end(file, special.get("eos"), ends)
        self.bos_id = special.get("bos")
        pad = special.get("pad")
        self.pad_id = self.eos_id if pad is None else pad
        self.unk_id = special.get("unk")
        self.digest = _digest(content, self)

    def encode(self, text: str) -> list[int]:
        """The ids of a text, special tokens in it included and none added."""
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids, special tokens written out."""
        return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=False)


class SentencePieceTokenizer:
    """A sentencepiece model; a `Tokenizer`.

    Special tokens written in a text become their ids, as with other tokenizers of pretrained
    models, but in models with seqio's ids, of which this library's own are: these spell them.

    Args:
        file: for messages.
        content: of the file.
        said: the JSON objects of the files beside it, by name.

    Raises:
        UserError: as `open_tokenizer`.
    """

    def __init__(self, file: Path, content: bytes, said: Mapping[str, Mapping[str, Any]]) -> None:
        import sentencepiece

        try:
            self._model = model = sentencepiece.SentencePieceProcessor(model_proto=content)
        except RuntimeError as error:
            raise UserError(f"{file} is no sentencepiece model; name another file") from error
        self.num_ids = model.GetPieceSize()
        self.is_seqios = (model.pad_id(), model.eos_id(), model.unk_id()) == _SEQIO_IDS
        pieces = {model.IdToPiece(i): i for i in range(self.num_ids) if _is_special(model, i)}
        special = _SpecialTokens(said, {**_added(file, said, self.num_ids), **pieces})
        own = {"eos": model.eos_id(), "bos": model.bos_id(), "pad": model.pad_id()}
        found = {name: special.get(name, own[name]) for name in own}
        self.eos_id = _checked_end(file, found["eos"], [])
        self.bos_id = found["bos"]
        self.pad_id: int = self.eos_id if found["pad"] is None else found["pad"]
        self.unk_id: int | None = model.unk_id()
        self._special = {} if self.is_seqios else special.tokens
        self.num_ids = max([self.num_ids, *(i + 1 for i in self._special.values())])
        self._without_prefix = _without_prefix(content) if self._special else model
        self._names = {i: name for name, i in self._special.items()}
        self.digest = _digest(content, self)

    def encode(self, text: str) -> list[int]:
        """The ids of a text, special tokens in it included and none added."""
        if not self._special:
            return self._model.EncodeAsIds(text)
        ids: list[int] = []
        longest_first = sorted(self._special, key=len, reverse=True)
        for number, part in enumerate(
            re.split(f"({'|'.join(map(re.escape, longest_first))})", text)
        ):
            if part in self._special:
                ids.append(self._special[part])
            elif part:
                # Only what begins a text has the space that words have before them.
                ids += (self._without_prefix if number else self._model).EncodeAsIds(part)
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids, special tokens written out."""
        text, run = "", []
        for i in map(int, ids):
            if i in self._names:
                text += self._decode_run(run, is_first=not text) + self._names[i]
                run = []
            else:
                run.append(i)
        return text + self._decode_run(run, is_first=not text)

    def _decode_run(self, run: list[int], *, is_first: bool) -> str:
        return (self._model if is_first else self._without_prefix).DecodeIds(run) if run else ""


class _SpecialTokens:
    """Which ids the files of a pretrained model give to special tokens.

    Attributes:
        tokens: all that are special, by their text.
    """

    def __init__(self, said: Mapping[str, Mapping[str, Any]], tokens: Mapping[str, int]) -> None:
        self._said = said
        self.tokens = tokens

    def get(self, name: str, default: int | None = None) -> int | None:
        """The id of "bos", "eos", "pad" or "unk"; None where there is none."""
        for file in _SPECIAL_FILES:
            token = self._said.get(file, {}).get(f"{name}_token")
            token = token.get("content") if isinstance(token, dict) else token
            if isinstance(token, str) and token in self.tokens:
                return self.tokens[token]
        for file in _ID_FILES:
            number = self._said.get(file, {}).get(f"{name}_token_id")
            number = number[0] if isinstance(number, list) and number else number
            if type(number) is int and number in self.tokens.values():
                return number
        return None if default is None or default < 0 else default


def _checked_end(file: Path, said: int | None, by_name: Sequence[int]) -> int:
    """The id that ends a text: what is said, or the only one with a usual name."""
    if said is not None:
        return said
    if len(by_name) == 1:
        return by_name[0]
    raise UserError(
        f"nothing says which token of {file} ends a text: put a tokenizer_config.json with an "
        "eos_token beside it"
    )


def _add_tokens(file: Path, tokenizer: "tokenizers.Tokenizer", config: Mapping[str, Any]) -> None:
    """Tokens that only the configuration beside a tokenizer.json lists."""
    import tokenizers

    listed = config.get("added_tokens_decoder") or {}
    for number, entry in sorted(listed.items(), key=lambda item: int(item[0])):
        if tokenizer.token_to_id(entry["content"]) is None:
            flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
            token = tokenizers.AddedToken(
                entry["content"], **{flag: entry[flag] for flag in flags if flag in entry}
            )
            tokenizer.add_tokens([token])
        if (found := tokenizer.token_to_id(entry["content"])) != int(number):
            raise UserError(
                f"{file} gives {entry['content']!r} the id {found}, and tokenizer_config.json "
                f"{number}: they are of two models"
            )


def _added(file: Path, said: Mapping[str, Mapping[str, Any]], num_ids: int) -> dict[str, int]:
    """Tokens that a sentencepiece model's configuration adds to it."""
    listed = said.get(_SPECIAL_FILES[0], {}).get("added_tokens_decoder") or {}
    tokens = {entry["content"]: int(number) for number, entry in listed.items()}
    beyond = sorted(number for number in tokens.values() if number >= num_ids)
    if beyond != list(range(num_ids, num_ids + len(beyond))):
        raise UserError(f"tokenizer_config.json beside {file} adds ids {beyond} to {num_ids}")
    return tokens


def _is_special(model: "sentencepiece.SentencePieceProcessor", i: int) -> bool:
    return model.IsControl(i) or model.IsUnknown(i)


def _without_prefix(content: bytes) -> "sentencepiece.SentencePieceProcessor":
    """The model, without a space before what it is given."""
    import sentencepiece
    from sentencepiece import sentencepiece_model_pb2 as protocol

    made = protocol.ModelProto  # pyright: ignore[reportAttributeAccessIssue] - made at run time
    model = made.FromString(content)
    model.normalizer_spec.add_dummy_prefix = False
    return sentencepiece.SentencePieceProcessor(model_proto=model.SerializeToString())


def _digest(content: bytes, tokenizer: Tokenizer) -> str:
    """Of what ids mean: the file, and, where seqio does not fix them, the special ones."""
    if not tokenizer.is_seqios:
        ids = (tokenizer.num_ids, tokenizer.eos_id, tokenizer.bos_id, tokenizer.pad_id)
        content += repr(ids).encode()
    return hashlib.sha256(content).hexdigest()[:16]


def _json_object(path: Path, text: bytes) -> Mapping[str, Any]:
    try:
        values = json.loads(text)
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}); fetch it again") from error
    if not isinstance(values, dict):
        raise UserError(f"{path} must hold a JSON object, not {type(values).__name__}")
    return values
