"""One process of several that train a small stage together: "dense", or "moe" grown from it.

python -m tests.multihost.worker DIRECTORY STAGE [--FIELD VALUE ...]
"""

import argparse
import dataclasses
import sys
from pathlib import Path

from aquila_jax.errors import UserError
from aquila_jax.growth import ScaleOut
from aquila_jax.hosts import joined
from aquila_jax.sharding import MeshShape
from aquila_jax.training import Interrupted, TrainRun, train
from tests.reliability.worker import stage_run

STEPS = 12


def run_of(arguments: argparse.Namespace) -> TrainRun:
    """A stage of the reliability tests' sizes, short, on all devices there are."""
    directory = Path(arguments.directory)
    run = dataclasses.replace(
        stage_run(directory, "dense", arguments.steps),
        model_dir=str(directory / arguments.stage),
        name=arguments.stage,
        mesh=MeshShape(data=-1, fsdp=2),
        seed=arguments.seed,
        eval_every=6,
        checkpoint_every=arguments.checkpoint_every,
        check_replicas_every=4,
    )
    if arguments.stage == "moe":
        return dataclasses.replace(
            run,
            model=dataclasses.replace(run.model, num_experts=4, experts_per_token=2),
            init_from=str(directory / "dense"),
            growth=ScaleOut(),
            mesh=MeshShape(data=-1, expert=2),
        )
    return run


def main() -> int:
    """Train, and exit as the command line does."""
    parser = argparse.ArgumentParser()
    parser.add_argument("directory")
    parser.add_argument("stage")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--checkpoint_every", type=int, default=4)
    arguments = parser.parse_args()
    try:
        with joined():
            train(run_of(arguments))
    except Interrupted as stop:
        return 128 + stop.signum
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
