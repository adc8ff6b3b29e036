"""`aquila data prepare`: own text with a model's own tokenizer, and what cannot be prepared."""

import json

import pytest

from aquila_jax import cli
from aquila_jax.data import TokenCache, open_tokenizer


def test_own_text_becomes_rows_of_the_models_ids(models, capsys):
    # As many documents as some are held out of.
    rows = (json.dumps({"text": f"A LINE OF TEXT {'AB' * number}."}) for number in range(60))
    (models / "rows.jsonl").write_text("\n".join(rows))
    flags = ["--tokenizer_path", "one", "--vocab_size", "31", "--sequence_length", "16"]
    prepare = ["data", "prepare", "--to", "cache", "--source", "web=en:rows.jsonl", *flags]
    assert cli.main(prepare) == 0
    assert "rows of 16 tokens; cache" in capsys.readouterr().out
    batch = next(TokenCache("cache", batch_size=1).train_batches())
    known = set(open_tokenizer("one").encode("A LINE OF TEXT B.")) | {0}
    assert set(batch["targets"].ravel().tolist()) <= known


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--source", "text.txt"], "--source takes NAME=LANGUAGE:PATTERN"),
        (["--source", "web=en:absent/*.txt"], "no file matches"),
        (["--text_dir", "absent"], "absent"),
        # Before a tokenizer is trained.
        (["--source", "web=en:text.txt", "--to", "one"], "one exists; remove it, or write to"),
    ],
)
def test_mistakes_are_one_line(arguments, says, models, refused):
    assert says in refused("data", "prepare", "--to", "cache", *arguments)
