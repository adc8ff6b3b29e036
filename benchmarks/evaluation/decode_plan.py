"""One step of generation by the 8x16B model, planned for v5p slices that are not here.

    python benchmarks/evaluation/decode_plan.py

The program that `aquila plan --what=decode` compiles: a next token for every text, whose cache
holds 4096 slots, in bfloat16, experts over 8 chips and heads over the others. Writes
benchmarks/results/decode_plan.md.
"""

import argparse
import platform
from collections.abc import Iterator
from pathlib import Path

import jax

from aquila_jax.cli.gin_files import configured_run
from aquila_jax.files import write_text
from aquila_jax.planning import Plan, make_plan, parse_topology

RESULTS = Path(__file__).parents[1] / "results"
RUN = "gin_configs/runs/scale_out.gin"
UNREAD = {"MODEL_DIR": "planned", "INIT_FROM": "parent"}
# Slice, devices that share heads and hidden units, texts.
CASES = (("v5p:2x2x2", 1, 128), ("v5p:2x2x4", 2, 128), ("v5p:2x2x4", 2, 512))
HEAD = """\
| slice | mesh | texts | parameters + cache, GiB | HBM, GiB | sent, GB | step >=, ms | bound by \
| tokens/s <= |
|---|---|---|---|---|---|---|---|---|"""


def planned(topology: str, model: int, texts: int) -> Plan:
    """The step, compiled."""
    bindings = ["MeshShape.fsdp=1", "MeshShape.expert=8", f"MeshShape.model={model}"]
    bindings += ["DTYPE='bfloat16'", f"BATCH_SIZE={texts}"]
    run = configured_run([RUN], bindings, unread=UNREAD)
    return make_plan(run, parse_topology(topology), "decode")[0]


def row(texts: int, plan: Plan) -> Iterator[str]:
    """Of the table."""
    assert plan.bound is not None
    assert plan.work is not None
    mesh = [f"{name} {size}" for name, size in plan.mesh.items() if size > 1]
    resident = plan.memory.resident
    yield plan.topology.name
    yield " x ".join(mesh)
    yield str(texts)
    yield f"{resident['parameters'] / 2**30:.1f} + {resident['cache'] / 2**30:.1f}"
    yield f"{plan.memory.total / 2**30:.1f} of {plan.capacity / 2**30:.1f}"
    yield f"{plan.work.ici_bytes / 1e9:.2f}"
    yield f"{1e3 * plan.bound.bound:.1f}"
    yield plan.bound.binding
    yield f"{texts / plan.bound.bound:,.0f}"


def main() -> None:
    """Plan and write."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    lines = [f"| {' | '.join(row(case[2], planned(*case)))} |" for case in CASES]
    page = f"""# A step of generation by 8x16B, planned for v5p

`benchmarks/evaluation/decode_plan.py`: Python {platform.python_version()}, jax {jax.__version__};
compiled for chips that are not here. One token for every text, caches of 4096 slots, bfloat16. A
step's least time and most tokens a second are a roofline's (docs/planning.md): nothing was run.

{chr(10).join((HEAD, *lines))}
"""
    write_text(RESULTS / "decode_plan.md", page)
    print(page)


if __name__ == "__main__":
    main()
