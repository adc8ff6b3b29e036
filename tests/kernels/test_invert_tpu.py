"""Slots turned around by the TPU interpreter, against a search for every row."""

import jax
import jax.numpy as jnp
import numpy as np

from aquila_jax.kernels import invert_tpu
from tests.kernels.interpreter import interpreted
from tests.kernels.test_permute_tpu import draw


def test_a_table_of_several_parts_is_inverted_and_read(monkeypatch):
    for name, value in {"ENTRIES": 48, "LANES": 16, "BLOCK": 32}.items():
        monkeypatch.setattr(invert_tpu, name, value)
    _, _, slots, gates = draw(30, 3, 1, 80)
    with interpreted():
        token, gate = invert_tpu.invert(slots, gates, num_rows=80, interpret=False)
        found = invert_tpu.look_up(jnp.arange(1.0, 81), slots, interpret=False)
        jax.block_until_ready((token, gate, found))
    slots = np.asarray(slots)
    for row in range(80):
        here = np.argwhere(slots == row)
        assert token[row] == (here[0, 0] if len(here) else -1)
        if len(here):
            assert gate[row] == gates[tuple(here[0])]
    np.testing.assert_array_equal(found, np.where((slots >= 0) & (slots < 80), slots + 1, 0))
