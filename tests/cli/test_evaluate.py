"""`aquila eval` of a model, and of what a run has left."""

import json
import math

import pytest

from aquila_jax import cli
from aquila_jax.data import TokenCache, open_tokenizer, write_cache
from aquila_jax.data.tokenizer_files import tokenizer_files
from aquila_jax.training import AdamW, Cosine, TrainRun, train


def test_eval_prints_texts_and_tasks(table, models):
    rows = table("eval", "one", "--text", "en=text.txt", "--task", "task.jsonl")
    assert rows[1][:3] == ["en", "4800", "4800"]
    assert 2 ** (float(rows[1][5])) == pytest.approx(float(rows[1][4]), rel=1e-3)
    assert rows[3][:2] == ["task", "3"]
    assert rows[3][2] in ("0.0000", "1.0000")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["eval"], "a MODEL, or a --gin_file"),
        (["eval", "one"], "nothing to measure on"),
        (["eval", "one", "--text", "a=text.txt", "--text", "a=text.txt"], "two files"),
        (["eval", "one", "--task", "absent.jsonl"], "data of a task is absent"),
        (["eval", "one", "--suite", "best"], "no suite 'best'"),
        (["eval", "one", "--task", "task.jsonl", "--ranking", "best"], "no ranking 'best'; there"),
        (["eval", "one", "--text", "blank.txt"], "blank.txt is empty"),
        (["eval", "one", "--text", "latin.txt"], "latin.txt is not UTF-8"),
        (["eval", "one", "--task", "latin.txt"], "latin.txt is not UTF-8"),
        (["eval", "one", "--text", "text.txt", "--stride", "40"], "between 1 and 32, not 40"),
        # A mistake in a task is found before the text is read by the model.
        (["eval", "one", "--text", "text.txt", "--task", "blank.txt"], "has no questions"),
        (["eval", "one", "--suite", "packaged", "--data", "x"], "no task of packaged has its"),
        (["eval", "one", "--task", "task.jsonl", "--mesh", "fast=2"], "--mesh names fast"),
    ],
)
def test_mistakes_are_one_line(arguments, says, models, refused):
    assert says in refused(*arguments)


def test_a_run_keeps_the_tokenizer_it_began_with(capsys, models, tiny, table):
    """From a model to a run, and on: none of the commands asks where the tokenizer is."""
    text = ("--text", "text.txt")
    assert cli.main(["convert", "--from", "one", "--to", "parent", "--to_checkpoint"]) == 0
    capsys.readouterr()
    expected = table("eval", "one", *text)
    assert table("eval", "parent", *text)[-1] == expected[-1]
    files = tokenizer_files("one")
    tokenizer = open_tokenizer("one")
    documents = [tokenizer.encode("A LINE OF TEXT.\n")] * 40
    write_cache(
        models / "cache",
        {("train", "en"): documents, ("validation", "en"): documents},
        sequence_length=16,
        vocab_size=tiny.vocab_size,
        vocabulary=tokenizer.digest,
        tokenizer=files,
    )
    run = TrainRun(
        model_dir="run", model=tiny, data=TokenCache("cache", batch_size=8), steps=1,
        eval_batches=1, init_from="parent", optimizer=AdamW(Cosine(peak=1e-3, warmup_steps=0)),
    )  # fmt: skip
    assert "not known" not in train_and_say(run, capsys)
    rows = [json.loads(line) for line in (models / "run/metrics.jsonl").read_text().splitlines()]
    last = [row for row in rows if row["split"] == "validation"][-1]
    # A letter is a token here, and a byte.
    assert last["bits_per_byte_en"] == pytest.approx(last["loss_en"] / math.log(2))
    assert len(table("eval", "run", *text)) == len(expected)
    assert cli.main(["convert", "--from", "run", "--to", "exported"]) == 0
    assert "warning" not in capsys.readouterr().err
    assert open_tokenizer("exported").digest == tokenizer.digest
    assert tokenizer_files("exported")["tokenizer_config.json"] == files["tokenizer_config.json"]


def train_and_say(run, capsys):
    train(run)
    printed = capsys.readouterr()
    return printed.out + printed.err
