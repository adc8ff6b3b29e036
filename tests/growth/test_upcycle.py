import dataclasses

import jax
import numpy as np
import pytest

from aquila_jax import scale_out
from aquila_jax.axes import flatten


@pytest.fixture
def upcycled(tiny, random_params):
    return scale_out(random_params(tiny), tiny, num_experts=4, key=jax.random.key(0))


@pytest.mark.parametrize("k", [1, 2, 4])
def test_upcycling_with_renormalised_gates_keeps_the_logits(
    tiny, random_params, random_batch, model_logits, k
):
    params, batch = random_params(tiny), random_batch(tiny)
    packed = [batch[name] for name in ("tokens", "segment_ids", "positions")]
    grown = scale_out(
        params, tiny, num_experts=4, experts_per_token=k, router_std=1.0, key=jax.random.key(0)
    )
    assert grown.certificate.exact
    np.testing.assert_allclose(
        model_logits(grown.config, grown.params, *packed),
        model_logits(tiny, params, *packed),
        rtol=0,
        atol=1e-5,
    )


@pytest.mark.parametrize(("k", "exact"), [(1, False), (2, False), (4, True)])
def test_upcycling_without_renormalised_gates_is_exact_only_with_all_experts(
    tiny, random_params, random_batch, reference_logits, k, exact
):
    source = dataclasses.replace(tiny, renormalize_gates=False)
    params, tokens = random_params(source), random_batch(source)["tokens"]
    grown = scale_out(params, source, num_experts=4, experts_per_token=k, key=jax.random.key(0))
    change = reference_logits(grown.config, grown.params, tokens) - reference_logits(
        source, params, tokens
    )
    assert grown.certificate.exact == exact
    assert np.abs(change).max() < 1e-10 if exact else np.abs(change).max() > 1e-2


def test_every_expert_is_a_copy_of_the_mlp_and_the_rest_stays(tiny, random_params, upcycled):
    source, grown = flatten(random_params(tiny)), flatten(upcycled.params)
    for path, leaf in grown.items():
        if path == "layers/moe/router":
            assert leaf.shape == (3, 12, 4)
        elif "/moe/" in path:
            assert leaf.shape[1] == 4
            for expert in range(4):
                mlp = source[path.replace("moe", "mlp")]
                np.testing.assert_array_equal(leaf[:, expert], mlp)
        else:
            np.testing.assert_array_equal(leaf, source[path])
    assert len(grown) == len(source) + 1
    assert upcycled.config == dataclasses.replace(tiny, num_experts=4, experts_per_token=2)


def test_the_router_is_normal_with_the_asked_deviation(tiny, random_params):
    config = dataclasses.replace(tiny, embed_dim=100)
    params = random_params(config)
    for std in (0.02, 0.5):
        grown = scale_out(params, config, num_experts=50, router_std=std, key=jax.random.key(3))
        router = np.asarray(grown.params["layers"]["moe"]["router"])
        assert router.std() == pytest.approx(std, rel=0.03)
        assert abs(router.mean()) < 0.03 * std
        assert abs(np.mean((router / std) ** 4) - 3) < 0.2
        assert not np.array_equal(router[0], router[1])


def test_the_router_depends_on_the_key_alone(tiny, random_params, upcycled):
    def router(params, seed):
        grown = scale_out(params, tiny, num_experts=4, key=jax.random.key(seed))
        return np.asarray(grown.params["layers"]["moe"]["router"])

    first = np.asarray(upcycled.params["layers"]["moe"]["router"])
    np.testing.assert_array_equal(router(random_params(tiny, seed=1), 0), first)
    assert (router(random_params(tiny), 1) != first).all()


def test_a_router_without_deviation_is_zero(tiny, random_params):
    grown = scale_out(random_params(tiny), tiny, router_std=0.0, key=jax.random.key(0))
    assert not np.asarray(grown.params["layers"]["moe"]["router"]).any()
