"""The files in a MODEL_DIR that say what runs there, and on what."""

import dataclasses
import platform

import jax

from aquila_jax import accounting, axes
from aquila_jax.data.pretrained_tokenizer import TOKENIZER_DIR
from aquila_jax.data.tokenizer_files import tokenizer_files, write_tokenizer
from aquila_jax.files import write_json, write_text
from aquila_jax.hosts import current
from aquila_jax.training.agreement import code_digest, versions
from aquila_jax.training.run import Compiled, TrainRun


def describe(run: TrainRun, compiled: Compiled, operative_config: str) -> None:
    """The files in MODEL_DIR that say what runs, and a copy of the tokenizer.

    That is config.gin, model-info.txt, environment.json and tokenizer/.
    """
    if not current().is_first:
        return
    if operative_config:
        write_text(run.path / "config.gin", operative_config)
    shardings = axes.flatten(compiled.layout.params(run.model))
    lines = [
        f"{path}  {parameter.shape(run.model)}  {'x'.join(parameter.axes)}  "
        f"{shardings[path].spec}  float32"
        for path, parameter in axes.parameters(run.model).items()
    ]
    total, active = (
        count(run.model) for count in (accounting.num_parameters, accounting.num_active_parameters)
    )
    lines.append(f"total {total:,} parameters, {active:,} active")
    write_text(run.path / "model-info.txt", "\n".join(lines) + "\n")
    environment = {
        **versions(),
        "code": code_digest(),
        "machine": f"{platform.system()} {platform.machine()}",
        "processes": current().count,
        "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "mesh": dict(compiled.layout.mesh.shape),
        "mesh_asked": dataclasses.asdict(run.mesh),
    }
    write_json(run.path / "environment.json", environment)
    if run.data.tokenizer_path:
        write_tokenizer(run.path / TOKENIZER_DIR, tokenizer_files(run.data.tokenizer_path))
