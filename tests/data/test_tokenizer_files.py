import json

import pytest
import tokenizers

from aquila_jax.data import TokenCache, open_tokenizer, prepare_cache
from aquila_jax.data.chat import open_chat_template
from aquila_jax.data.pretrained_tokenizer import TOKENIZER_DIR
from aquila_jax.data.tokenizer_files import tokenizer_files, write_tokenizer
from aquila_jax.errors import UserError

END, PAD = "<end>", "<pad>"
SETTINGS = {"eos_token": END, "pad_token": PAD, "chat_template": "{{ messages[-1].content }}?"}


def save_words(path, beside):
    """A tokenizer.json of a few words, and JSON files beside it."""
    vocabulary = {word: i for i, word in enumerate((PAD, END, "a", "b"))}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
    tokenizer.add_special_tokens([PAD, END])
    path.mkdir()
    tokenizer.save(str(path / "tokenizer.json"))
    for name, content in beside.items():
        (path / name).write_text(json.dumps(content))


@pytest.mark.parametrize(
    "beside",
    [
        {"tokenizer_config.json": SETTINGS},
        {"special_tokens_map.json": {"eos_token": {"content": END}, "pad_token": PAD}},
        {"generation_config.json": {"eos_token_id": [1, 3]}},
        {"config.json": {"eos_token_id": 3, "pad_token_id": 0, "hidden_size": 8}},
    ],
    ids=lambda beside: next(iter(beside)),
)
def test_a_copy_is_the_same_tokenizer(tmp_path, beside):
    save_words(tmp_path / "model", beside)
    write_tokenizer(tmp_path / "run" / TOKENIZER_DIR, tokenizer_files(tmp_path / "model"))
    ours, copied = open_tokenizer(tmp_path / "model"), open_tokenizer(tmp_path / "run")
    assert copied.digest == ours.digest
    special = ("eos_id", "bos_id", "pad_id", "unk_id", "num_ids")
    assert [getattr(copied, name) for name in special] == [getattr(ours, name) for name in special]
    assert copied.encode(f"ab{END}") == ours.encode(f"ab{END}")


def test_of_a_models_configuration_only_special_ids_are_kept(tmp_path):
    save_words(tmp_path / "model", {"config.json": {"eos_token_id": 3, "hidden_size": 8}})
    assert json.loads(tokenizer_files(tmp_path / "model")["config.json"]) == {"eos_token_id": 3}


def test_the_chat_template_goes_with_it(tmp_path):
    save_words(tmp_path / "model", {"tokenizer_config.json": SETTINGS})
    (tmp_path / "model" / "chat_template.jinja").write_text("{{ messages[0].content }}!")
    write_tokenizer(tmp_path / "run" / TOKENIZER_DIR, tokenizer_files(tmp_path / "model"))
    template = open_chat_template(tmp_path / "run")
    assert template.render([{"role": "user", "content": "a"}]) == "a!"


def test_a_cache_keeps_the_tokenizer_it_was_made_with(text_data, tmp_path):
    prepare_cache(text_data, tmp_path / "cache")
    cache = TokenCache(str(tmp_path / "cache"), batch_size=1)
    kept = open_tokenizer(cache.tokenizer_path)
    assert kept.digest == text_data.tokenizer.digest == cache.identity()["vocabulary"]
    assert kept.encode("word") == text_data.tokenizer.encode("word")


def test_what_is_no_tokenizer_is_refused_and_nothing_is_made_of_nothing(tmp_path):
    with pytest.raises(UserError, match="no tokenizer"):
        tokenizer_files(tmp_path)
    write_tokenizer(tmp_path / "empty", {})
    assert not (tmp_path / "empty").exists()
