"""A real pretrained model, grown on disk, is to transformers what it was.

SmolLM2-135M scores 3.4623 nats a token on real text before it grows, in an independent
implementation. Runs where torch and transformers are installed: `make test-parity`.
`benchmarks/interop/pretrained_chain.py` does both growths one after the other.
"""

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest

from aquila_jax import ModelConfig, save_hf
from aquila_jax.growth import ScaleOut, ScaleUp
from aquila_jax.interop.growing import grow_files

REASON = "needs torch and transformers: run `make test-parity`"
torch = pytest.importorskip("torch", reason=REASON)
transformers = pytest.importorskip("transformers", reason=REASON)

pytestmark = pytest.mark.parity

NLL = 3.4623


def their_loss(path: Path, tokens: np.ndarray) -> float:
    """Nats per token, float32."""
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    ids = torch.from_numpy(tokens).long()
    with torch.no_grad():
        logits = model(ids).logits[0, :-1]
        return float(torch.nn.functional.cross_entropy(logits, ids[0, 1:]))


@pytest.fixture(scope="module")
def source(pretrained, tmp_path_factory) -> tuple[Path, ModelConfig, np.ndarray]:
    """The model as a directory, and 1024 tokens of real text."""
    path = tmp_path_factory.mktemp("pretrained") / "source"
    save_hf(pretrained.params, pretrained.config, path, dtype="float32")
    return path, pretrained.config, np.array(pretrained.tokens)


def test_the_model_itself(source):
    path, _, tokens = source
    assert their_loss(path, tokens) == pytest.approx(NLL, abs=0.002)


@pytest.mark.parametrize(
    ("growth", "changes", "dtype"),
    [
        (
            ScaleUp("isometric", depth="identity"),
            {"embed_dim": 720, "num_heads": 12, "mlp_dim": 1920, "num_layers": 40},
            "float32",
        ),
        # float16 halves the file, and keeps these weights closely enough.
        (ScaleOut(), {"num_experts": 8, "experts_per_token": 2}, "float16"),
    ],
    ids=["scale-up", "scale-out"],
)
def test_growth_keeps_the_loss_that_transformers_measures(source, tmp_path, growth, changes, dtype):
    path, config, tokens = source
    target = dataclasses.replace(config, **changes)
    certificate = grow_files(path, tmp_path / "grown", target, growth, dtype=dtype)
    assert certificate.exact
    loss = their_loss(tmp_path / "grown", tokens)
    shutil.rmtree(tmp_path / "grown")  # more than a gigabyte
    assert loss == pytest.approx(NLL, abs=0.002)
