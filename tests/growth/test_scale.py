import dataclasses
import functools

import jax
import pytest

from aquila_jax import UserError, preset, scale_out, scale_up
from aquila_jax.axes import abstract_params
from aquila_jax.growth import ScaleOut, ScaleUp


def refusal(grow, *arguments, **settings):
    with pytest.raises(UserError) as error:
        grow(*arguments, **settings)
    return str(error.value)


@pytest.mark.parametrize(
    ("source_changes", "target_changes", "named"),
    [
        ({}, {"embed_dim": 11}, ["embed_dim", "12", "11", "at least 12"]),
        ({}, {"num_layers": 2}, ["num_layers", "3", "2", "at least 3"]),
        ({}, {"num_heads": 2}, ["num_heads", "4", "2", "at least 4"]),
        ({}, {"mlp_dim": 19}, ["mlp_dim", "20", "19", "at least 20"]),
        ({}, {"head_dim": 8}, ["head_dim", "6", "8", "rotary", "head_dim to 6"]),
        ({}, {"num_kv_heads": 1}, ["num_kv_heads", "2", "1", "at least 2"]),
        ({}, {"num_kv_heads": 4}, ["2 query heads", "into 1", "num_heads to at least 8"]),
        (
            {},
            {"num_kv_heads": 4, "num_heads": 8},
            ["aki_pro", "num_kv_heads", "2", "4", "num_kv_heads to 2"],
        ),
        ({}, {"vocab_size": 60}, ["vocab_size", "61", "60", "at least 61"]),
        ({}, {"rope_theta": 50.0}, ["rope_theta", "100.0", "50.0", "rope_theta to 100.0"]),
        ({}, {"norm_eps": 1e-6}, ["norm_eps", "1e-05", "1e-06", "norm_eps to 1e-05"]),
        ({}, {"qkv_bias": False}, ["qkv_bias", "True", "False", "qkv_bias to True"]),
        ({"qkv_bias": False}, {"qkv_bias": True}, ["qkv_bias", "qkv_bias to False"]),
        ({}, {"tie_embeddings": True}, ["untied", "tie_embeddings to False"]),
        (
            {},
            {"num_experts": 4, "experts_per_token": 2},
            ["num_experts", "0", "4", "scale_out", "num_experts to 0"],
        ),
        (
            {"num_experts": 4, "experts_per_token": 2},
            {"experts_per_token": 3},
            ["experts_per_token", "2", "3", "experts_per_token to 2"],
        ),
        (
            {},
            {"renormalize_gates": False},
            ["renormalize_gates", "True", "False", "renormalize_gates to True"],
        ),
    ],
    ids=str,
)
def test_a_target_out_of_reach_names_field_values_and_way_out(
    tiny, random_params, source_changes, target_changes, named
):
    source = dataclasses.replace(tiny, **source_changes)
    target = dataclasses.replace(source, **target_changes)
    message = refusal(scale_up, random_params(source), source, target)
    for words in named:
        assert words in message
    assert "\n" not in message


def test_heads_that_do_not_fill_their_groups_are_refused_by_the_config(tiny):
    message = refusal(dataclasses.replace, tiny, num_heads=5)
    assert "num_heads (5)" in message
    assert "num_kv_heads (2)" in message


def test_the_context_may_change(tiny, random_params):
    target = dataclasses.replace(tiny, context_length=64)
    grown = scale_up(random_params(tiny), tiny, target)
    assert grown.config.context_length == 64
    assert grown.certificate.exact


def test_the_papers_models_grow_into_each_other():
    source, target = preset("aquila3_7b"), preset("aquila3_16b")
    grow = functools.partial(scale_up, config=source, target_config=target)
    params = jax.eval_shape(grow, abstract_params(source)).params
    assert params == abstract_params(target)
    out = functools.partial(scale_out, config=target, key=jax.random.key(0))
    mixture = jax.eval_shape(out, params)
    assert mixture.config == preset("aquila3_8x16b")
    assert mixture.params == abstract_params(mixture.config)


def test_unknown_methods_are_refused_with_the_known_ones(tiny, random_params):
    params = random_params(tiny)
    message = refusal(scale_up, params, tiny, tiny, method="copy")
    assert "'copy'" in message
    assert "fpi, isometric, zero_pad, aki, aki_pro, latent" in message
    message = refusal(scale_up, params, tiny, tiny, depth="shuffle")
    assert "'shuffle'" in message
    assert "stacking, interpolation, solar, identity" in message
    assert "even, uneven" in refusal(scale_up, params, tiny, tiny, split="odd")
    assert "mean, zero" in refusal(scale_up, params, tiny, tiny, new_head="one")
    assert "-0.5" in refusal(scale_up, params, tiny, tiny, noise=-0.5)
    assert "nan" in refusal(scale_up, params, tiny, tiny, noise=float("nan"))


def test_tied_embeddings_have_no_head_to_fill_with_zeros(tiny, random_params):
    tied = dataclasses.replace(tiny, tie_embeddings=True)
    target = dataclasses.replace(tied, vocab_size=70)
    message = refusal(scale_up, random_params(tied), tied, target, new_head="zero")
    assert "tie_embeddings to False" in message


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"num_experts": 2, "experts_per_token": 3}, ["(3)", "(2)"]),
        ({"num_experts": 4, "experts_per_token": 0}, ["(0)", "(4)"]),
        ({"num_experts": 0}, ["num_experts", "at least 1", "not 0"]),
        ({"router_std": -0.5}, ["router_std", "-0.5"]),
    ],
    ids=str,
)
def test_impossible_experts_are_refused_with_their_numbers(tiny, random_params, settings, named):
    message = refusal(scale_out, random_params(tiny), tiny, key=jax.random.key(0), **settings)
    for words in named:
        assert words in message


def test_experts_on_experts_are_refused(tiny, random_params):
    config = dataclasses.replace(tiny, num_experts=4, experts_per_token=2)
    message = refusal(scale_out, random_params(config), config, key=jax.random.key(0))
    assert "already has 4 experts" in message
    assert "dense" in message


def test_a_run_that_scales_out_must_keep_the_rest_of_its_model(tiny):
    mixture = dataclasses.replace(tiny, num_experts=4, experts_per_token=2)
    _, certificate = ScaleOut(router_std=0.1).plan(tiny, mixture)
    assert certificate.target == mixture
    wider = dataclasses.replace(mixture, mlp_dim=40)
    message = refusal(ScaleOut().plan, tiny, wider)
    for words in ("mlp_dim", "20", "40", "scale up first"):
        assert words in message


def test_a_run_that_scales_up_makes_the_same_plan(tiny):
    target = dataclasses.replace(tiny, embed_dim=18, num_layers=5)
    _, certificate = ScaleUp(method="aki").plan(tiny, target)
    assert (certificate.method, certificate.depth) == ("aki", "stacking")
    _, certificate = ScaleUp(method="fpi", depth="stacking").plan(tiny, target)
    assert (certificate.method, certificate.depth) == ("fpi", "stacking")
    assert (ScaleUp().kind, ScaleOut().kind) == ("scale_up", "scale_out")
