"""A train step by one library, kept ready: for every number read, so many steps, as JSON.

    PYTHON benchmarks/pods/training_peers.py NAME SHAPE

NAME is `aquila_jax`, `maxtext`, `transformers, eager` or `transformers, grouped_mm`; SHAPE is a
JSON object of what `cpu_training.py`, which calls this, names. The first line written tells how
many parameters there are. Imports nothing of this repository unless asked for it: MaxText lives in
an environment of its own.
"""

import importlib
import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

THREADS = 2
LEARNING_RATE = 3e-4

# Runs so many steps; gives the last loss.
Steps = Callable[[int], float]


def main() -> None:
    """Build, then serve."""
    name, shape = sys.argv[1], json.loads(sys.argv[2])
    builders = {
        "aquila_jax": ours,
        "maxtext": maxtext,
        "transformers, eager": lambda shape: transformers(shape, "eager"),
        "transformers, grouped_mm": lambda shape: transformers(shape, "grouped_mm"),
    }
    # Libraries print on standard output what they find worth telling.
    answers, sys.stdout = sys.stdout, sys.stderr
    num_parameters, steps = builders[name](shape)
    print(num_parameters, file=answers, flush=True)
    for line in sys.stdin:
        start = time.perf_counter()
        loss = steps(int(line))
        found = {"seconds": time.perf_counter() - start, "loss": loss}
        print(json.dumps(found), file=answers, flush=True)


def ours(shape: dict[str, int]) -> tuple[int, Steps]:
    """This repository's step, as `aquila train` takes it."""
    importlib.import_module("aquila_jax.training.freed_memory").keep_freed_memory()
    jax = importlib.import_module("jax")
    jnp = jax.numpy
    axes = importlib.import_module("aquila_jax.axes")
    nn = importlib.import_module("aquila_jax.nn")
    config_module = importlib.import_module("aquila_jax.config")
    optimizers = importlib.import_module("aquila_jax.training.optimizer")
    step = importlib.import_module("aquila_jax.training.step")

    experts = {"num_experts": shape["experts"], "experts_per_token": shape["chosen"]}
    config = config_module.preset(
        "toy_dense",
        vocab_size=shape["vocab"],
        embed_dim=shape["embed"],
        mlp_dim=shape["mlp"],
        num_layers=shape["layers"],
        num_heads=shape["heads"],
        num_kv_heads=shape["kv_heads"],
        head_dim=shape["head_dim"],
        context_length=shape["tokens"],
        qkv_bias=False,
        tie_embeddings=False,
        **(experts if shape["experts"] else {}),
    )
    tokens = jax.random.randint(
        jax.random.key(0), (shape["rows"], shape["tokens"]), 0, shape["vocab"]
    )
    ones = jnp.ones_like(tokens)
    batch = {
        "tokens": tokens,
        "targets": jnp.roll(tokens, -1, axis=1),
        "segment_ids": ones,
        "positions": jnp.broadcast_to(jnp.arange(shape["tokens"]), tokens.shape),
        "loss_weights": ones.astype(jnp.float32),
    }
    model = nn.Transformer(config)
    params = model.init(jax.random.key(1), tokens)["params"]
    schedule = optimizers.Cosine(peak=LEARNING_RATE, warmup_steps=1)
    optimizer = optimizers.AdamW(schedule).build(1000, axes.parameters(config))
    train_step = step.make_train_step(model, optimizer, step.RouterLosses())
    held = [step.new_state(params, optimizer)]
    num_parameters = sum(leaf.size for leaf in jax.tree.leaves(params))

    def steps(number: int) -> float:
        metrics: dict[str, Any] = {}
        for _ in range(number):
            held[0], metrics = train_step(held[0], batch)
        return float(metrics["loss"])

    return num_parameters, steps


