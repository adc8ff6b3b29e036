import jax
import numpy as np
import pytest

from aquila_jax.errors import UserError
from aquila_jax.hosts import Group
from aquila_jax.sharding import Layout, MeshShape
from aquila_jax.training.replicas import check_replicas


def _copies(changed_bit=None):
    """A replicated array on eight devices, one bit of one copy flipped."""
    sharding = Layout(MeshShape(data=8).build()).replicated()
    values = np.random.default_rng(0).normal(size=(5, 7)).astype(np.float32)
    shards = []
    for number, device in enumerate(jax.devices()):
        own = values.copy()
        if changed_bit is not None and number == 5:
            own.view(np.uint32)[3, 2] ^= np.uint32(1) << np.uint32(changed_bit)
        shards.append(jax.device_put(own, device))
    return jax.make_array_from_single_device_arrays(values.shape, sharding, shards)


def test_equal_copies_pass():
    sharded = jax.device_put(np.arange(16.0), Layout(MeshShape(data=8).build()).each_device())
    check_replicas(Group(), {"a": _copies(), "b": sharded}, 3)


@pytest.mark.parametrize("bit", [0, 17, 31])
def test_one_flipped_bit_names_leaf_and_device(bit):
    with pytest.raises(
        UserError, match=r"copies of a\[0:, 0:\] differ at step 3: cpu:5 of process 0 against"
    ):
        check_replicas(Group(), {"a": _copies(bit)}, 3)


def test_a_device_of_another_process_is_named():
    class Two(Group):
        def gather(self, name, value):
            theirs = {where: [(d, v ^ 1) for d, v in found] for where, found in value.items()}
            # Two of ours against eight: the few are named.
            return [value, {where: found[:2] for where, found in theirs.items()}]

    with pytest.raises(UserError, match=r"1 of process 1 against the others"):
        check_replicas(Two(0, 2), {"a": _copies()}, 1)
