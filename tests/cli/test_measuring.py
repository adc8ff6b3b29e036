"""What `aquila eval` and `aquila compare` are given to measure on."""

import json

import pytest

from aquila_jax import cli
from aquila_jax.cli.command import load_model
from aquila_jax.evaluation.scoring import Scorer


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


def test_eval_of_a_seqio_task_scores_what_follows_its_inputs(capsys, models, monkeypatch, table):
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
    _, row = table("eval", "one", *flags)
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
