"""Grow pretrained decoders into larger ones and into mixtures of experts, and keep training.

    grown = aquila_jax.scale_up(params, config, target_config, method="aki_pro")
    moe = aquila_jax.scale_out(grown.params, grown.config, key=jax.random.key(0))
    print(aquila_jax.certify(grown, moe, tokens))  # what was kept, measured
    logits = aquila_jax.Transformer(moe.config).apply({"params": moe.params}, tokens)

Everything here is a pure function on parameter pytrees; training, data and the command line are
in the subpackages.
"""

from aquila_jax.config import PRESETS, ModelConfig, RopeScaling, preset
from aquila_jax.errors import UserError
from aquila_jax.evaluation import certify
from aquila_jax.growth import Certificate, GrowthResult, scale_out, scale_up
from aquila_jax.interop import load_hf, save_hf
from aquila_jax.nn import Transformer

__version__ = "0.1.0"

__all__ = [
    "PRESETS",
    "Certificate",
    "GrowthResult",
    "ModelConfig",
    "RopeScaling",
    "Transformer",
    "UserError",
    "certify",
    "load_hf",
    "preset",
    "save_hf",
    "scale_out",
    "scale_up",
]
