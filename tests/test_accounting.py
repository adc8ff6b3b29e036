import dataclasses

import jax
import jax.numpy as jnp
import pytest

from aquila_jax import ModelConfig, Transformer, axes, preset
from aquila_jax.accounting import (
    num_active_parameters,
    num_parameters,
    training_flops_per_token,
)

# Small enough to count on paper.
SMALL = ModelConfig(
    vocab_size=11,
    embed_dim=4,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=2,
    mlp_dim=6,
)
MIXTURE = {"num_experts": 5, "experts_per_token": 2}
EVERY_SECOND = {**MIXTURE, "moe_every": 2, "expert_mlp_dim": 3, "shared_mlp_dim": 7}

VECTORS = ("scale", "bias", "norm")

# One layer of SMALL: query 16, key 8, value 8, out 16; an MLP three times 24.
ATTENTION, MLP, HEAD = 48, 72, 44


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_embeddings": True},
        {"qkv_bias": False},
        MIXTURE,
        {"num_kv_heads": 2},
        EVERY_SECOND,
        {**EVERY_SECOND, "num_layers": 12, "moe_every": 3},
        {**EVERY_SECOND, "qk_norm": True, "shared_expert_gate": True},
    ],
    ids=str,
)
def test_parameters_are_those_of_the_model(changes):
    config = dataclasses.replace(SMALL, **changes)
    tokens = jnp.zeros((1, 3), jnp.int32)
    variables = jax.eval_shape(Transformer(config).init, jax.random.key(0), tokens)
    assert num_parameters(config) == sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))


def test_parameters_of_a_small_model_by_hand():
    gains, biases = (2 * 2 + 1) * 4, 2 * (4 + 2 + 2)
    dense = 2 * (ATTENTION + MLP) + 2 * HEAD + gains + biases
    assert num_parameters(SMALL) == num_active_parameters(SMALL) == dense
    mixture = dataclasses.replace(SMALL, **MIXTURE)
    routers = 2 * 4 * 5
    assert num_parameters(mixture) == dense + 2 * 4 * MLP + routers
    assert num_active_parameters(mixture) == dense + 2 * MLP + routers


def test_parameters_of_a_dense_layer_and_one_with_narrow_and_shared_experts_by_hand():
    config = dataclasses.replace(SMALL, **EVERY_SECOND)
    # An expert is half as wide as an MLP, the shared one 7 units of 3 * 4 weights.
    expert, shared, router = MLP // 2, 7 * 12, 4 * 5
    without = num_parameters(SMALL) - MLP
    assert num_parameters(config) == without + 5 * expert + shared + router
    assert num_active_parameters(config) == without + 2 * expert + shared + router
    cost = training_flops_per_token(config, 8) - training_flops_per_token(SMALL, 8)
    assert cost == 6 * (2 * expert + shared + router - MLP)


@pytest.mark.parametrize("every", [1, 2, 3])
def test_what_a_token_uses_is_all_but_the_experts_it_does_not_visit(every):
    config = dataclasses.replace(SMALL, **{**EVERY_SECOND, "num_layers": 6, "moe_every": every})
    tokens = jnp.zeros((1, 3), jnp.int32)
    params = jax.eval_shape(Transformer(config).init, jax.random.key(0), tokens)["params"]
    moe = params["layers"]["moe"]
    unused = sum(moe[name].size for name in ("gate", "up", "down")) * 3 // 5
    assert num_active_parameters(config) == num_parameters(config) - unused
    # Neither the embedding, as large as the head, nor gains and biases are matrix products.
    vectors = [leaf for path, leaf in axes.flatten(params).items() if path.endswith(VECTORS)]
    matrices = num_active_parameters(config) - sum(leaf.size for leaf in vectors) - HEAD
    attention = 6 * 6 * 8 * (2 * 2)
    assert training_flops_per_token(config, 8) == 6 * matrices + attention


@pytest.mark.parametrize(
    ("name", "total", "active"),
    [
        ("aquila3_1_8b", 1.8e9, 1.8e9),
        ("aquila3_16b", 16.6e9, 16.6e9),
        ("aquila3_8x16b", 105e9, 29e9),
    ],
)
def test_the_papers_models_have_the_papers_sizes(name, total, active):
    assert num_parameters(preset(name)) == pytest.approx(total, rel=0.03)
    assert num_active_parameters(preset(name)) == pytest.approx(active, rel=0.03)


def test_the_papers_7b_has_7_billion_parameters_besides_embedding_and_head():
    config = preset("aquila3_7b")
    inside = num_parameters(config) - 2 * config.vocab_size * config.embed_dim
    assert inside == pytest.approx(7e9, rel=0.03)


def test_flops_are_six_for_every_matrix_element_and_twelve_a_layer_for_every_seen_token():
    length, width = 8, 2 * 2
    # Forward: 2 for the score and 2 for the weighted value; three times that with the backward
    # pass; a token sees half the row.
    attention = 2 * 3 * (2 + 2) * width * length / 2
    assert training_flops_per_token(SMALL, length) == 6 * (2 * (ATTENTION + MLP) + HEAD) + attention
    longer = training_flops_per_token(SMALL, 3 * length)
    assert longer - training_flops_per_token(SMALL, length) == 2 * attention


def test_flops_of_a_mixture_count_the_router_and_only_the_experts_visited():
    mixture = dataclasses.replace(SMALL, **MIXTURE)
    more = training_flops_per_token(mixture, 8) - training_flops_per_token(SMALL, 8)
    assert more == 6 * 2 * (MLP + 4 * 5)
    more_experts = dataclasses.replace(mixture, num_experts=6)
    only_router = training_flops_per_token(more_experts, 8) - training_flops_per_token(mixture, 8)
    assert only_router == 6 * 2 * 4


def test_a_tied_head_costs_what_an_untied_one_does():
    tied = dataclasses.replace(SMALL, tie_embeddings=True)
    assert num_parameters(tied) == num_parameters(SMALL) - HEAD
    assert training_flops_per_token(tied, 8) == training_flops_per_token(SMALL, 8)


def test_norms_of_heads_are_gains_and_the_score_of_a_shared_expert_a_matrix():
    plain = dataclasses.replace(SMALL, **EVERY_SECOND)
    config = dataclasses.replace(plain, qk_norm=True, shared_expert_gate=True)
    gains, score = 2 * 2 * 2, 4
    assert num_parameters(config) == num_parameters(plain) + gains + score
    assert num_active_parameters(config) == num_active_parameters(plain) + gains + score
    cost = training_flops_per_token(config, 8) - training_flops_per_token(plain, 8)
    assert cost == 6 * score


def test_biases_cost_no_flops():
    plain = dataclasses.replace(SMALL, qkv_bias=False)
    assert training_flops_per_token(plain, 8) == training_flops_per_token(SMALL, 8)
