"""lm-evaluation-harness gives our model what it gives its own `hf` model on the same weights.

Runs where torch, transformers and lm_eval are installed, and SmolLM2-135M: `make test-parity`.
"""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aquila_jax import cli, save_hf
from aquila_jax.data.chat import open_chat_template
from aquila_jax.data.gguf_tokenizer import as_tokenizer_json
from aquila_jax.data.pretrained_tokenizer import open_tokenizer
from aquila_jax.evaluation.generation import Generator
from aquila_jax.evaluation.harness import language_model
from aquila_jax.evaluation.scoring import Scorer
from aquila_jax.interop import load_gguf

from ..pretrained import MODEL

REASON = "needs torch, transformers and lm_eval: run `make test-parity`"
pytest.importorskip("torch", reason=REASON)
pytest.importorskip("transformers", reason=REASON)
lm_eval = pytest.importorskip("lm_eval", reason=REASON)
lm_eval_tasks = pytest.importorskip("lm_eval.tasks", reason=REASON)

pytestmark = [
    pytest.mark.parity,
    pytest.mark.skipif(not MODEL.exists(), reason="run `make data/models/installed`"),
]

# A context that the rolling text is longer than.
MAX_LENGTH = 128
QUESTIONS = [
    ("The capital of France is", [" Paris", " London", " a river in Africa"], 0),
    ("Water boils at a temperature of", [" 100 degrees Celsius", " 3 degrees"], 0),
    ("A triangle has", [" four sides.", " three sides.", " no sides"], 1),
    ("中国的首都是", ["北京", "上海"], 0),
    ("", ["The sky is blue.", "Sky the blue is."], 0),
    ("Ends with a space: ", ["yes", "no", "perhaps so, perhaps not"], 2),
    ("The state of our union is " * 40, ["strong", "a potato"], 0),
]
TASKS = {
    "choices": """
output_type: multiple_choice
doc_to_text: "{{context}}"
doc_to_choice: "{{choices}}"
doc_to_target: answer
target_delimiter: ""
metric_list: [{metric: acc}, {metric: acc_norm}]
""",
    "rolling": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: bits_per_byte}]
""",
    "continued": """
output_type: generate_until
doc_to_text: "{{context}}"
doc_to_target: "{{choices[answer]}}"
generation_kwargs: {until: [".", "\\n\\n"], max_gen_toks: 12, do_sample: false}
metric_list: [{metric: exact_match}]
""",
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """SmolLM2-135M and its tokenizer as a Hugging Face directory."""
    path = tmp_path_factory.mktemp("model")
    save_hf(*load_gguf(MODEL), path / "smollm2", dtype="float32")
    content, config = as_tokenizer_json(MODEL)
    (path / "smollm2" / "tokenizer.json").write_bytes(content)
    config = {**config, "tokenizer_class": "PreTrainedTokenizerFast"}
    (path / "smollm2" / "tokenizer_config.json").write_text(json.dumps(config))
    return path / "smollm2"


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """A folder of task files, with their data beside them."""
    folder = tmp_path_factory.mktemp("tasks")
    questions = [{"context": c, "choices": o, "answer": a} for c, o, a in QUESTIONS]
    prose = (Path(__file__).parents[2] / "docs" / "growth.md").read_text()
    texts = [{"text": prose[:length]} for length in (40, 300, 1500)]
    data = {"choices": questions, "rolling": texts, "continued": questions[:4]}
    for name, rows in data.items():
        (folder / f"{name}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
        source = f"dataset_kwargs: {{data_files: {{test: {folder / name}.jsonl}}}}"
        head = f"task: {name}\ndataset_path: json\n{source}\ntest_split: test"
        (folder / f"{name}.yaml").write_text(f"{head}{TASKS[name]}")
    return folder


class ExactScorer(Scorer):
    """Scores in float64.

    Of "Sky" after a text's start the model makes activations of thousands, which later layers take
    away again: in float32 the log-likelihood of what follows moves by up to 3e-3 with the order in
    which a CPU's matrix product adds, whatever else is equal.
    """

    def score(self, pairs):
        with jax.enable_x64(True):
            return super().score(pairs)


def exact_scorer(params, config, tokenizer):
    with jax.enable_x64(True):
        params = jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf, np.float64)), params)
    return ExactScorer(
        params, config, tokenizer, dtype=jnp.float64, batch_size=4, max_length=MAX_LENGTH
    )


@pytest.fixture(scope="module")
def evaluated(model, tasks, tmp_path_factory):
    """What the harness says of both models, in float64 both."""
    cache = tmp_path_factory.mktemp("cache")
    tokenizer = open_tokenizer(model)
    given = (*load_gguf(MODEL), tokenizer)
    ours = language_model(
        exact_scorer(*given),
        lambda: Generator(*given, batch_size=4),
        lambda: open_chat_template(model),
    )
    theirs = f"pretrained={model},max_length={MAX_LENGTH},dtype=float64"
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("HF_DATASETS_CACHE", str(cache))
        patched.setenv("HF_HUB_OFFLINE", "1")
        manager = lm_eval_tasks.TaskManager(include_path=str(tasks), include_defaults=False)
        return [
            lm_eval.simple_evaluate(
                model=name,
                model_args=arguments,
                tasks=[*TASKS],
                task_manager=manager,
                batch_size=4,
                device="cpu",
                log_samples=True,
                bootstrap_iters=0,
            )
            for name, arguments in ((ours, None), ("hf", theirs))
        ]


def answers(found, task):
    samples = sorted(found["samples"][task], key=lambda sample: sample["doc_id"])
    return [sample["filtered_resps"] for sample in samples]


def test_log_likelihoods_of_choices_and_their_ranks_are_equal(evaluated):
    ours, theirs = (answers(found, "choices") for found in evaluated)
    assert len(ours) == len(QUESTIONS)
    for mine, other in zip(ours, theirs, strict=True):
        assert [row[0] for row in mine] == pytest.approx([row[0] for row in other], abs=1e-3)
        assert [row[1] for row in mine] == [row[1] for row in other]
    assert evaluated[0]["results"]["choices"] == evaluated[1]["results"]["choices"]


def test_rolling_log_likelihoods_are_equal(evaluated):
    ours, theirs = (answers(found, "rolling") for found in evaluated)
    assert ours[2][0] < 2 * ours[1][0] < 0
    assert ours[:2] == [pytest.approx(other, abs=1e-3) for other in theirs[:2]]
    # Several windows, hundreds of nats, that both add up in float32.
    assert ours[2] == pytest.approx(theirs[2], rel=5e-6)


def test_generated_texts_are_equal(evaluated):
    ours, theirs = (answers(found, "continued") for found in evaluated)
    assert ours == theirs
    assert all(text for (text,) in ours)


def test_the_command_line_of_the_harness_knows_our_models(
    evaluated, model, tasks, tmp_path, monkeypatch
):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    arguments = f"pretrained={model},max_length={MAX_LENGTH}"
    asked = ["--tasks", "choices", "--include_path", str(tasks), "--batch_size", "4"]
    kept = ["--output_path", str(tmp_path / "out.json")]
    command = ["lm_eval", "--model", "aquila", "--model_args", arguments, *asked, *kept]
    assert cli.main(command) == 0
    (written,) = tmp_path.glob("**/out*.json")
    found = json.loads(written.read_text())["results"]["choices"]
    assert found["acc,none"] == evaluated[1]["results"]["choices"]["acc,none"]
    assert cli.main([*command[:4], f"{arguments},speed=9", *asked]) == 2
