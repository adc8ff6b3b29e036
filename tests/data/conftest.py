"""A text directory like the real one, but small: random words, so that no two lines are equal."""

import json
import random
from pathlib import Path

import pytest
import tokenizers

from aquila_jax.data import TextData

from .small_text import write_laws, write_speeches

TEMPLATE = (
    "{% for m in messages %}{{ m.role[0] | upper }}: {{ m.content }}{{ eos_token }}\n"
    "{% endfor %}{% if add_generation_prompt %}A: {% endif %}"
)
REAL_TEXT = Path(__file__).parents[2] / "data" / "text"
LETTERS = "abcdefghijklmnopqrstuvwxyz"
CHARACTERS = "法律国家人民权利义务规定应当依照机关工作管理责任公司合同财产行政处罚"


@pytest.fixture(scope="session")
def text_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rng = random.Random(0)
    folder = tmp_path_factory.mktemp("text")

    def line(alphabet: str, words: int, longest: int, between: str) -> str:
        sizes = [rng.randint(1, longest) for _ in range(words)]
        return between.join("".join(rng.choices(alphabet, k=size)) for size in sizes)

    def english() -> str:
        return "\n\n".join(line(LETTERS, rng.randint(5, 25), 8, " ") for _ in range(3))

    def chinese() -> list[str]:
        return [line(CHARACTERS, rng.randint(2, 5), 8, "、") for _ in range(6)]

    write_speeches(folder, {f"{1800 + i}-Nobody-1": english() for i in range(60)})
    write_laws(folder, [(f"{i:04x}", f"第{i}号法", chinese()) for i in range(60)])
    return folder


@pytest.fixture(scope="session")
def text_data(text_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> TextData:
    """Prepared: its tokenizer exists."""
    data = TextData(
        text_dir=str(text_dir),
        tokenizer_path=str(tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"),
        vocab_size=400,
        sequence_length=32,
        batch_size=4,
        shuffle_buffer=64,
    )
    data.prepare()
    return data


@pytest.fixture(scope="session")
def real_text_dir() -> str:
    if not (REAL_TEXT / "installed").exists():
        pytest.skip(f"no text packages under {REAL_TEXT}: run `make data/text/installed`")
    return str(REAL_TEXT)


@pytest.fixture(scope="session")
def chatty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a tokenizer of single letters and a chat template."""
    path = tmp_path_factory.mktemp("chatty")
    letters = [*map(chr, range(ord("A"), ord("Z") + 1)), " ", "\n", ":", "?"]
    vocabulary = {"<end>": 0, **{letter: i for i, letter in enumerate(letters, start=1)}}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
    tokenizer.add_special_tokens(["<end>"])
    tokenizer.decoder = tokenizers.decoders.Fuse()
    tokenizer.save(str(path / "tokenizer.json"))
    settings = {"eos_token": "<end>", "chat_template": TEMPLATE}
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    return path
