import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aquila_jax import Transformer, UserError
from aquila_jax.axes import flatten
from aquila_jax.growth import ScaleOut, ScaleUp
from aquila_jax.growth.compose import apply_plan
from aquila_jax.growth.optimizer_state import grow_moments

LARGER = {"embed_dim": 17, "num_heads": 6, "mlp_dim": 33, "num_layers": 5}
TWICE = {"embed_dim": 24, "num_heads": 6, "mlp_dim": 33}


@pytest.fixture(scope="module")
def gradients(random_batch):
    """The gradient of the mean log-likelihood, in float64."""

    def compute(config, params):
        batch = random_batch(config)
        with jax.enable_x64(True):
            model = Transformer(config, dtype=jnp.float64)

            def loss(params):
                logits = model.apply({"params": params}, batch["tokens"])
                logits = jnp.asarray(logits)[..., :61]
                chosen = jnp.take_along_axis(logits, batch["targets"][..., None], axis=-1)
                return jnp.mean(jax.nn.logsumexp(logits, axis=-1) - chosen[..., 0])

            return jax.tree.map(np.asarray, jax.jit(jax.grad(loss))(params))

    return compute


def mapped(plan, certificate, gradient, **how):
    settings = {"power": 1, "policy": "map", **how}
    with jax.enable_x64(True):
        grown = grow_moments(plan, certificate, gradient, **settings)
        return flatten(jax.tree.map(np.asarray, grown))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    ("growth", "changes"),
    [
        (ScaleUp("fpi"), TWICE),
        (ScaleUp("fpi", split="uneven"), {"num_heads": 6, "mlp_dim": 33}),
        (ScaleUp("isometric"), LARGER),
        (ScaleUp("isometric"), {"num_kv_heads": 3, "num_heads": 9}),
        (ScaleUp("zero_pad"), LARGER),
        (ScaleUp("latent"), LARGER),
    ],
    ids=str,
)
def test_the_mapped_gradient_is_that_of_the_grown_model(
    tiny, random_params, gradients, growth, changes, tied
):
    source = dataclasses.replace(tiny, tie_embeddings=tied)
    target = dataclasses.replace(source, **changes)
    plan, certificate = growth.plan(source, target)
    params = random_params(source, dtype=np.float64)
    with jax.enable_x64(True):
        grown = apply_plan(plan, params, target, key=None)
    before, after = gradients(source, params), flatten(gradients(target, grown))
    predicted = mapped(plan, certificate, before)
    told = mapped(plan, certificate, jax.tree.map(np.ones_like, params))
    for path, gradient in after.items():
        is_told = told[path] != 0
        assert is_told.mean() > 0.2, path
        if growth.method in ("fpi", "isometric") and "num_layers" not in changes:
            assert is_told.all(), path
        error = np.abs(predicted[path] - gradient)[is_told].max()
        # The attention's softmax is computed in float32 whatever the model's dtype.
        assert error < 1e-6 * max(1.0, np.abs(gradient).max()), path


def test_second_moments_take_the_squares_of_the_factors(tiny, random_params):
    plan, certificate = ScaleUp("isometric").plan(tiny, dataclasses.replace(tiny, **LARGER))
    gradient = random_params(tiny, dtype=np.float64)
    squares = jax.tree.map(np.square, gradient)
    first = mapped(plan, certificate, gradient)
    second = mapped(plan, certificate, squares, power=2)
    for path, moment in second.items():
        np.testing.assert_allclose(moment, np.square(first[path]), rtol=1e-12, err_msg=path)


def test_old_units_keep_their_moments_and_new_ones_have_none(tiny, random_params):
    target = dataclasses.replace(tiny, mlp_dim=30, num_layers=4)
    plan, certificate = ScaleUp("fpi", depth="stacking").plan(tiny, target)
    moments = random_params(tiny, dtype=np.float64)
    kept = mapped(plan, certificate, moments, policy="keep_old_zero_new")
    whole = mapped(plan, certificate, moments)
    up = kept["layers/mlp/up"]
    np.testing.assert_array_equal(up[:3, :, :20], whole["layers/mlp/up"][:3, :, :20])
    assert not up[:, :, 20:].any()
    assert not up[3].any()
    assert whole["layers/mlp/up"].all()
    np.testing.assert_array_equal(
        kept["token_embedder/embedding"], moments["token_embedder"]["embedding"]
    )


def test_reset_forgets_everything(tiny, random_params):
    plan, certificate = ScaleUp("fpi").plan(tiny, dataclasses.replace(tiny, **LARGER))
    moments = mapped(plan, certificate, random_params(tiny), policy="reset")
    assert not any(moment.any() for moment in moments.values())
    assert moments["layers/mlp/up"].shape == (5, 17, 33)


def test_untied_embeddings_start_without_moments(tiny, random_params):
    source = dataclasses.replace(tiny, tie_embeddings=True)
    target = dataclasses.replace(tiny, tie_embeddings=False)
    plan, certificate = ScaleUp("fpi").plan(source, target)
    moments = mapped(plan, certificate, random_params(source))
    assert not moments["lm_head/kernel"].any()
    assert not moments["token_embedder/embedding"].any()
    assert moments["layers/mlp/up"].all()


@pytest.mark.parametrize("policy", ["map", "keep_old_zero_new"])
def test_experts_share_the_moments_of_their_mlp(tiny, random_params, policy):
    target = dataclasses.replace(tiny, num_experts=4, experts_per_token=2)
    plan, certificate = ScaleOut().plan(tiny, target)
    moments = random_params(tiny, dtype=np.float64)
    grown = mapped(plan, certificate, moments, power=2, policy=policy)
    down = grown["layers/moe/down"]
    mlp = moments["layers"]["mlp"]["down"]
    shares = [1 / 16] * 4 if policy == "map" else [1, 0, 0, 0]
    for expert, share in enumerate(shares):
        np.testing.assert_allclose(down[:, expert], share * mlp, rtol=1e-12)
    assert not grown["layers/moe/router"].any()


def test_an_unknown_policy_is_refused_with_the_known_ones(tiny, random_params):
    plan, certificate = ScaleUp("fpi").plan(tiny, tiny)
    with pytest.raises(UserError, match="'forget'; there are reset, map, keep_old_zero_new"):
        mapped(plan, certificate, random_params(tiny), policy="forget")
