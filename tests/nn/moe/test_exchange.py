"""Rows by way of a buffer on one device, with experts that are easy to recognise.

On meshes every exchange is compared with the reference in `test_mixing.py`.
"""

import jax.numpy as jnp
import numpy as np
import pytest

from aquila_jax.kernels import route
from aquila_jax.nn.moe.exchange import (
    Fabric,
    buffers,
    by_gather,
    on_one_device,
    slots_when_received,
)
from aquila_jax.nn.moe.queues import endless, limited

N, E, K, D = 24, 4, 2, 5
ALONE = Fabric()


def draw():
    rng = np.random.default_rng(0)
    logits, x = rng.normal(size=(N, E)), rng.normal(size=(N, D)).astype(np.float32)
    logits[:, 2] += 2
    settings = {"experts_per_token": K, "renormalize": True}
    found = route(jnp.asarray(logits, jnp.float32), jnp.ones(N, bool), **settings)
    return found, jnp.asarray(x)


def compute(rows, sizes, gates=None):
    """Expert e multiplies by e + 1."""
    ends = jnp.cumsum(sizes)
    expert = jnp.searchsorted(ends, jnp.arange(rows.shape[0]), side="right")
    out = rows * (jnp.minimum(expert, E - 1) + 1)[:, None]
    return out if gates is None else out * gates[:, None]


def expected(found, x, slots):
    weights = np.asarray(found.gates_Nk) * (np.asarray(found.experts_Nk) + 1)
    return np.asarray(x) * np.where(np.asarray(slots) >= 0, weights, 0).sum(1)[:, None]


@pytest.mark.parametrize("num_rows", [N * K, N * K - 7, 10, N * K + 8])
def test_rounds_bring_every_row_once_and_their_outputs_add_up(num_rows):
    found, x = draw()
    queues = endless(found)
    places = buffers(queues, ALONE, num_rows)
    slots = slots_when_received(queues, places, ALONE)
    assert sorted(np.asarray(slots).ravel().tolist()) == list(range(N * K))
    rounds = int(places.rounds(ALONE))
    assert rounds == -(-N * K // num_rows)
    out, brought = np.zeros_like(x), np.zeros(E, int)
    for number in range(rounds):
        part = places._replace(first_row=number * num_rows)
        pieces = part.pieces()
        assert int(pieces.length_XE.sum()) == min(num_rows, N * K - number * num_rows)
        brought += np.asarray(pieces.length_XE.sum(axis=0))
        out += by_gather(x, found.gates_Nk, found.experts_Nk, slots, part, ALONE, compute)
    np.testing.assert_array_equal(brought, found.counts_E)
    np.testing.assert_allclose(out, expected(found, x, slots), rtol=2e-6, atol=1e-6)


def test_alone_one_round_has_all():
    found, x = draw()
    queues = endless(found)
    places = buffers(queues, ALONE, N * K)
    slots = slots_when_received(queues, places, ALONE)
    out = on_one_device(x, found.gates_Nk, slots, places, compute)
    np.testing.assert_allclose(out, expected(found, x, slots), rtol=2e-6, atol=1e-6)


def test_fixed_slots_lie_one_experts_after_the_others():
    found, x = draw()
    capacity = 9
    queues = limited(found, jnp.ones(N, bool), K, capacity)
    places = buffers(queues, ALONE, E * capacity)
    slots = np.asarray(slots_when_received(queues, places, ALONE))
    kept = slots >= 0
    assert 0 < (~kept).sum() < N * K
    np.testing.assert_array_equal(slots[kept] // capacity, np.asarray(found.experts_Nk)[kept])
    assert len(set(slots[kept].tolist())) == kept.sum()
    out = on_one_device(x, found.gates_Nk, jnp.asarray(slots), places, compute)
    np.testing.assert_allclose(out, expected(found, x, slots), rtol=2e-6, atol=1e-6)
