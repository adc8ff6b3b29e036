"""Whether copies of a parameter, which must be equal bit for bit, still are."""

from typing import Any

import jax
import jax.numpy as jnp

from aquila_jax.errors import UserError
from aquila_jax.hosts import Group


@jax.jit
def _sums_of_bits(shards: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Of each shard a sum of all bits; all on one device, in one program."""
    return jax.tree.map(_sum_of_bits, shards)


def _sum_of_bits(values: jax.Array) -> jax.Array:
    """Modulo 2**32, each word weighed by its place."""
    words = jax.lax.bitcast_convert_type(values, jnp.dtype(f"uint{values.dtype.itemsize * 8}"))
    words = words.reshape(-1).astype(jnp.uint32)
    return (words * (2 * jnp.arange(words.size, dtype=jnp.uint32) + 1)).sum(dtype=jnp.uint32)


def check_replicas(hosts: Group, params: Any, step: int) -> None:
    """Every copy of every shard has the same bits, on all devices of all processes.

    A device that computes wrongly without a word shows in this before it shows in the loss.

    Raises:
        UserError: naming a leaf and the devices that differ; on all processes.
    """
    by_device: dict[str, dict[str, jax.Array]] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        for shard in leaf.addressable_shards:
            where = f"{name}[{', '.join(f'{s.start or 0}:' for s in shard.index)}]"
            by_device.setdefault(str(shard.device), {})[where] = shard.data
    # Each on its own device: nothing is moved.
    sums = {device: _sums_of_bits(shards) for device, shards in by_device.items()}
    own: dict[str, list[tuple[str, int]]] = {}
    for device, found in jax.device_get(sums).items():
        for where, value in found.items():
            own.setdefault(where, []).append((device, int(value)))
    merged: dict[str, dict[int, list[str]]] = {}
    for index, answer in enumerate(hosts.gather("replicas", own)):
        for where, found in answer.items():
            for device, value in found:
                holders = merged.setdefault(where, {}).setdefault(value, [])
                holders.append(f"{device} of process {index}")
    for where, by_value in merged.items():
        if len(by_value) > 1:
            fewest = min(by_value.values(), key=len)
            raise UserError(
                f"copies of {where} differ at step {step}: {', '.join(fewest)} against the "
                "others; that device computes wrongly: take its host out, then run the same "
                "command again to go on from the newest checkpoint"
            )
