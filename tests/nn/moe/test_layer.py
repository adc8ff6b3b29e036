import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aquila_jax.nn import Transformer, forward
from aquila_jax.nn.losses import cross_entropy

E = 4


@functools.cache
def gradient_function(config):
    def loss(params, batch):
        logits, _ = forward(Transformer(config, dtype=jnp.float64), params, batch)
        return cross_entropy(logits, batch["targets"], batch["loss_weights"]).mean

    return jax.jit(jax.grad(loss))


@pytest.mark.parametrize(
    ("equal_experts", "renormalize", "is_zero"),
    [(True, True, True), (True, False, False), (False, True, False)],
)
def test_equal_experts_with_renormalised_gates_give_the_router_no_gradient(
    tiny, random_params, random_batch, equal_experts, renormalize, is_zero
):
    config = dataclasses.replace(
        tiny, num_experts=E, experts_per_token=2, renormalize_gates=renormalize
    )
    params, batch = random_params(config, dtype=np.float64), random_batch(config)
    if equal_experts:
        for name in ("gate", "up", "down"):
            leaf = params["layers"]["moe"][name]
            params["layers"]["moe"][name] = np.repeat(leaf[:, :1], E, axis=1)
    with jax.enable_x64(True):
        gradients = gradient_function(config)(params, batch)
        largest = np.abs(gradients["layers"]["moe"]["router"]).max()
    assert largest < 1e-14 if is_zero else largest > 1e-4


def test_forward_reports_every_layer_and_nothing_for_a_dense_model(
    tiny, random_params, random_batch
):
    config = dataclasses.replace(tiny, num_experts=E, experts_per_token=2)
    params, batch = random_params(config), random_batch(config)
    _, routing = jax.jit(lambda p: forward(Transformer(config), p, batch))(params)
    assert routing["load_E"].shape == (config.num_layers, E)
    assert routing["load_balance_loss"].shape == routing["router_z_loss"].shape == (3,)
    np.testing.assert_allclose(routing["load_E"].sum(axis=1), 1, rtol=1e-6)
    assert len(np.unique(routing["router_z_loss"])) == config.num_layers
    _, nothing = jax.eval_shape(lambda p: forward(Transformer(tiny), p, batch), random_params(tiny))
    assert nothing == {}


def test_padding_tokens_do_not_reach_the_router_losses_of_the_model(
    tiny, random_params, random_batch
):
    config = dataclasses.replace(tiny, num_experts=E, experts_per_token=2)
    params, batch = random_params(config), random_batch(config)
    report = jax.jit(lambda params, batch: forward(Transformer(config), params, batch)[1])
    tokens = batch["tokens"].at[:, -2:].set((batch["tokens"][:, -2:] + 7) % config.vocab_size)
    before, after = report(params, batch), report(params, {**batch, "tokens": tokens})
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), before, after)
