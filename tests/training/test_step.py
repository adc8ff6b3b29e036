"""A batch in parts gives the update of the whole batch."""

import dataclasses

import jax
import numpy as np
import pytest

from aquila_jax import Transformer, axes
from aquila_jax.sharding import Layout, MeshShape
from aquila_jax.training.optimizer import AdamW, Cosine
from aquila_jax.training.step import RouterLosses, make_train_step, new_state, state_shardings


def uneven(batch):
    """Rows with unlike numbers of tokens that count, down to none."""
    weights = np.array(batch["loss_weights"])
    for row in range(len(weights)):
        weights[row, row % 8 :] = 0
    return {**batch, "loss_weights": jax.numpy.asarray(weights)}


def one_step(config, params, batch, micro_batches, layout=None):
    optimizer = AdamW(Cosine(1e-2, 0)).build(10, axes.parameters(config))
    model = Transformer(config, layout=layout)
    # What routers are charged is a matter of each part's own tokens.
    step = make_train_step(model, optimizer, RouterLosses(0, 0), micro_batches=micro_batches)
    state = new_state(jax.tree.map(jax.numpy.asarray, params), optimizer)
    # Its arrays are given away, each once.
    state = jax.tree.map(jax.numpy.copy, state)
    if layout is not None:
        state = jax.device_put(state, state_shardings(state, layout, config))
        batch = jax.device_put(batch, layout.batch())
    return step(state, batch)


@pytest.mark.parametrize(
    ("changes", "sizes"),
    [({}, None), ({"num_experts": 4, "experts_per_token": 2}, None), ({}, {"fsdp": 2})],
    ids=str,
)
def test_parts_of_a_batch_give_the_gradient_of_the_whole(
    tiny, random_params, random_batch, changes, sizes
):
    config = dataclasses.replace(tiny, **changes)
    params, batch = random_params(config), uneven(random_batch(config, rows=8))
    layout = sizes and Layout(MeshShape(**sizes).build(jax.devices()[:2]))
    whole, whole_metrics = one_step(config, params, batch, 1)
    for micro_batches in (2, 4) if sizes is None else (4,):
        parts, metrics = one_step(config, params, batch, micro_batches, layout)
        assert metrics["loss"] == pytest.approx(float(whole_metrics["loss"]), rel=1e-5)
        assert metrics["grad_norm"] == pytest.approx(float(whole_metrics["grad_norm"]), rel=1e-4)
        # Adam's first moment is the clipped gradient times 0.1, and its scale is near 1.
        first = [leaf for leaf in jax.tree.leaves(whole.opt_state) if leaf.ndim]
        second = [leaf for leaf in jax.tree.leaves(parts.opt_state) if leaf.ndim]
        for a, b in zip(first, second, strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=1e-7)
