"""Run by `test_bits.py` in a process whose compiler optimises: prints leaves whose bits differ."""

import dataclasses
import functools

import jax
import numpy as np

from aquila_jax import ModelConfig, axes
from aquila_jax.growth import ScaleOut, ScaleUp, apply_plan
from aquila_jax.sharding import Layout, MeshShape

SOURCE = ModelConfig(
    vocab_size=64,
    embed_dim=12,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=6,
    mlp_dim=20,
)
LARGER = dataclasses.replace(
    SOURCE, vocab_size=72, embed_dim=20, num_layers=4, num_heads=8, mlp_dim=28
)
MIXTURE = dataclasses.replace(SOURCE, num_experts=4, experts_per_token=2)
GROWTHS = [
    (ScaleUp("isometric", split="uneven", noise=0.1), LARGER),
    (ScaleUp("aki_pro"), LARGER),
    (ScaleUp("latent", noise=0.1), LARGER),
    (ScaleOut(redraw=0.5, noise=0.1, noise_fraction=0.5), MIXTURE),
]


def main() -> None:
    """Eager against jitted, and against jitted on a mesh."""
    rng, key = np.random.default_rng(0), jax.random.key(3)
    params = axes.unflatten(
        {
            path: rng.normal(size=parameter.shape(SOURCE)).astype(np.float32)
            for path, parameter in axes.parameters(SOURCE).items()
        }
    )
    layout = Layout(MeshShape(data=1, fsdp=2, model=2).build())
    for growth, target in GROWTHS:
        plan, _ = growth.plan(SOURCE, target)
        grow = functools.partial(apply_plan, plan, target=target, key=key)
        on_mesh = functools.partial(grow, layout=layout)
        placed = jax.device_put(params, layout.params(SOURCE))
        eager = axes.flatten(grow(params))
        for name, other in (
            ("jit", jax.jit(grow)(params)),
            ("mesh", jax.jit(on_mesh, out_shardings=layout.params(target))(placed)),
        ):
            for path, leaf in axes.flatten(other).items():
                if np.asarray(leaf).tobytes() != np.asarray(eager[path]).tobytes():
                    print(name, growth, path)
    print("compared")


if __name__ == "__main__":
    main()
