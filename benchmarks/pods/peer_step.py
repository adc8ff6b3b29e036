"""MaxText's train step of the 8x16B shape, compiled for a pod; prints one line of JSON.

    PEER_PYTHON benchmarks/pods/peer_step.py --batch 2 --hlo FILE

Runs in an environment of its own, Python 3.12 with `maxtext[tpu]==0.2.5`; `step_8x16b.py` calls it.
Its own `train_compile` does the work; this only looks at what it compiled.
"""

import argparse
import importlib
import json
import resource
import sys
import time
from pathlib import Path

# The paper's 8x16B as a Mixtral; whole vocabularies of 128 chips, as the peer needs them.
SETTINGS = {
    "run_name": "step",
    "model_name": "mixtral-8x7b",
    "override_model_config": True,
    "base_emb_dim": 5120,
    "base_mlp_dim": 20480,
    "base_moe_mlp_dim": 20480,
    "base_num_decoder_layers": 40,
    "base_num_query_heads": 40,
    "base_num_kv_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "max_target_length": 4096,
    "megablox": True,
    "sparse_matmul": True,
    "attention": "flash",
    "remat_policy": "full",
    "dtype": "bfloat16",
    "compile_topology": "v5p-256",
    "compile_topology_num_slices": 1,
    "ici_fsdp_parallelism": 16,
    "ici_expert_parallelism": 8,
    "dataset_type": "synthetic",
    "enable_checkpointing": False,
    "base_output_directory": "/tmp/peer_step",
    "skip_jax_distributed_system": True,
}


def main() -> None:
    """Compile once, measure, print."""
    flags = argparse.ArgumentParser(description=__doc__)
    flags.add_argument("--batch", type=int, default=2, help="sequences on each chip")
    flags.add_argument("--hlo", type=Path, help="where to write the scheduled HLO")
    arguments = flags.parse_args()
    # Of another environment than this repository's.
    train_compile = importlib.import_module("maxtext.trainers.pre_train.train_compile")
    compile_it = train_compile.jit_and_compile
    found = {"batch": arguments.batch, "fits": False}

    def measured(*args, **kwargs):
        began, cpu = time.monotonic(), time.process_time()
        try:
            compiled = compile_it(*args, **kwargs)
        finally:
            found["seconds"] = time.monotonic() - began
            found["cpu_seconds"] = time.process_time() - cpu
        stats = compiled.memory_analysis()
        found.update(
            fits=True,
            arguments=stats.argument_size_in_bytes,
            temporaries=stats.temp_size_in_bytes,
        )
        if arguments.hlo:
            arguments.hlo.write_text(compiled.as_text())
        return compiled

    vars(train_compile)["jit_and_compile"] = measured
    base = Path(train_compile.__file__ or "").parents[2] / "configs" / "base.yml"
    settings = {**SETTINGS, "per_device_batch_size": arguments.batch}
    try:
        train_compile.main([sys.argv[0], str(base), *(f"{k}={v}" for k, v in settings.items())])
    except Exception as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        found["refused"] = str(error)[:600]
    found["peak_host_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps(found))


if __name__ == "__main__":
    main()
