import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aquila_jax import axes
from aquila_jax.nn import Transformer, forward
from aquila_jax.nn.losses import cross_entropy
from aquila_jax.nn.moe.router import Report

# Everything at once: narrow experts, a shared one, and dense layers between.
GROUPED = {
    "num_layers": 6,
    "num_experts": 4,
    "experts_per_token": 2,
    "expert_mlp_dim": 7,
    "shared_mlp_dim": 9,
}


def dot_products(config, batch, remat):
    """How many matrix products the program of a model holds, whatever scans make of them."""
    params = axes.abstract_params(config)
    model = Transformer(config, remat=remat)
    return str(jax.make_jaxpr(lambda params: forward(model, params, batch))(params)).count(
        "dot_general"
    )


@pytest.mark.parametrize("remat", ["none", "full"])
def test_the_program_grows_neither_with_layers_nor_with_the_size_of_a_group(
    tiny, random_batch, remat
):
    counts = {
        dot_products(
            dataclasses.replace(tiny, **{**GROUPED, "num_layers": layers}, moe_every=every),
            random_batch(tiny),
            remat,
        )
        for layers, every in ((4, 2), (8, 2), (4, 4), (12, 6))
    }
    assert len(counts) == 1


@pytest.mark.parametrize("every", [1, 2, 3])
def test_every_layer_of_every_leaf_has_a_finite_gradient(tiny, random_params, random_batch, every):
    config = dataclasses.replace(
        tiny, **GROUPED, moe_every=every, qk_norm=True, shared_expert_gate=True
    )
    params, batch = random_params(config), random_batch(config)

    def loss(params):
        logits, _ = forward(Transformer(config), params, batch)
        return cross_entropy(logits, batch["targets"], batch["loss_weights"]).mean

    gradients = axes.flatten(jax.jit(jax.grad(loss))(params))
    assert gradients.keys() == axes.parameters(config).keys()
    for path, gradient in gradients.items():
        assert np.isfinite(gradient).all(), path
        stacked = axes.parameters(config)[path].axes[0] in axes.LAYER_AXES
        others = tuple(range(1 if stacked else 0, gradient.ndim))
        largest = np.abs(np.asarray(gradient)).max(axis=others)
        # A key's bias adds the same to all scores of a query, but for the turn of its position.
        assert (largest > 1e-7).all(), path


def test_routers_report_from_the_layers_that_have_them(tiny, random_params, random_batch):
    config = dataclasses.replace(tiny, **GROUPED, moe_every=2)
    params, batch = random_params(config), random_batch(config)
    report = jax.jit(lambda params: forward(Transformer(config), params, batch)[1])
    before = report(params)
    assert before.keys() == set(Report._fields)
    assert before.pop("load_E").shape == (3, 4)
    assert all(value.shape == (3,) for value in before.values())
    # The second router is that of layer 3: lower ones do not see it change.
    router = params["layers"]["moe"]["router"].copy()
    router[1] *= 2
    moe = {**params["layers"]["moe"], "router": router}
    after = report({**params, "layers": {**params["layers"], "moe": moe}})
    changed = np.asarray(before["router_z_loss"] != after["router_z_loss"])
    np.testing.assert_array_equal(changed, [False, True, True])


def test_initial_values_follow_the_rule_in_every_stack(tiny):
    config = dataclasses.replace(
        tiny,
        **{**GROUPED, "expert_mlp_dim": 48, "shared_mlp_dim": 80},
        embed_dim=64,
        mlp_dim=96,
        moe_every=3,
    )
    params = jax.jit(Transformer(config).init)(
        jax.random.key(0, impl="rbg"), jnp.zeros((1, 2), jnp.int32)
    )["params"]
    layers = params["layers"]
    residual = 1 / np.sqrt(2 * 6)
    expected = {
        ("attention", "query"): 1 / np.sqrt(64),
        ("mlp", "up"): 1 / np.sqrt(64),
        ("mlp", "down"): residual / np.sqrt(96),
        ("moe", "up"): 1 / np.sqrt(64),
        ("moe", "down"): residual / np.sqrt(48),
        ("moe", "shared_gate"): 1 / np.sqrt(64),
        ("moe", "shared_down"): residual / np.sqrt(80),
    }
    for (part, name), std in expected.items():
        leaf = np.asarray(layers[part][name])
        assert np.std(leaf) == pytest.approx(std, rel=0.1), (part, name)
        rows = leaf.reshape(len(leaf), -1)
        assert len(np.unique(rows, axis=0)) == len(leaf), (part, name)
    assert (np.asarray(layers["pre_mlp_norm"]["scale"]) == 1).all()
