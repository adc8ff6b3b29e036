import dataclasses

import jax
import numpy as np
import pytest

from aquila_jax import UserError, scale_out, scale_up
from aquila_jax.axes import flatten
from aquila_jax.growth import ScaleOut
from aquila_jax.growth.compose import apply_plan
from aquila_jax.growth.rules import Mapped

TOKENS = np.array([[3, 1, 4, 1, 5, 9, 2, 6]])
KEY = jax.random.key(0)


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


def scaled_out(params, config, **how):
    """The mixture in the source's precision, as NumPy."""
    with jax.enable_x64(True):
        grown = scale_out(params, config, key=jax.random.key(0), **how)
        return grown._replace(params=jax.tree.map(np.asarray, grown.params))


EXACT = [
    {"granularity": 2},
    {"granularity": 5, "num_experts": 3, "experts_per_token": 1},
    {"shared_mlp_dim": 8},
    {"moe_every": 3},
    {"granularity": 4, "shared_mlp_dim": 4, "moe_every": 3, "router_std": 1.0},
    {"renormalize_gates": False, "num_experts": 3, "experts_per_token": 3, "granularity": 2},
]


@pytest.mark.parametrize("how", EXACT, ids=str)
def test_slices_shared_units_and_dense_layers_keep_the_logits(
    tiny, random_params, reference_logits, how
):
    params = random_params(tiny, dtype=np.float64)
    grown = scaled_out(params, tiny, **how)
    assert grown.certificate.exact
    np.testing.assert_allclose(
        reference_logits(grown.config, grown.params, TOKENS),
        reference_logits(tiny, params, TOKENS),
        rtol=0,
        atol=1e-9,
    )


@pytest.mark.parametrize(
    "how",
    [
        {"noise": 0.1},
        {"redraw": 0.5},
        {"granularity": 4, "spread_scale": True},
        {"renormalize_gates": False},
        {"renormalize_gates": False, "compensate": True, "router_std": 1.0},
    ],
    ids=str,
)
def test_what_changes_the_function_is_not_called_exact(tiny, random_params, reference_logits, how):
    params = random_params(tiny, dtype=np.float64)
    grown = scaled_out(params, tiny, **how)
    change = reference_logits(grown.config, grown.params, TOKENS) - reference_logits(
        tiny, params, TOKENS
    )
    assert not grown.certificate.exact
    assert np.abs(change).max() > 1e-3


def test_compensation_makes_up_for_gates_that_do_not_sum_to_one(
    tiny, random_params, reference_logits
):
    params = random_params(tiny, dtype=np.float64)
    before = reference_logits(tiny, params, TOKENS)

    def error(**how):
        # A router of almost zero: every gate is almost 1 / E.
        grown = scaled_out(params, tiny, renormalize_gates=False, router_std=1e-6, **how)
        return np.abs(reference_logits(grown.config, grown.params, TOKENS) - before).max()

    assert error() > 0.1
    assert error(compensate=True) < 1e-4
    assert error(compensate=True, granularity=2) < 1e-4


