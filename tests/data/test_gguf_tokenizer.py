"""The tokenizer inside a GGUF file."""

import gguf
import pytest

from aquila_jax.data.pretrained_tokenizer import open_tokenizer
from aquila_jax.errors import UserError

from ..interop.byte_pairs import encode
from ..pretrained import MODEL

BYTES = [chr(0x100 + b if b <= 32 else 0x100 + b - 94 if b == 127 else b) for b in range(128)]
SPECIAL = ["<end>", "<user>"]
MERGES = ["t h", "th e", "Ġ the"]
TOKENS = [*SPECIAL, *BYTES, "th", "the", "Ġthe"]


def write_gguf(path, *, model="gpt2", cut="smollm", eos_id=0, kinds=None):
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model(model)
    writer.add_tokenizer_pre(cut)
    writer.add_token_list(TOKENS)
    writer.add_token_types(kinds or [3, 4, *[1] * (len(TOKENS) - 2)])
    writer.add_token_merges(MERGES)
    if eos_id is not None:
        writer.add_eos_token_id(eos_id)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


def test_pairs_are_joined_and_special_tokens_found(tmp_path):
    write_gguf(tmp_path / "model.gguf")
    tokenizer = open_tokenizer(tmp_path)
    text = "the the 12<user>th\n<end>"
    pieces = [TOKENS[i] for i in tokenizer.encode(text)]
    assert pieces == ["the", "Ġthe", "Ġ", "1", "2", "<user>", "th", "Ċ", "<end>"]
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert (tokenizer.eos_id, tokenizer.pad_id, tokenizer.bos_id) == (0, 0, None)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"model": "llama"}, "put the model's tokenizer.json beside it"),
        ({"cut": "strange"}, "'strange'"),
        ({"eos_id": None}, "which token"),
        ({"kinds": [3]}, "no whole tokenizer"),
    ],
)
def test_what_cannot_be_read_is_said(tmp_path, options, says):
    file = write_gguf(tmp_path / "model.gguf", **options)
    with pytest.raises(UserError, match=says):
        open_tokenizer(file)


def test_a_damaged_file_is_said(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"GGUF, but not really")
    with pytest.raises(UserError, match="no whole GGUF file"):
        open_tokenizer(tmp_path)


@pytest.mark.skipif(not MODEL.exists(), reason="run `make data/models/installed`")
def test_ids_of_a_pretrained_model_are_those_of_a_second_reading():
    fields = gguf.GGUFReader(MODEL).fields
    said = {name: fields[name].contents() for name in fields if name.startswith("tokenizer")}
    text = "It's 1984, isn't it?  \n\n\tdef f(x):\n    return x**2  # 'quoted' & so on\n" * 3
    assert open_tokenizer(MODEL).encode(text) == encode(text, said)
