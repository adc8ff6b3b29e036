"""A compiled train step, kept in a file and loaded where it was compiled for."""

import hashlib
import io
import json
import pickle
from pathlib import Path
from typing import Any

import jax
from jax.experimental import serialize_executable
from jax.experimental.compilation_cache import compilation_cache

from aquila_jax.errors import UserError
from aquila_jax.files import write_bytes

_FORMAT = 1


def compile_afresh(lowered: Any) -> Any:
    """`lowered.compile()` past JAX's cache of compiled programs, which is neither read nor written.

    A program that the cache gave to a CPU cannot be serialised again: its kernels stay behind.
    And the cache would keep programs for devices that are elsewhere, and fail to read them.
    """
    name = "jax_enable_compilation_cache"
    kept = getattr(jax.config, name)
    jax.config.update(name, False)
    compilation_cache.reset_cache()  # the setting is read once, at the first use after this
    try:
        return lowered.compile()
    finally:
        jax.config.update(name, kept)
        compilation_cache.reset_cache()


def save_step(path: Path, lowered: Any, executable: Any, devices: Any) -> None:
    """Write a compiled step.

    Args:
        path: the file to make.
        lowered: `jax.stages.Lowered` of the step: its text says which program it is.
        executable: `compile_afresh(lowered)`.
        devices: that it was compiled for, in the mesh's order.
    """
    code, in_tree, out_tree = serialize_executable.serialize(executable)
    described = json.dumps(_description(lowered, devices)).encode() + b"\n"
    write_bytes(path, described + pickle.dumps((code, in_tree, out_tree)))


def load_step(path: Path, lowered: Any, devices: Any) -> Any:
    """The step of a file, if it is the one that `lowered` would be compiled to here.

    Loading runs code that the file holds: take it from nobody else.

    Args:
        path: written by `save_step`.
        lowered: `jax.stages.Lowered` of the step on the devices that are here.
        devices: in the mesh's order.

    Raises:
        UserError: there is no such file, it is damaged, or it is another program, of other
            versions, or for other devices.
    """
    try:
        content = io.BytesIO(path.read_bytes())
        saved = json.loads(content.readline())
    except OSError as error:
        raise UserError(f"no compiled step at {path}: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"{path} is no compiled step: make it by `aquila plan --save`") from error
    wanted = _description(lowered, devices)
    different = [
        f"{name} is {saved.get(name)} there and {value} here"
        for name, value in wanted.items()
        if saved.get(name) != value
    ]
    if different:
        raise UserError(
            f"{path} holds another compiled step: {'; '.join(different)}; make it anew by "
            "`aquila plan --save`, or leave TrainRun.compiled_step empty to compile here"
        )
    code, in_tree, out_tree = pickle.load(content)
    return serialize_executable.deserialize_and_load(
        code, in_tree, out_tree, execution_devices=devices
    )


def _description(lowered: Any, devices: Any) -> dict[str, Any]:
    device = devices[0]
    return {
        "format": _FORMAT,
        "jax": jax.__version__,
        "devices": f"{len(devices)} of {device.device_kind}",
        "program": hashlib.sha256(lowered.as_text().encode()).hexdigest()[:16],
    }
