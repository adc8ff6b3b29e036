import dataclasses
import functools

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aquila_jax import ModelConfig, scale_up
from aquila_jax.axes import flatten

from .by_hand import LEAVES, grown_leaf

TWICE = {"embed_dim": 24, "num_heads": 8, "mlp_dim": 30}
UNEVEN = {"embed_dim": 18, "num_heads": 6, "mlp_dim": 28, "num_layers": 5}
MIXTURE = {"num_experts": 4, "experts_per_token": 2}
TIED, UNTIED = {"tie_embeddings": True}, {"tie_embeddings": False}

DEPTHS = {
    "stacking": lambda l1, l2, layer: layer % l1,
    "interpolation": lambda l1, l2, layer: int(np.floor(layer * l1 / l2)),
}


@pytest.fixture(scope="module")
def grow64(random_params):
    """Source and grown parameters in float64, as NumPy."""

    def grow(source, target, **how):
        params = random_params(source, dtype=np.float64)
        with jax.enable_x64(True):
            grown = scale_up(params, source, target, **how)
            return params, jax.tree.map(np.asarray, grown.params), grown.certificate

    return grow


@pytest.mark.parametrize(
    ("source_changes", "target_changes"),
    [
        ({}, TWICE),
        ({}, {"embed_dim": 36}),
        ({}, {"num_heads": 6}),
        ({}, {"mlp_dim": 21}),
        ({"qkv_bias": False}, TWICE),
        (TIED, TWICE),
        (TIED, {**TWICE, **UNTIED}),
        (TIED, UNTIED),
        (MIXTURE, TWICE),
    ],
    ids=str,
)
def test_fpi_at_whole_multiples_of_the_width_keeps_the_logits(
    tiny, random_batch, reference_logits, grow64, source_changes, target_changes
):
    source = dataclasses.replace(tiny, **source_changes)
    target = dataclasses.replace(source, **target_changes)
    params, grown, certificate = grow64(source, target, method="fpi")
    tokens = random_batch(source)["tokens"]
    before = reference_logits(source, params, tokens)
    assert certificate.exact
    assert np.abs(before).max() > 1
    np.testing.assert_allclose(reference_logits(target, grown, tokens), before, rtol=0, atol=1e-10)


def test_fpi_at_twice_the_width_keeps_the_logits_of_the_float32_model(
    tiny, random_params, random_batch, model_logits
):
    target = dataclasses.replace(tiny, **TWICE)
    params, tokens = random_params(tiny), random_batch(tiny)["tokens"]
    grown = scale_up(params, tiny, target, method="fpi")
    np.testing.assert_allclose(
        model_logits(target, grown.params, tokens),
        model_logits(tiny, params, tokens),
        rtol=0,
        atol=1e-5,
    )


@pytest.mark.parametrize(
    ("changes", "method"),
    [
        ({"embed_dim": 18}, "fpi"),
        ({"num_layers": 4}, "fpi"),
        (TWICE, "aki"),
        (TWICE, "aki_pro"),
        ({"mlp_dim": 30}, "aki"),
    ],
    ids=str,
)
def test_other_growths_change_the_logits_and_their_certificate_says_so(
    tiny, random_batch, reference_logits, grow64, changes, method
):
    target = dataclasses.replace(tiny, **changes)
    params, grown, certificate = grow64(tiny, target, method=method)
    tokens = random_batch(tiny)["tokens"]
    before = reference_logits(tiny, params, tokens)
    assert np.abs(reference_logits(target, grown, tokens) - before).max() > 1e-2
    assert not certificate.exact


@pytest.mark.parametrize("method", ["fpi", "aki", "aki_pro"])
def test_growth_to_the_same_shape_is_a_copy(tiny, grow64, method):
    params, grown, certificate = grow64(tiny, tiny, method=method)
    jax.tree.map(np.testing.assert_array_equal, grown, params)
    assert certificate.exact
    assert {leaf.origin for leaf in certificate.leaves} == {"copied"}


@st.composite
def fpi_pairs(draw):
    """Two configurations between which FPI is exact."""
    size = functools.partial(st.integers, 1)
    embed, groups, heads, mlp = (draw(size(n)) for n in (6, 3, 3, 7))
    source = ModelConfig(
        vocab_size=11,
        embed_dim=embed + 1,
        num_layers=draw(size(2)),
        num_heads=groups * heads,
        num_kv_heads=groups,
        head_dim=2 * draw(size(2)),
        mlp_dim=mlp,
        qkv_bias=draw(st.booleans()),
        tie_embeddings=draw(st.booleans()),
    )
    target = dataclasses.replace(
        source,
        embed_dim=source.embed_dim * draw(size(3)),
        num_heads=groups * (heads + draw(st.integers(0, 4))),
        mlp_dim=mlp + draw(st.integers(0, 10)),
        tie_embeddings=source.tie_embeddings and draw(st.booleans()),
    )
    return source, target


