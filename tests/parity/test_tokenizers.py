"""Ids equal those of PyTorch's transformers for tokenizers of pretrained models.

Runs where transformers is installed: `make test-parity`.
"""

import json

import pytest

from aquila_jax.data import load_vocabulary
from aquila_jax.data.pretrained_tokenizer import open_tokenizer
from aquila_jax.errors import UserError

from ..data import sentencepieces

REASON = "needs transformers: run `make test-parity`"
transformers = pytest.importorskip("transformers", reason=REASON)
tokenizers = pytest.importorskip("tokenizers", reason=REASON)

pytestmark = pytest.mark.parity

TEXTS = [
    "",
    "The quick brown fox, 1234567890.",
    "  two spaces,\n\na tab\t and an end  ",
    "模型长大了，损失不变。",
    "def grow(x):\n    return x @ W.T  # 增长\n",
    "🦅🏔️ eagle 👩‍🔬",
    "<|im_start|>user\nhi<|im_end|>",
    "a<|endoftext|>b",
    "e\u0301 \u00e9 \u2581 \u200b",
]
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


@pytest.fixture
def byte_level(tmp_path):
    """A byte-level BPE in the form of Qwen2's and SmolLM2's."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=SPECIAL,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(TEXTS * 3, trainer)
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=SPECIAL[0],
        pad_token=SPECIAL[2],
        additional_special_tokens=[SPECIAL[1]],
    )
    fast.save_pretrained(tmp_path)
    return tmp_path, fast


@pytest.mark.parametrize("text", TEXTS)
def test_a_json_tokenizer_gives_the_ids_of_transformers(byte_level, text):
    path, theirs = byte_level
    ours = open_tokenizer(path)
    ids = theirs.encode(text, add_special_tokens=False)
    assert ours.encode(text) == ids
    assert ours.decode(ids) == text


@pytest.mark.parametrize("text", [*TEXTS, *SPECIAL, "".join(SPECIAL)])
def test_seqios_vocabulary_gives_the_ids_of_transformers(byte_level, text):
    path, theirs = byte_level
    vocabulary = load_vocabulary(path)
    ids = theirs.encode(text, add_special_tokens=False)
    assert list(vocabulary.encode(text)) == ids
    assert vocabulary.encode_tf(text).numpy().tolist() == ids
    end = ids.index(theirs.eos_token_id) + 1 if theirs.eos_token_id in ids else len(ids)
    assert vocabulary.decode(ids) == theirs.decode(ids[:end])


def test_its_special_ids_are_those_of_transformers(byte_level):
    path, theirs = byte_level
    ours = open_tokenizer(path)
    for token in SPECIAL:
        assert ours.encode(token) == [theirs.convert_tokens_to_ids(token)]
    assert (ours.eos_id, ours.bos_id, ours.pad_id) == (
        theirs.eos_token_id,
        None,
        theirs.pad_token_id,
    )
    assert ours.num_ids == len(theirs)


def test_a_token_file_without_an_end_or_with_another_models_ids_is_refused(byte_level):
    path, _ = byte_level
    config = path / "tokenizer_config.json"
    said = json.loads(config.read_text())
    said["added_tokens_decoder"] = {"5": {"content": SPECIAL[1], "special": True}}
    config.write_text(json.dumps(said))
    with pytest.raises(UserError, match="they are of two models"):
        open_tokenizer(path)
    config.unlink()
    (path / "special_tokens_map.json").unlink(missing_ok=True)
    with pytest.raises(UserError, match="nothing says which token"):
        open_tokenizer(path)
    (path / "tokenizer.json").write_text('{"model": ')
    with pytest.raises(UserError, match=r"no whole tokenizer\.json"):
        open_tokenizer(path)


@pytest.fixture(scope="module")
def pieces(tmp_path_factory):
    """A sentencepiece model in the form of Llama 2's, with what lies beside it."""
    path = tmp_path_factory.mktemp("pieces")
    lines = [text for text in TEXTS if text] * 20
    model = sentencepieces.train(lines, 400, hard_vocab_limit=False)
    (path / "tokenizer.model").write_bytes(model)
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    config = {"tokenizer_class": "LlamaTokenizer", "legacy": False, **special}
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    return path, transformers.AutoTokenizer.from_pretrained(path)


# Of a text that begins with spaces transformers drops one, which sentencepiece itself keeps.
@pytest.mark.parametrize(
    "text",
    [text for text in TEXTS if not text.startswith(" ")]
    + ["<s>the fox</s>", "</s>", "x<unk>y", "<s>", "a<s> b"],
)
def test_a_sentencepiece_model_gives_the_ids_of_transformers(pieces, text):
    path, theirs = pieces
    ours = open_tokenizer(path)
    ids = theirs.encode(text, add_special_tokens=False)
    assert ours.encode(text) == ids
    assert list(load_vocabulary(path).encode(text)) == ids
    assert (ours.bos_id, ours.eos_id) == (theirs.bos_token_id, theirs.eos_token_id)
