"""What exact operators promise, for random shapes: the function is kept and may be composed."""

import dataclasses

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aquila_jax import ModelConfig, RopeScaling, UserError, scale_up
from aquila_jax.axes import flatten
from aquila_jax.growth import ScaleOut, ScaleUp
from aquila_jax.growth.compose import apply_plan
from aquila_jax.growth.rules import Mapped

EXACT = ("isometric", "zero_pad", "latent")
TOKENS = np.array([[3, 1, 4, 1, 5, 9, 2, 6]])


@st.composite
def growths(draw):
    """A source and a target that is larger in every way there is, by no whole factor."""
    groups, per_group = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    is_mixture = draw(st.booleans())
    source = ModelConfig(
        vocab_size=draw(st.integers(10, 14)),
        embed_dim=draw(st.integers(2, 7)),
        num_layers=draw(st.integers(1, 3)),
        num_heads=groups * per_group,
        num_kv_heads=groups,
        head_dim=2 * draw(st.integers(1, 2)),
        mlp_dim=draw(st.integers(1, 7)),
        norm_eps=draw(st.sampled_from([1e-6, 0.1])),
        rope_scaling=draw(st.sampled_from([None, RopeScaling("llama3", 4.0, 1.0, 4.0, 16)])),
        qkv_bias=draw(st.booleans()),
        qk_norm=draw(st.booleans()),
        tie_embeddings=draw(st.booleans()),
        num_experts=3 * is_mixture,
        experts_per_token=2 * is_mixture,
        shared_mlp_dim=3 * is_mixture,
        shared_expert_gate=is_mixture and draw(st.booleans()),
    )
    groups += draw(st.integers(0, 2))
    target = dataclasses.replace(
        source,
        vocab_size=source.vocab_size + draw(st.integers(0, 2)),
        embed_dim=source.embed_dim + draw(st.integers(0, 9)),
        num_layers=source.num_layers + draw(st.integers(0, 3)),
        num_kv_heads=groups,
        num_heads=groups * (per_group + draw(st.integers(0, 2))),
        mlp_dim=source.mlp_dim + draw(st.integers(0, 9)),
        shared_mlp_dim=is_mixture * (3 + draw(st.integers(0, 2))),
        tie_embeddings=source.tie_embeddings and draw(st.booleans()),
    )
    return source, target


def grow(params, source, target, **how):
    """Grown parameters as NumPy, in float64 where the source's are."""
    with jax.enable_x64(True):
        grown = scale_up(params, source, target, **how)
        return jax.tree.map(np.asarray, grown.params), grown.certificate


@settings(max_examples=12, deadline=None)
@given(pair=growths(), method=st.sampled_from(EXACT), split=st.sampled_from(["even", "uneven"]))
def test_any_growth_keeps_the_logits(random_params, reference_logits, pair, method, split):
    source, target = pair
    params = random_params(source, dtype=np.float64)
    grown, certificate = grow(params, source, target, method=method, split=split, depth="identity")
    before = reference_logits(source, params, TOKENS)
    after = reference_logits(target, grown, TOKENS)[..., : source.vocab_size]
    assert certificate.exact
    np.testing.assert_allclose(after, before, rtol=0, atol=1e-9)


@pytest.mark.parametrize("method", EXACT)
@pytest.mark.parametrize("tied", [False, True])
def test_the_float32_model_keeps_its_logits(tiny, random_params, model_logits, method, tied):
    source = dataclasses.replace(tiny, tie_embeddings=tied)
    target = dataclasses.replace(
        source, embed_dim=17, num_heads=9, num_kv_heads=3, mlp_dim=33, num_layers=5
    )
    params = random_params(source)
    grown = scale_up(params, source, target, method=method)
    np.testing.assert_allclose(
        model_logits(target, grown.params, TOKENS),
        model_logits(source, params, TOKENS),
        rtol=0,
        atol=1e-4,
    )


@pytest.mark.parametrize("method", ["fpi", "isometric", "latent"])
def test_norms_of_heads_are_copied_and_growth_stays_exact(
    tiny, random_params, reference_logits, method
):
    mixture = {"num_experts": 3, "experts_per_token": 2, "shared_mlp_dim": 5, "moe_every": 3}
    source = dataclasses.replace(
        tiny, **mixture, qk_norm=True, shared_expert_gate=True, norm_eps=0.1
    )
    target = dataclasses.replace(
        source, embed_dim=24, num_heads=6, mlp_dim=40, expert_mlp_dim=40, shared_mlp_dim=10
    )
    params = random_params(source, dtype=np.float64)
    grown, certificate = grow(params, source, target, method=method)
    before, after = (reference_logits(c, p, TOKENS) for c, p in ((source, params), (target, grown)))
    np.testing.assert_allclose(after, before, rtol=0, atol=1e-9)
    assert certificate.exact
    origins = {leaf.path: leaf.origin for leaf in certificate.leaves}
    for name in ("query_norm", "key_norm"):
        old, new = (p["layers"]["attention"][name] for p in (params, grown))
        np.testing.assert_array_equal(new, old)
        assert origins[f"layers/attention/{name}"] == "copied"


