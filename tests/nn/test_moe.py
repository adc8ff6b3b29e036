import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aquila_jax.nn import Transformer, forward
from aquila_jax.nn.losses import cross_entropy
from aquila_jax.nn.moe import route

E = 4


def route_all(logits, is_token=None, k=2, renormalize=True):
    logits = jnp.asarray(logits, jnp.float32)
    is_token = jnp.ones(logits.shape[:2], bool) if is_token is None else jnp.asarray(is_token)
    return route(logits, is_token, experts_per_token=k, renormalize=renormalize)


def random_logits(rows=3, tokens=7, seed=0):
    return np.random.default_rng(seed).normal(size=(rows, tokens, E)).astype(np.float32)


def test_a_uniform_router_has_load_balance_one_and_z_log_experts_squared():
    routing = route_all(np.zeros((2, 5, E)), k=E)
    assert routing.load_balance_loss == pytest.approx(1, rel=1e-6)
    assert routing.router_z_loss == pytest.approx(np.log(E) ** 2, rel=1e-6)


@pytest.mark.parametrize("k", [1, 2, 3])
def test_a_uniform_router_is_balanced_however_ties_are_broken(k):
    assert route_all(np.zeros((2, 5, E)), k=k).load_balance_loss == pytest.approx(1, rel=1e-6)


def test_all_tokens_to_one_expert_cost_the_number_of_experts():
    logits = np.zeros((2, 5, E))
    logits[..., 1] = 50
    routing = route_all(logits, k=1)
    assert routing.load_balance_loss == pytest.approx(E, rel=1e-6)
    np.testing.assert_array_equal(routing.load_E, [0, 1, 0, 0])


@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_losses_equal_their_formulas_token_by_token(k):
    logits = random_logits().astype(np.float64)
    counts, mean_probability, z = np.zeros(E), np.zeros(E), 0.0
    for token in logits.reshape(-1, E):
        probabilities = np.exp(token) / np.exp(token).sum()
        counts[np.argsort(-token)[:k]] += 1
        mean_probability += probabilities / 21
        z += np.log(np.exp(token).sum()) ** 2 / 21
    routing = route_all(logits, k=k)
    np.testing.assert_allclose(routing.load_E, counts / (21 * k), rtol=1e-6)
    expected = E * (counts / (21 * k)) @ mean_probability
    assert routing.load_balance_loss == pytest.approx(expected, rel=1e-5)
    assert routing.router_z_loss == pytest.approx(z, rel=1e-5)


def test_padding_is_neither_counted_nor_charged():
    logits = random_logits(rows=2, tokens=6)
    is_token = np.zeros((2, 6), bool)
    is_token[0], is_token[1, :2] = True, True
    alone = route_all(logits[is_token][None])
    logits[~is_token] = 100.0
    padded = route_all(logits, is_token)
    for name in ("load_balance_loss", "router_z_loss", "load_E"):
        np.testing.assert_allclose(getattr(padded, name), getattr(alone, name), rtol=1e-5)


@pytest.mark.parametrize("k", [1, 2, 4])
def test_gates_are_the_largest_probabilities_divided_by_their_sum_when_asked(k):
    logits = random_logits()
    probabilities = np.asarray(jax.nn.softmax(logits))
    plain = np.asarray(route_all(logits, k=k, renormalize=False).gates_BTE)
    assert ((plain > 0).sum(axis=-1) == k).all()
    np.testing.assert_array_equal(plain[plain > 0], probabilities[plain > 0])
    assert (np.where(plain > 0, 0, probabilities).max(-1) <= np.sort(plain)[..., -k]).all()
    renormalised = np.asarray(route_all(logits, k=k).gates_BTE)
    np.testing.assert_allclose(renormalised, plain / plain.sum(-1, keepdims=True), rtol=1e-6)


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