def test_slices_of_a_copy_stand_side_by_side_and_share_a_router_column(tiny, random_params):
    params = random_params(tiny)
    grown = scaled_out(params, tiny, num_experts=3, granularity=4)
    config = grown.config
    assert (config.num_experts, config.experts_per_token, config.expert_dim) == (12, 8, 5)
    moe, mlp = grown.params["layers"]["moe"], params["layers"]["mlp"]
    for expert in range(12):
        units = slice(5 * (expert % 4), 5 * (expert % 4) + 5)
        np.testing.assert_array_equal(moe["gate"][:, expert], mlp["gate"][..., units])
        np.testing.assert_array_equal(moe["down"][:, expert], 4 * mlp["down"][:, units])
        same = moe["router"][..., expert] == moe["router"][..., 4 * (expert // 4)]
        assert same.all()
    assert (moe["router"][..., 0] != moe["router"][..., 4]).all()


def test_the_spread_scale_is_the_cube_root_on_each_of_three(tiny, random_params):
    params = random_params(tiny, dtype=np.float64)
    grown = scaled_out(params, tiny, granularity=2, spread_scale=True)
    for name, leaf in params["layers"]["mlp"].items():
        half = leaf[:, :10] if name == "down" else leaf[..., :10]
        np.testing.assert_allclose(
            grown.params["layers"]["moe"][name][:, 0], half * 2 ** (1 / 3), rtol=1e-12
        )


def test_shared_units_are_the_last_and_routed_ones_the_others(tiny, random_params):
    params = random_params(tiny)
    moe = scaled_out(params, tiny, shared_mlp_dim=8).params["layers"]["moe"]
    up, down = params["layers"]["mlp"]["up"], params["layers"]["mlp"]["down"]
    np.testing.assert_array_equal(moe["shared_up"], up[..., 12:])
    np.testing.assert_array_equal(moe["shared_down"], down[:, 12:])
    np.testing.assert_array_equal(moe["up"][:, 5], up[..., :12])


def test_layers_without_experts_keep_their_mlp(tiny, random_params):
    params = random_params(tiny)
    grown = scaled_out(params, tiny, moe_every=3).params["layers"]
    up = params["layers"]["mlp"]["up"]
    np.testing.assert_array_equal(grown["mlp"]["up"], up[:2])
    np.testing.assert_array_equal(grown["moe"]["up"][0, 3], up[2])
    assert grown["moe"]["router"].shape == (1, 12, 8)


def test_redrawn_units_are_the_same_in_all_three_and_have_their_statistics(tiny, random_params):
    source = dataclasses.replace(tiny, embed_dim=60, mlp_dim=100)
    params = random_params(source)
    params["layers"]["mlp"]["gate"] += np.float32(0.3)
    grown = scaled_out(params, source, redraw=0.4, num_experts=4)
    moe, mlp = grown.params["layers"]["moe"], params["layers"]["mlp"]
    changed = {
        name: (moe[name] != mlp[name][:, None]).any(axis=3 if name == "down" else 2) for name in mlp
    }
    assert (changed["up"].sum(axis=-1) == 40).all()
    for name in ("gate", "down"):
        np.testing.assert_array_equal(changed[name], changed["up"])
    assert len({row.tobytes() for row in changed["up"].reshape(-1, 100)}) == 12
    for layer, expert in ((0, 0), (2, 3)):
        units = changed["up"][layer, expert]
        for name in ("gate", "up"):
            drawn = moe[name][layer, expert][:, units]
            replaced = mlp[name][layer][:, units]
            error = replaced.std() / np.sqrt(drawn.size)
            assert abs(drawn.mean() - replaced.mean()) < 4 * error
            assert drawn.std() == pytest.approx(replaced.std(), rel=0.06)


def test_noise_falls_on_the_asked_share_of_the_weights(tiny, random_params):
    source = dataclasses.replace(tiny, embed_dim=60, mlp_dim=100)
    params = random_params(source)
    grown = scaled_out(params, source, noise=0.5, noise_fraction=0.25)
    change = grown.params["layers"]["moe"]["up"] - params["layers"]["mlp"]["up"][:, None]
    is_changed = change != 0
    assert is_changed.mean() == pytest.approx(0.25, rel=0.02)
    assert change[is_changed].std() == pytest.approx(0.5 / np.sqrt(60), rel=0.02)
    assert not np.array_equal(is_changed[:, 0], is_changed[:, 1])


@pytest.mark.parametrize(
    "how",
    [
        ScaleOut(granularity=2, noise=0.1, noise_fraction=0.5),
        ScaleOut(redraw=0.5, router_std=0.5),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_eager_jitted_and_layer_by_layer_mixtures_have_the_same_bits(
    tiny, random_params, how, dtype
):
    size = how.expert_dim(tiny, 4)
    target = dataclasses.replace(
        tiny, num_experts=8, experts_per_token=2, expert_mlp_dim=size, shared_mlp_dim=4
    )
    plan, _ = how.plan(tiny, target)
    params = random_params(tiny, dtype=jax.numpy.dtype(dtype))

    def grow(params):
        return apply_plan(plan, params, target, KEY)

    eager = flatten(jax.tree.map(np.asarray, grow(params)))
    jitted = flatten(jax.tree.map(np.asarray, jax.jit(grow)(params)))
    source = flatten(params)
    for path, leaf in eager.items():
        rule = plan[path]
        assert leaf.tobytes() == jitted[path].tobytes(), path
        rows = [np.array([row]) for row in range(3)]
        if not isinstance(rule, Mapped):
            shape = (1, *leaf.shape[1:])
            parts = [np.asarray(rule.draw(shape, leaf.dtype, path, KEY, row)) for row in rows]
        elif rule.layers is None:
            continue
        else:
            stacked = source[rule.source]
            parts = [rule.build(lambda n, s=stacked: s[n], path, KEY, row, np) for row in rows]
        assert np.concatenate(parts).tobytes() == leaf.tobytes(), path


def test_a_mixture_grows_in_width_and_depth_like_a_dense_model(
    tiny, random_params, reference_logits
):
    shape = {
        "num_experts": 4,
        "experts_per_token": 2,
        "expert_mlp_dim": 6,
        "shared_mlp_dim": 3,
        "moe_every": 3,
    }
    source = dataclasses.replace(tiny, **shape)
    target = dataclasses.replace(
        source, embed_dim=17, num_heads=6, mlp_dim=23, expert_mlp_dim=9, shared_mlp_dim=5
    )
    params = random_params(source, dtype=np.float64)
    for method in ("isometric", "latent"):
        with jax.enable_x64(True):
            grown = scale_up(params, source, target, method=method)
        after = reference_logits(target, jax.tree.map(np.asarray, grown.params), TOKENS)
        before = reference_logits(source, params, TOKENS)
        np.testing.assert_allclose(after, before, rtol=0, atol=1e-9)
        assert grown.certificate.exact


def test_depth_keeps_experts_where_they_are_or_says_why_not(tiny, random_params):
    source = dataclasses.replace(tiny, num_experts=2, experts_per_token=1, moe_every=3)
    target = dataclasses.replace(source, num_layers=6)
    params = random_params(source)
    deeper = scale_up(params, source, target, method="aki", depth="stacking").params["layers"]
    up = params["layers"]["moe"]["up"]
    np.testing.assert_array_equal(deeper["moe"]["up"], np.concatenate([up, up]))
    with pytest.raises(UserError, match=r"every 3 layers .* use stacking"):
        scale_up(params, source, target, method="aki_pro")


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"granularity": 3}, "20 hidden units .* cannot be cut into 3"),
        ({"granularity": 4, "shared_mlp_dim": 3}, "17 hidden units .* cannot be cut into 4"),
        ({"shared_mlp_dim": 20}, "0 hidden units"),
        ({"granularity": 0}, "granularity must be a whole number, at least 1, not 0"),
        ({"granularit": 2}, "scale_out knows no granularit; it knows"),
        ({"redraw": 1.5}, "redraw is a share of units, from 0 to 1, not 1.5"),
        ({"noise": -1.0}, "noise must be a number, at least 0, not -1.0"),
        ({"router_std": float("nan")}, "router_std must be a number, at least 0, not nan"),
        ({"noise": 0.1, "noise_fraction": 0.0}, "noise_fraction must lie in"),
        ({"compensate": True}, "renormalised gates: set renormalize_gates to False"),
        ({"moe_every": 2}, "num_layers .3. must be a multiple of moe_every .2."),
    ],
    ids=str,
)
def test_impossible_mixtures_are_refused(tiny, random_params, how, message):
    with pytest.raises(UserError, match=message):
        scale_out(random_params(tiny), tiny, key=jax.random.key(0), **how)