@pytest.mark.parametrize(
    "field", [{"qk_norm": True}, {"rope_scaling": RopeScaling("linear", 2.0)}], ids=str
)
def test_growth_keeps_rotary_scaling_and_norms_of_heads(tiny, field):
    target = dataclasses.replace(tiny, embed_dim=24, **field)
    (name,) = field
    with pytest.raises(UserError, match=rf"cannot grow with {name} .* the function would change"):
        ScaleUp("fpi").plan(tiny, target)
    mixture = dataclasses.replace(tiny, num_experts=2, experts_per_token=1, **field)
    with pytest.raises(UserError, match=f"scale-out cannot change {name}"):
        ScaleOut().plan(tiny, mixture)


def test_a_weighed_shared_expert_is_not_made_of_a_dense_model(tiny):
    mixture = dataclasses.replace(
        tiny, num_experts=2, experts_per_token=1, shared_mlp_dim=5, expert_mlp_dim=15,
        shared_expert_gate=True,
    )  # fmt: skip
    with pytest.raises(UserError, match="scale-out cannot change shared_expert_gate from False"):
        ScaleOut().plan(tiny, mixture)


@pytest.mark.parametrize(
    ("changes", "how"),
    [
        ({"embed_dim": 18}, {"method": "fpi"}),
        ({"embed_dim": 18}, {"method": "isometric", "noise": 0.1}),
        ({"num_layers": 5}, {"method": "isometric", "depth": "interpolation"}),
        ({"num_layers": 5}, {"method": "latent", "depth": "stacking"}),
        ({"num_layers": 5}, {"method": "zero_pad", "depth": "solar"}),
        ({"mlp_dim": 30}, {"method": "aki"}),
    ],
    ids=str,
)
def test_what_is_not_exact_is_not_called_so(tiny, random_params, reference_logits, changes, how):
    target = dataclasses.replace(tiny, **changes)
    params = random_params(tiny, dtype=np.float64)
    grown, certificate = grow(params, tiny, target, **how)
    before, after = (reference_logits(c, p, TOKENS) for c, p in ((tiny, params), (target, grown)))
    assert not certificate.exact
    assert np.abs(after - before).max() > 1e-3


@settings(max_examples=8, deadline=None)
@given(pair=growths(), method=st.sampled_from(("fpi", "isometric")))
def test_two_steps_of_width_equal_one_where_the_steps_are_whole(random_params, pair, method):
    source, _ = pair
    sizes = ("embed_dim", "mlp_dim")
    middle, target = (
        dataclasses.replace(source, **{name: factor * getattr(source, name) for name in sizes})
        for factor in (2, 6)
    )
    params = random_params(source, dtype=np.float64)
    half, _ = grow(params, source, middle, method=method)
    two, _ = grow(half, middle, target, method=method)
    one, _ = grow(params, source, target, method=method)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-13), two, one)


@pytest.mark.slow
@settings(max_examples=8, deadline=None)
@given(
    pair=growths(),
    method=st.sampled_from(("fpi", "isometric", "zero_pad")),
    depth=st.sampled_from(("stacking", "interpolation", "identity")),
)
def test_width_and_depth_may_come_in_either_order(random_params, pair, method, depth):
    source, target = pair
    wider = dataclasses.replace(target, num_layers=source.num_layers)
    deeper = dataclasses.replace(source, num_layers=target.num_layers)
    params = random_params(source, dtype=np.float64)
    how = {"method": method, "depth": depth}
    one, _ = grow(params, source, target, **how)
    wide_first = grow(grow(params, source, wider, **how)[0], wider, target, **how)[0]
    deep_first = grow(grow(params, source, deeper, **how)[0], deeper, target, **how)[0]
    for other in (wide_first, deep_first):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-13), other, one)


@pytest.mark.parametrize("method", EXACT)
def test_growth_to_the_same_shape_is_a_copy(tiny, random_params, method):
    params = random_params(tiny)
    grown, certificate = grow(params, tiny, tiny, method=method)
    jax.tree.map(np.testing.assert_array_equal, grown, params)
    assert certificate.exact


def test_uneven_parts_differ_and_sum_to_the_whole(tiny, random_params):
    params = random_params(tiny, dtype=np.float64)
    target = dataclasses.replace(tiny, mlp_dim=40)
    down = params["layers"]["mlp"]["down"]
    parts = []
    for seed in (0, 1):
        grown, _ = grow(params, tiny, target, method="fpi", split="uneven", seed=seed)
        grown = grown["layers"]["mlp"]["down"]
        np.testing.assert_allclose(grown[:, :20] + grown[:, 20:], down, rtol=1e-12)
        parts.append(grown[:, :20] / down)
    assert ((parts[0] > 0.2) & (parts[0] < 0.8)).all()
    assert np.ptp(parts[0][0, :, 0]) > 0.1
    assert not np.allclose(parts[0], parts[1])


