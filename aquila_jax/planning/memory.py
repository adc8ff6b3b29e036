"""What a program holds in the memory of one device: compiled, or refused for its size."""

import dataclasses
import math
import re
import time
from collections.abc import Mapping
from typing import Any

import jax

from aquila_jax.planning.programs import Program
from aquila_jax.training.saved_step import compile_afresh

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_SIZE = r"([\d.]+)([KMGT]?)B?"
_USED = re.compile(rf"Used {_SIZE} of {_SIZE} hbm")
_TEMPORARIES = re.compile(rf"temporaries \({_SIZE}\) exceeds available HBM \({_SIZE}\)")
_TOTAL = re.compile(rf"otal hbm usage >= {_SIZE}")


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of HBM on one device.

    Attributes:
        resident: arguments by name: parameters, optimizer, ...
        arguments: all that the program takes, as laid out by the compiler; 0 where it was refused.
        outputs: what it returns and does not put in its arguments' place.
        replaced: what it returns in their place.
        temporaries: gradients, stored activations and whatever else lives inside, at the peak.
        program: the code.
        total: all of it at the peak; of a refused program at least this.
    """

    resident: Mapping[str, float]
    arguments: float
    outputs: float
    replaced: float
    temporaries: float
    program: float
    total: float


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What the compiler made of a program.

    Attributes:
        memory: what it needs.
        lowered: `jax.stages.Lowered`.
        executable: `jax.stages.Compiled`; None where it does not fit.
        seconds: tracing left out: lowering and compiling.
    """

    memory: Memory
    lowered: Any
    executable: Any
    seconds: float


def compile_program(program: Program) -> Outcome:
    """Compile, and say what it needs whether or not it fits."""
    resident = {name: shard_bytes(tree) for name, tree in program.resident.items()}
    began = time.monotonic()
    lowered = program.traced.lower()
    try:
        executable = compile_afresh(lowered)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        memory = _refused(str(error), resident)
        return Outcome(memory, lowered, None, time.monotonic() - began)
    seconds = time.monotonic() - began
    stats = executable.memory_analysis()
    replaced = float(stats.alias_size_in_bytes)
    memory = Memory(
        resident,
        arguments=stats.argument_size_in_bytes,
        outputs=stats.output_size_in_bytes - replaced,
        replaced=replaced,
        temporaries=stats.temp_size_in_bytes,
        program=stats.generated_code_size_in_bytes,
        total=stats.argument_size_in_bytes
        + stats.output_size_in_bytes
        - replaced
        + stats.temp_size_in_bytes
        + stats.generated_code_size_in_bytes,
    )
    return Outcome(memory, lowered, executable, seconds)


def shard_bytes(tree: Any) -> float:
    """Of one device's part of abstract arrays."""
    return float(
        sum(
            math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
            for leaf in jax.tree.leaves(tree)
        )
    )


def _refused(message: str, resident: Mapping[str, float]) -> Memory:
    """What a RESOURCE_EXHAUSTED says that the program wanted."""
    arguments = sum(resident.values())
    if match := _USED.search(message):
        total = _bytes(match[1], match[2])
        if more := _TOTAL.search(message):
            total = max(total, _bytes(more[1], more[2]))
        return _at_least(resident, total)
    if match := _TEMPORARIES.search(message):
        temporaries = _bytes(match[1], match[2])
        return _at_least(resident, arguments + temporaries)
    raise ValueError(f"the compiler refused the program without its size: {message[:500]}")


def _at_least(resident: Mapping[str, float], total: float) -> Memory:
    arguments = sum(resident.values())
    return Memory(resident, arguments, 0.0, 0.0, total - arguments, 0.0, total)


def _bytes(number: str, unit: str) -> float:
    return float(number) * _UNITS[unit]
