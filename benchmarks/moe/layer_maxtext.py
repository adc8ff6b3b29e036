"""MaxText's mixture layer for the 8x16B shape, compiled for TPUs ahead of time: its HBM.

Run it by an environment of its own (Python 3.12, `pip install "maxtext[tpu]==0.2.5"`):

    JAX_PLATFORMS=cpu TPU_SKIP_MDS_QUERY=1 VENV/bin/python benchmarks/moe/layer_maxtext.py

It prints a line of JSON for each chip, pass and what is kept for the backward pass, of which
`layer.py` makes its table.
"""

# MaxText has an environment of its own, which type checking does not see.
# pyright: reportMissingImports=false

import functools
import importlib.metadata
import json
import sys
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import maxtext
import numpy as np
from flax import nnx
from flax.linen import logical_axis_rules
from hbm import sizes_of
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from maxtext.configs import pyconfig
from maxtext.layers import initializers, moe

CHIPS = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}
EMBED, MLP, EXPERTS, CHOSEN, SEQUENCES, LENGTH = 5120, 20480, 8, 2, 4, 4096
# What is kept for the backward pass: all that differentiation asks for; as our layer does, what
# matrix products read and give, by MaxText's own names for `jax.checkpoint`; or inputs alone.
PRODUCTS = ("moe_x_sorted", "moe_mlpwi_0", "moe_mlpwi_1", "moe_mlpwo")
KEPT = {
    "all": None,
    "products": jax.checkpoint_policies.save_only_these_names(*PRODUCTS),
    "inputs": jax.checkpoint_policies.nothing_saveable,
}
SETTINGS = {
    "model_name": "mixtral-8x7b",
    "override_model_config": "true",
    "run_name": "layer",
    "skip_jax_distributed_system": "true",
    "enable_checkpointing": "false",
    "dtype": "bfloat16",
    "weight_dtype": "bfloat16",
    "base_emb_dim": EMBED,
    "base_mlp_dim": MLP,
    "base_moe_mlp_dim": MLP,
    "num_experts": EXPERTS,
    "num_experts_per_tok": CHOSEN,
    "per_device_batch_size": SEQUENCES,
    "max_target_length": LENGTH,
    "sparse_matmul": "true",
    "megablox": "true",
}


def lowered(settings: Any, device: Any) -> Iterator[tuple[str, str, Any]]:
    """(pass, what is kept, program) of the layer on one chip."""
    axes = settings.mesh_axes
    devices = np.asarray([device]).reshape((1,) * len(axes))
    mesh = Mesh(devices, axes, axis_types=(AxisType.Auto,) * len(axes))

    def make() -> moe.RoutedMoE:
        return moe.RoutedMoE(
            config=settings,
            num_experts=EXPERTS,
            num_experts_per_tok=CHOSEN,
            mesh=mesh,
            kernel_init=initializers.nd_dense_init(1.0, "fan_in", "truncated_normal"),
            kernel_axes=("embed", None),
            rngs=nnx.Rngs(0),
            intermediate_dim=MLP,
            dtype=settings.dtype,
            weight_dtype=settings.weight_dtype,
        )

    everywhere = NamedSharding(mesh, PartitionSpec())
    with jax.set_mesh(mesh), logical_axis_rules(settings.logical_axis_rules):
        graph, state, rest = nnx.split(nnx.eval_shape(make), nnx.Param, ...)
        state, rest = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere), (state, rest)
        )
        x = jax.ShapeDtypeStruct((SEQUENCES, LENGTH, EMBED), jnp.bfloat16, sharding=everywhere)

        def forward(state, x, rest):
            return nnx.merge(graph, state, rest)(x)[0]

        def both(policy, state, x, rest, gradient):
            def layer(state, x):
                return forward(state, x, rest)

            layer = layer if policy is None else jax.checkpoint(layer, policy=policy)
            _, pull = jax.vjp(layer, state, x)
            return pull(gradient)

        yield "forward", "", jax.jit(forward).lower(state, x, rest)
        for kept, policy in KEPT.items():
            program = jax.jit(functools.partial(both, policy))
            yield "forward and backward", kept, program.lower(state, x, rest, x)


def main(chips: list[str]) -> None:
    """Prints what each executable needs, in bytes."""
    overrides = [f"{name}={value}" for name, value in SETTINGS.items()]
    base = f"{maxtext.__path__[0]}/configs/base.yml"
    settings = pyconfig.initialize(["layer_maxtext", base, *overrides])
    for chip in chips:
        device = topologies.get_topology_desc(CHIPS[chip], platform="tpu").devices[0]
        for name, kept, program in lowered(settings, device):
            row = {
                "library": f"MaxText {importlib.metadata.version('maxtext')}",
                "jax": jax.__version__,
                "chip": chip,
                "pass": name,
                "kept": kept,
                **sizes_of(program),
            }
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:] or list(CHIPS))
