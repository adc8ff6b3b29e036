"""Generated tokens equal those of PyTorch's transformers, for a pretrained model.

Runs where torch and transformers are installed, and SmolLM2-135M: `make test-parity`.
"""

import json
import os
import subprocess
import sys

import pytest

from aquila_jax import save_hf
from aquila_jax.data.pretrained_tokenizer import open_tokenizer
from aquila_jax.interop import load_gguf

from ..pretrained import MODEL

REASON = "needs torch and transformers: run `make test-parity`"
torch = pytest.importorskip("torch", reason=REASON)
transformers = pytest.importorskip("transformers", reason=REASON)

pytestmark = [
    pytest.mark.parity,
    pytest.mark.skipif(not MODEL.exists(), reason="run `make data/models/installed`"),
]

NEW = 128
PROMPTS = [
    "The capital of France is",
    "def fibonacci(n):\n",
    "Once upon a time, in a village far from the sea,",
    "Water boils at",
    "<|im_start|>user\nWhy is the sky blue?<|im_end|>\n<|im_start|>assistant\n",
    "1, 2, 3, 4,",
    "My fellow citizens, the state of our union",
    "中国的首都是",
    "To bake bread you need flour, water, salt and",
    "The three laws of motion are as follows. " * 4,
]

# In a process of its own: the compiler of the tests' process is told to hurry.
OURS = """
import json, sys
from aquila_jax.data.pretrained_tokenizer import open_tokenizer
from aquila_jax.evaluation.generation import Generator
from aquila_jax.interop import load_gguf
model, new, prompts = json.load(sys.stdin)
generator = Generator(*load_gguf(model), open_tokenizer(model), batch_size=5)
found = generator.generate(prompts, max_new_tokens=new, stop_at_eos=False)
print(json.dumps([completion.ids for completion in found]))
"""


def our_tokens() -> list[list[int]]:
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    done = subprocess.run(
        [sys.executable, "-c", OURS],
        input=json.dumps([str(MODEL), NEW, PROMPTS]),
        env=environment,
        capture_output=True,
        text=True,
        check=True,
        timeout=600,
    )
    return json.loads(done.stdout)


def test_greedy_tokens_of_prompts_of_many_lengths_equal_theirs(tmp_path):
    params, config = load_gguf(MODEL)
    tokenizer = open_tokenizer(MODEL)
    save_hf(params, config, tmp_path / "model", dtype="float32")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", dtype=torch.float32
    ).eval()
    theirs.generation_config.eos_token_id = None
    encoded = [tokenizer.encode(prompt) for prompt in PROMPTS]
    width = max(map(len, encoded))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in encoded])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in encoded])
    expected = theirs.generate(
        ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False, pad_token_id=0
    )[:, width:].tolist()
    found = our_tokens()
    assert {len(row) for row in found} == {NEW}
    assert found == expected