def test_latent_units_hold_the_layer_above_and_are_read_by_zeros(tiny, random_params):
    target = dataclasses.replace(tiny, num_heads=6, mlp_dim=28)
    params = random_params(tiny, dtype=np.float64)
    grown, _ = grow(params, tiny, target, method="latent")
    before, after = flatten(params), flatten(grown)
    for name in ("gate", "up"):
        new, old = after[f"layers/mlp/{name}"][..., 20:], before[f"layers/mlp/{name}"][..., :8]
        np.testing.assert_array_equal(new[:-1], old[1:])
        np.testing.assert_array_equal(new[-1], old[-1])
    new_heads = [2, 5]
    np.testing.assert_array_equal(
        after["layers/attention/query"][:-1, :, new_heads],
        before["layers/attention/query"][1:, :, [0, 2]],
    )
    assert not after["layers/attention/out"][:, new_heads].any()
    assert not after["layers/mlp/down"][:, 20:].any()
    np.testing.assert_array_equal(after["layers/mlp/down"][:, :20], before["layers/mlp/down"])


def test_new_residual_channels_of_zero_pad_are_empty_and_read(tiny, random_params):
    target = dataclasses.replace(tiny, embed_dim=18)
    grown, _ = grow(random_params(tiny), tiny, target, method="zero_pad")
    leaves = flatten(grown)
    assert not leaves["token_embedder/embedding"][:, 12:].any()
    assert not leaves["layers/mlp/down"][..., 12:].any()
    assert leaves["layers/mlp/up"][:, 12:].all()
    assert leaves["lm_head/kernel"][12:].all()


@pytest.mark.parametrize("fill", ["mean", "zero"])
def test_new_tokens_get_the_mean_embedding_and_what_the_head_was_told(tiny, random_params, fill):
    target = dataclasses.replace(tiny, vocab_size=64)
    params = random_params(tiny)
    grown, certificate = grow(params, tiny, target, method="isometric", new_head=fill)
    embedding = grown["token_embedder"]["embedding"]
    np.testing.assert_array_equal(embedding[:61], params["token_embedder"]["embedding"])
    mean = params["token_embedder"]["embedding"].mean(axis=0)
    np.testing.assert_allclose(embedding[61:], np.tile(mean, (3, 1)), rtol=1e-5, atol=1e-7)
    head = params["lm_head"]["kernel"].mean(axis=1) if fill == "mean" else np.zeros(12)
    new = grown["lm_head"]["kernel"][:, 61:]
    np.testing.assert_allclose(new, np.tile(head[:, None], (1, 3)), rtol=1e-5, atol=1e-7)
    assert "new tokens" in str(certificate)


def test_noise_is_on_new_units_alone_and_of_the_asked_size(tiny, random_params):
    source = dataclasses.replace(tiny, mlp_dim=100)
    target = dataclasses.replace(source, mlp_dim=200)
    params = random_params(source)
    plain, _ = grow(params, source, target, method="fpi")
    noisy, certificate = grow(params, source, target, method="fpi", noise=0.5, seed=3)
    change = noisy["layers"]["mlp"]["up"] - plain["layers"]["mlp"]["up"]
    assert not change[..., :100].any()
    assert change[..., 100:].std() == pytest.approx(0.5 / np.sqrt(12), rel=0.05)
    assert "noise" in str(certificate)


HOWS = [
    {"method": method, "depth": depth, "split": split, "noise": noise}
    for method, depth, split, noise in [
        ("fpi", "stacking", "uneven", 0.0),
        ("isometric", "identity", "even", 0.1),
        ("zero_pad", "solar", "even", 0.0),
        ("aki_pro", None, "even", 0.0),
        ("latent", None, "even", 0.02),
    ]
]


@pytest.mark.parametrize("how", HOWS, ids=str)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_eager_jitted_and_layer_by_layer_growth_give_the_same_bits(tiny, random_params, how, dtype):
    target = dataclasses.replace(
        tiny, vocab_size=70, embed_dim=17, num_heads=6, mlp_dim=33, num_layers=5
    )
    params = random_params(tiny, dtype=jax.numpy.dtype(dtype))
    key = jax.random.key(7)
    plan, _ = ScaleUp(**how).plan(tiny, target)

    def grow_whole(params):
        return apply_plan(plan, params, target, key)

    eager = flatten(jax.tree.map(np.asarray, grow_whole(params)))
    jitted = flatten(jax.tree.map(np.asarray, jax.jit(grow_whole)(params)))
    source = flatten(params)
    for path, rule in plan.items():
        assert isinstance(rule, Mapped)
        assert eager[path].dtype == dtype

        def read(layers, leaf=source[rule.source]):
            return leaf if layers is None else leaf[layers]

        rows = [None] if rule.layers is None else [np.array([row]) for row in range(5)]
        streamed = [np.asarray(rule.build(read, path, key, row, np)) for row in rows]
        streamed = streamed[0] if rule.layers is None else np.concatenate(streamed)
        assert streamed.tobytes() == eager[path].tobytes() == jitted[path].tobytes(), path