def maxtext(shape: dict[str, int]) -> tuple[int, Steps]:
    """MaxText's own jitted `train_step` on its own synthetic batch."""
    jax = importlib.import_module("jax")
    nnx = importlib.import_module("flax.nnx")
    pyconfig = importlib.import_module("maxtext.configs.pyconfig")
    train = importlib.import_module("maxtext.trainers.pre_train.train")
    utils = importlib.import_module("maxtext.utils.train_utils")
    text = importlib.import_module("maxtext.utils.maxtext_utils")
    sharding = importlib.import_module("maxtext.utils.sharding")
    rules = importlib.import_module("flax.linen").logical_axis_rules

    base = str(Path(pyconfig.__file__ or "").parent / "base.yml")
    pairs = [f"{key}={value}" for key, value in maxtext_settings(shape).items()]
    config = pyconfig.initialize([sys.argv[0], base, *pairs])
    _, _, placed, _, mesh, *_, state = utils.setup_train_loop(config, None)
    graph, state = nnx.split(state)
    params_placed, placed = sharding.maybe_update_params_sharding_with_opt(config, placed)
    with jax.set_mesh(mesh), rules(config.logical_axis_rules):
        data = sharding.get_input_data_sharding(config, mesh)
        jitted = utils.jit_train_step(
            config, graph, state, placed, data, train.train_step, params_placed
        )
        batch = train.make_synthetic_batch(config, text.get_shaped_batch(config, data))
    held = [state]

    def steps(number: int) -> float:
        metrics: dict[str, Any] = {}
        with jax.set_mesh(mesh), rules(config.logical_axis_rules):
            for _ in range(number):
                held[0], metrics = jitted(held[0], batch)
            return float(metrics["scalar"]["learning/loss"])

    # Its state holds keys of random streams too.
    trained = jax.tree.leaves(nnx.filter_state(state.model, nnx.Param))
    return sum(leaf.size for leaf in trained), steps


def maxtext_settings(shape: dict[str, int]) -> dict[str, Any]:
    """Its names for the same shape; on a CPU, without recomputation."""
    settings: dict[str, Any] = {
        "run_name": "cpu_training",
        "hardware": "cpu",
        "decoder_block": "llama2",
        "vocab_size": shape["vocab"],
        "base_emb_dim": shape["embed"],
        "base_mlp_dim": shape["mlp"],
        "base_num_decoder_layers": shape["layers"],
        "base_num_query_heads": shape["heads"],
        "base_num_kv_heads": shape["kv_heads"],
        "head_dim": shape["head_dim"],
        "max_target_length": shape["tokens"],
        "per_device_batch_size": shape["rows"],
        "dtype": "float32",
        "attention": "dot_product",
        "remat_policy": "none",
        "learning_rate": LEARNING_RATE,
        "steps": 1000,
        "dataset_type": "synthetic",
        "enable_checkpointing": False,
        "base_output_directory": "/tmp/cpu_training",
        "skip_jax_distributed_system": True,
    }
    if shape["experts"]:
        settings |= {
            "decoder_block": "mixtral",
            "num_experts": shape["experts"],
            "num_experts_per_tok": shape["chosen"],
            "base_moe_mlp_dim": shape["mlp"],
            "megablox": False,
            "load_balance_loss_weight": 1e-3,
        }
    return settings


def transformers(shape: dict[str, int], implementation: str) -> tuple[int, Steps]:
    """A training loop as its documentation writes it, with PyTorch's fused AdamW."""
    torch = importlib.import_module("torch")
    library = importlib.import_module("transformers")

    torch.manual_seed(0)
    torch.set_num_threads(THREADS)
    settings = {
        "vocab_size": shape["vocab"],
        "hidden_size": shape["embed"],
        "intermediate_size": shape["mlp"],
        "num_hidden_layers": shape["layers"],
        "num_attention_heads": shape["heads"],
        "num_key_value_heads": shape["kv_heads"],
        "head_dim": shape["head_dim"],
        "max_position_embeddings": shape["tokens"],
        "tie_word_embeddings": False,
        "use_cache": False,
    }
    if shape["experts"]:
        config = library.MixtralConfig(
            **settings,
            num_local_experts=shape["experts"],
            num_experts_per_tok=shape["chosen"],
            output_router_logits=True,
        )
        config._experts_implementation = implementation
        model = library.MixtralForCausalLM(config)
    else:
        model = library.LlamaForCausalLM(library.LlamaConfig(**settings))
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.1, fused=True
    )
    tokens = torch.randint(0, shape["vocab"], (shape["rows"], shape["tokens"]))

    def steps(number: int) -> float:
        loss = math.nan
        for _ in range(number):
            optimizer.zero_grad(set_to_none=True)
            outcome = model(tokens, labels=tokens)
            outcome.loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            loss = outcome.loss.item()
        return loss

    return sum(parameter.numel() for parameter in model.parameters()), steps


if __name__ == "__main__":
    main()
