"""A real pretrained model through both growths and out, its loss measured at every stage.

    .venv-parity/bin/python -m benchmarks.interop.pretrained_chain [--dir DIR]

SmolLM2-135M (from GGUF) becomes a directory; grows by `isometric` to 720 wide, 12 heads, 1920 MLP
units and 40 layers with identity insertion; then to 8 experts, 1.4B parameters. Each stage is
grown from disk to disk and loaded by `transformers`, in float32, which says how many nats a token
it takes on 1024 tokens of real text. The mixture is stored in float16. Needs `make test-parity`'s
environment, 5 GB of free disk in --dir and 8 GB of memory. Writes pretrained_chain.md to --out.
"""

import argparse
import dataclasses
import importlib
import platform
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np

from aquila_jax import save_hf
from aquila_jax.accounting import num_parameters
from aquila_jax.files import write_text
from aquila_jax.growth import ScaleOut, ScaleUp
from aquila_jax.interop.growing import grow_files
from tests import pretrained
from tests.parity.test_pretrained import their_loss

# In an environment of its own.
transformers = importlib.import_module("transformers")

STAGES = (
    (
        "isometric, identity insertion",
        ScaleUp("isometric", depth="identity"),
        {"embed_dim": 720, "num_heads": 12, "mlp_dim": 1920, "num_layers": 40},
        "float32",
    ),
    ("8 experts", ScaleOut(), {"num_experts": 8, "experts_per_token": 2}, "float16"),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Grow, measure, print and keep the result."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--dir", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    options = parser.parse_args(argv)
    model = pretrained.load()
    config, tokens = model.config, np.array(model.tokens)
    lines = ["| stage | parameters | seconds to grow | nats a token | differs by |"]
    lines += ["|---|---|---|---|---|"]
    with tempfile.TemporaryDirectory(dir=options.dir, prefix="pretrained_chain") as place:
        path = Path(place) / "source"
        save_hf(model.params, config, path, dtype="float32")
        del model
        first = their_loss(path, tokens)
        lines.append(f"| source | {num_parameters(config) / 1e6:.0f}M | | {first:.4f} | |")
        for number, (name, growth, changes, dtype) in enumerate(STAGES):
            config, began = dataclasses.replace(config, **changes), time.monotonic()
            grown = Path(place) / f"stage_{number}"
            grow_files(path, grown, config, growth, dtype=dtype)
            seconds, path = time.monotonic() - began, grown
            loss = their_loss(path, tokens)
            size = f"{num_parameters(config) / 1e6:.0f}M"
            lines.append(f"| {name} | {size} | {seconds:.1f} | {loss:.4f} | {loss - first:+.5f} |")
    text = (
        "# A pretrained model through both growths\n\n"
        f"Made by `benchmarks/interop/pretrained_chain.py` on {platform.system()} "
        f"{platform.machine()}, Python {platform.python_version()}, jax {jax.__version__}, "
        f"transformers {transformers.__version__}. SmolLM2-135M; losses by transformers in "
        "float32, on the same 1024 tokens.\n\n" + "\n".join(lines) + "\n"
    )
    options.out.mkdir(parents=True, exist_ok=True)
    write_text(options.out / "pretrained_chain.md", text)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