@settings(max_examples=8, deadline=None)
@given(pair=fpi_pairs())
def test_fpi_is_exact_for_any_shape_at_whole_multiples_of_the_width(
    random_params, reference_logits, pair
):
    source, target = pair
    params = random_params(source, dtype=np.float64)
    with jax.enable_x64(True):
        grown = scale_up(params, source, target, method="fpi")
        grown = jax.tree.map(np.asarray, grown.params)
    tokens = np.array([[3, 1, 4, 1, 5]])
    np.testing.assert_allclose(
        reference_logits(target, grown, tokens),
        reference_logits(source, params, tokens),
        rtol=0,
        atol=1e-10,
    )


@pytest.mark.parametrize(
    ("method", "depth", "expected_depth"),
    [
        ("fpi", None, "interpolation"),
        ("fpi", "stacking", "stacking"),
        ("aki", None, "stacking"),
        ("aki_pro", None, "interpolation"),
        ("aki_pro", "stacking", "stacking"),
    ],
)
def test_every_leaf_is_the_one_built_by_hand(tiny, grow64, method, depth, expected_depth):
    source = dataclasses.replace(tiny, qk_norm=True)
    target = dataclasses.replace(source, **UNEVEN)
    params, grown, certificate = grow64(source, target, method=method, depth=depth)
    assert certificate.depth == expected_depth
    layer_of = functools.partial(DEPTHS[expected_depth], tiny.num_layers, target.num_layers)
    flat, grown = flatten(params), flatten(grown)
    assert set(grown) == set(LEAVES)
    for path in LEAVES:
        expected = grown_leaf(
            path, flat[path], source, target, layer_of=layer_of, aki=method != "fpi"
        )
        np.testing.assert_allclose(grown[path], expected, rtol=1e-14, err_msg=path)


def test_aki_keeps_old_units_as_fpi_and_takes_new_ones_from_the_layer_above(tiny, grow64):
    target = dataclasses.replace(tiny, embed_dim=18, num_heads=6, mlp_dim=28)
    _, fpi, _ = grow64(tiny, target, method="fpi")
    _, aki, _ = grow64(tiny, target, method="aki_pro")
    fpi, aki = flatten(fpi), flatten(aki)
    old_heads, new_heads = [0, 1, 3, 4], [2, 5]
    heads, units = (old_heads, new_heads), (slice(0, 20), slice(20, 28))
    channels = (slice(0, 12), slice(12, 18))
    written = {
        "layers/attention/query": (2, heads),
        "layers/attention/query_bias": (1, heads),
        "layers/mlp/gate": (2, units),
        "layers/mlp/up": (2, units),
        "layers/attention/out": (3, channels),
        "layers/mlp/down": (2, channels),
    }
    for path, mine in aki.items():
        if path not in written:
            np.testing.assert_array_equal(mine, fpi[path], err_msg=path)
            continue
        dim, (old, new) = written[path]
        mine, theirs = np.moveaxis(mine, dim, 1), np.moveaxis(fpi[path], dim, 1)
        np.testing.assert_array_equal(mine[:, old], theirs[:, old], err_msg=path)
        np.testing.assert_array_equal(mine[:-1, new], theirs[1:, new], err_msg=path)
        np.testing.assert_array_equal(mine[-1, new], theirs[-1, new], err_msg=path)
        assert (mine[:-1, new] != theirs[:-1, new]).all(), path


def test_an_untied_head_starts_as_the_divided_transpose_of_the_embedding(tiny, grow64):
    source = dataclasses.replace(tiny, tie_embeddings=True)
    target = dataclasses.replace(tiny, embed_dim=24)
    params, grown, _ = grow64(source, target, method="aki_pro")
    embedding = params["token_embedder"]["embedding"]
    expected = np.concatenate([embedding, embedding], axis=1).T / 2
    np.testing.assert_array_equal(grown["lm_head"]["kernel"], expected)


def test_experts_grow_as_the_mlps_they_came_from(tiny, grow64):
    source = dataclasses.replace(tiny, **MIXTURE)
    target = dataclasses.replace(source, embed_dim=18, num_heads=6, mlp_dim=28)
    params, grown, _ = grow64(source, target, method="aki_pro")
    for name in ("gate", "up", "down"):
        for expert in range(4):
            expected = grown_leaf(
                f"layers/mlp/{name}",
                params["layers"]["moe"][name][:, expert],
                source,
                target,
                layer_of=lambda layer: layer,
                aki=True,
            )
            leaf = grown["layers"]["moe"][name][:, expert]
            np.testing.assert_allclose(leaf, expected, rtol=1e-14)
    router = params["layers"]["moe"]["router"]
    divided = router[:, np.arange(18) % 12] / np.where(np.arange(18) % 12 < 6, 2, 1)[:, None]
    np.testing.assert_allclose(grown["layers"]["moe"]["router"], divided, rtol=1e-14)
