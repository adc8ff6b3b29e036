"""HBM of a program on a chip that is elsewhere, for any environment that has JAX."""

from typing import Any

import jax

SIZES = ("arguments", "outputs", "temporaries")


def sizes_of(lowered: Any) -> dict[str, Any]:
    """Bytes by `SIZES`, None where the program does not fit; and whether it calls a kernel."""
    try:
        executable = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return {**dict.fromkeys(SIZES), "grouped_kernel": None}
    memory = executable.memory_analysis()
    return {
        "arguments": memory.argument_size_in_bytes,
        "outputs": memory.output_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
        "grouped_kernel": "tpu_custom_call" in executable.as_text(),
    }
