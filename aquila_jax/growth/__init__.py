"""Growing parameters: pure functions from one pytree to a larger one."""

from aquila_jax.growth.certificate import Certificate, LeafRecord
from aquila_jax.growth.compose import apply_plan
from aquila_jax.growth.scale import GrowthResult, ScaleOut, ScaleUp, scale_out, scale_up

__all__ = [
    "Certificate",
    "GrowthResult",
    "LeafRecord",
    "ScaleOut",
    "ScaleUp",
    "apply_plan",
    "scale_out",
    "scale_up",
]
