import copy
import json

import pytest
import sentencepiece

from aquila_jax.data.pretrained_tokenizer import (
    beginning_id,
    check_vocab_size,
    open_tokenizer,
    start_id,
)
from aquila_jax.errors import UserError

from . import sentencepieces

LINES = [
    "the model grows and the loss stays",
    "模型长大了，损失不变",
    "def f(x): return x + 1",
] * 20
ADDED = "<|im_end|>"


@pytest.fixture(scope="module")
def model_bytes():
    return sentencepieces.train(LINES, 330)


@pytest.fixture
def llama(tmp_path, model_bytes):
    (tmp_path / "tokenizer.model").write_bytes(model_bytes)
    return tmp_path


@pytest.mark.parametrize("text", ["", *LINES[:3], "🦅 eagle", "  two spaces", "a\nb"])
def test_plain_text_has_the_models_own_ids_and_comes_back(llama, model_bytes, text):
    plain = sentencepiece.SentencePieceProcessor(model_proto=model_bytes)
    tokenizer = open_tokenizer(llama)
    assert tokenizer.encode(text) == plain.EncodeAsIds(text)
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_special_tokens_in_a_text_are_one_id_each(llama):
    config = {"eos_token": ADDED, "added_tokens_decoder": {"330": {"content": ADDED}}}
    (llama / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = open_tokenizer(llama)
    assert (tokenizer.num_ids, tokenizer.eos_id, tokenizer.bos_id) == (331, 330, 1)
    assert tokenizer.pad_id == tokenizer.eos_id
    ids = tokenizer.encode(f"<s>the model{ADDED}the loss</s>")
    assert [i for i in ids if i in (1, 2, 330)] == [1, 330, 2]
    assert tokenizer.decode(ids) == f"<s>the model{ADDED}the loss</s>"


def test_the_digest_tells_what_ids_mean(llama):
    before = open_tokenizer(llama).digest
    assert open_tokenizer(llama / "tokenizer.model").digest == before
    (llama / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<s>"}))
    assert open_tokenizer(llama).digest != before


def test_what_is_no_tokenizer_is_refused(llama, tmp_path):
    with pytest.raises(UserError, match="no tokenizer at"):
        open_tokenizer(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(
        UserError, match=r"holds no tokenizer\.json, and of sentencepiece models .* none"
    ):
        open_tokenizer(tmp_path / "empty")
    config = llama / "tokenizer_config.json"
    config.write_text("{")
    with pytest.raises(UserError, match="is not JSON"):
        open_tokenizer(llama)
    config.write_text(json.dumps({"added_tokens_decoder": {"400": {"content": ADDED}}}))
    with pytest.raises(UserError, match="adds ids"):
        open_tokenizer(llama)
    config.unlink()
    (llama / "tokenizer.model").write_bytes(b"nonsense")
    with pytest.raises(UserError, match="no sentencepiece model"):
        open_tokenizer(llama)


def test_a_text_begins_after_the_begin_token_or_the_end_of_another(llama):
    tokenizer = copy.copy(open_tokenizer(llama))
    assert beginning_id(tokenizer) == start_id(tokenizer) == tokenizer.bos_id == 1
    tokenizer.bos_id = None
    assert beginning_id(tokenizer) == start_id(tokenizer) == tokenizer.eos_id == 2


def test_every_id_needs_an_embedding(llama):
    tokenizer = open_tokenizer(llama)
    check_vocab_size(tokenizer, tokenizer.num_ids)
    with pytest.raises(UserError, match="has 330 ids and the model 329: they are of two models"):
        check_vocab_size(tokenizer, tokenizer.num_ids - 1)
