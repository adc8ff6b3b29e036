"""A batch in parts gives the update of the whole batch."""

import dataclasses
from typing import Any

import jax
import numpy as np
import pytest

from aquila_jax import Transformer, axes
from aquila_jax.planning.chips import parse_topology
from aquila_jax.planning.topology import devices_of
from aquila_jax.sharding import Layout, MeshShape
from aquila_jax.training.optimizer import AdamW, Cosine
from aquila_jax.training.run import placed
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
    # The step takes the state's memory, so it gets parameters of its own.
    state = new_state(jax.tree.map(jax.numpy.array, params), optimizer)
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


def test_a_step_with_all_of_it_compiles_for_two_slices(tiny):
    """By the real compiler: an odd vocabulary, parts, offloading, sequence parallelism, splash."""
    config = dataclasses.replace(
        tiny, vocab_size=4097, embed_dim=256, head_dim=128, mlp_dim=512, context_length=512
    )
    devices = devices_of(parse_topology("v5p:2x2x1", slices=2))
    layout = Layout(MeshShape(slices=2, data=1, fsdp=2, model=2).build(devices))
    optimizer = AdamW(Cosine(1e-2, 0)).build(10, axes.parameters(config))
    model = Transformer(config, dtype=jax.numpy.bfloat16, remat="offload", layout=layout)
    shapes = jax.eval_shape(
        lambda params: new_state(params, optimizer), axes.abstract_params(config)
    )
    state = placed(shapes, state_shardings(shapes, layout, config))
    batch = {
        name: jax.ShapeDtypeStruct((16, 512), dtype, sharding=layout.batch())
        for name, dtype in {
            **dict.fromkeys(("tokens", "targets", "segment_ids", "positions"), np.int32),
            "loss_weights": np.float32,
        }.items()
    }
    step: Any = make_train_step(model, optimizer, RouterLosses(), micro_batches=2)
    with jax.default_matmul_precision("default"):
        compiled = step.lower(state, batch).compile()
    text = str(compiled.as_text())
    assert "splash_mha_dkv_segmented" in text
    assert "reduce-scatter" in text
    # Queries and keys wait in the host's memory, which the layout of S(5) names.
    assert "S(5)" in text
    # No whole logits of a part, nor a whole gradient of the head.
    assert "f32[2,512,4097]" not in text
    assert "f32[256,4097]" not in text
