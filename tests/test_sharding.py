import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from aquila_jax import Transformer, UserError
from aquila_jax.axes import (
    BATCH,
    EMBED,
    EXPERT_MLP,
    KV_HEADS,
    MLP,
    SHARED_MLP,
    TOKENS,
    abstract_params,
)
from aquila_jax.growth import ScaleOut, ScaleUp, apply_plan
from aquila_jax.planning.chips import parse_topology
from aquila_jax.planning.topology import devices_of
from aquila_jax.sharding import DEFAULT_RULES, Layout, MeshShape
from aquila_jax.training.step import RouterLosses, loss_and_metrics

MIXTURE = {"num_experts": 4, "experts_per_token": 2}
EVERY_SECOND = {
    **MIXTURE, "num_layers": 4, "moe_every": 2, "expert_mlp_dim": 10, "shared_mlp_dim": 6
}  # fmt: skip


@pytest.fixture(scope="module")
def even(tiny):
    """A decoder whose every axis divides by 2, and its width by 4."""
    return dataclasses.replace(tiny, vocab_size=64)


def layout(**sizes: int) -> Layout:
    return Layout(MeshShape(**sizes).build())


@pytest.mark.parametrize(
    ("sizes", "named"),
    [
        ({"data": 3}, ["data=3", "8 devices"]),
        ({"data": 8, "model": 2}, ["data=8", "model=2", "8 devices"]),
        ({"data": -1, "fsdp": 3}, ["data=-1", "fsdp=3", "8 devices"]),
        ({"data": -1, "fsdp": 16}, ["fsdp=16", "8 devices"]),
        ({"data": -1, "fsdp": -1}, ["data=-1", "fsdp=-1", "at most one -1"]),
        ({"fsdp": 0}, ["fsdp=0", "positive"]),
        ({"model": -2}, ["model=-2", "positive"]),
    ],
    ids=str,
)
def test_a_mesh_that_cannot_be_is_refused_with_its_sizes(sizes, named):
    with pytest.raises(UserError) as error:
        MeshShape(**sizes).build()
    for words in named:
        assert words in str(error.value)


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ({}, (1, 8, 1, 1, 1)),
        ({"fsdp": 2, "model": 2}, (1, 2, 2, 1, 2)),
        ({"data": 2, "fsdp": -1}, (1, 2, 4, 1, 1)),
        ({"data": 1, "expert": -1, "model": 2}, (1, 1, 1, 4, 2)),
        ({"fsdp": 8}, (1, 1, 8, 1, 1)),
    ],
    ids=str,
)
def test_minus_one_takes_the_devices_that_are_left(sizes, expected):
    assert tuple(MeshShape(**sizes).build().shape.values()) == expected


def test_a_mesh_can_be_built_from_some_devices():
    mesh = MeshShape(model=2).build(jax.devices()[:4])
    assert dict(mesh.shape) == {"slice": 1, "data": 2, "fsdp": 1, "expert": 1, "model": 2}
    assert set(mesh.devices.flat) == set(jax.devices()[:4])


def test_one_device_has_nothing_to_constrain():
    spread = layout(fsdp=2)
    assert spread.unless_single() is spread
    assert Layout(MeshShape().build(jax.devices()[:1])).unless_single() is None


def test_slices_are_the_slowest_axis_and_split_the_batch_alone(even):
    placed = layout(slices=2, fsdp=4)
    assert dict(placed.mesh.shape)["slice"] == 2
    assert list(placed.mesh.devices[0].flat) == jax.devices()[:4]
    assert placed.batch().shard_shape((8, 10)) == (1, 10)
    query = placed.params(even)["layers"]["attention"]["query"]
    assert query.shard_shape((3, 12, 4, 6)) == (3, 3, 4, 6)
    over_all = Layout.of(placed.mesh, {EMBED: ("slice", "fsdp")})
    eight = dataclasses.replace(even, embed_dim=16)
    query = over_all.params(eight)["layers"]["attention"]["query"]
    assert query.shard_shape((3, 16, 4, 6)) == (3, 2, 4, 6)


def test_slices_of_a_real_system_are_told_by_its_devices():
    """Two slices of four chips, described by the TPU library: nothing is run on them."""
    devices = devices_of(parse_topology("v5p:2x2x1", slices=2))
    mesh = MeshShape(slices=2, fsdp=2, model=2, data=1).build(devices)
    assert [{d.slice_index for d in part.flat} for part in mesh.devices] == [{0}, {1}]
    with pytest.raises(UserError, match=r"8 devices are of 2 slices.*slices=1.*set .* to 2"):
        MeshShape(fsdp=4).build(devices)


def test_a_vocabulary_that_does_not_divide_leaves_its_mesh_axes_to_the_width(even):
    odd = dataclasses.replace(even, vocab_size=61)
    shardings = layout(data=2, fsdp=2, model=2).params(odd)
    assert shardings["token_embedder"]["embedding"].shard_shape((61, 12)) == (61, 3)
    assert shardings["lm_head"]["kernel"].shard_shape((12, 61)) == (3, 61)
    with pytest.raises(UserError, match=r"token_embedder/embedding: embed of 12 .* 8 devices"):
        Layout.of(MeshShape(fsdp=4, model=2).build(), {KV_HEADS: ()}).params(odd)


def test_two_axes_on_one_mesh_axis_collide_and_name_the_parameter(even):
    rules = {**DEFAULT_RULES, EMBED: ("model",)}
    with pytest.raises(UserError, match=r"layers/attention/query.*embed.*twice.*model"):
        Layout(MeshShape(model=2).build(), {**rules, "vocab": ()}).params(even)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"embedding": ("fsdp",)}, "unknown axis 'embedding'; there are batch, "),
        ({EMBED: ("fspd",)}, r"rule of embed must be a tuple .* not \('fspd',\)"),
        ({EMBED: "fsdp"}, "rule of embed must be a tuple .* not 'fsdp'"),
    ],
)
def test_a_rule_that_names_what_is_not_there_is_refused(changes, message):
    with pytest.raises(UserError, match=message):
        Layout.of(MeshShape().build(), changes)


def test_changed_rules_keep_the_others():
    rules = Layout.of(MeshShape().build(), {EMBED: ()}).rules
    assert rules == {**DEFAULT_RULES, EMBED: ()}


def test_a_mesh_axis_of_one_device_never_collides(even):
    rules = {**DEFAULT_RULES, EMBED: ("model",)}
    shardings = Layout(MeshShape(data=4, fsdp=2).build(), rules).params(even)
    assert all(s.is_fully_replicated for s in jax.tree.leaves(shardings))


@pytest.mark.parametrize(
    ("sizes", "named"),
    [
        ({"model": 4}, ["layers/attention/key", "kv_heads of 2", "4 devices", "model"]),
        ({"fsdp": 8}, ["token_embedder/embedding", "embed of 12", "8 devices", "fsdp"]),
        ({"expert": 8}, ["layers/moe/router", "experts of 4", "8 devices", "expert"]),
    ],
    ids=str,
)
def test_a_size_that_does_not_divide_names_parameter_axis_and_mesh(even, sizes, named):
    with pytest.raises(UserError) as error:
        layout(**sizes).params(dataclasses.replace(even, **MIXTURE))
    for words in named:
        assert words in str(error.value)


def test_parameters_and_batch_are_split_as_the_rules_say(even):
    placed = layout(data=2, fsdp=2, model=2)
    shardings = placed.params(even)
    attention = shardings["layers"]["attention"]
    assert attention["query"].shard_shape((3, 12, 4, 6)) == (3, 6, 2, 6)
    assert attention["out"].shard_shape((3, 4, 6, 12)) == (3, 2, 6, 6)
    assert shardings["token_embedder"]["embedding"].shard_shape((64, 12)) == (32, 6)
    assert placed.batch().shard_shape((8, 10)) == (2, 10)
    assert placed.batch_shards == 4
    assert placed.replicated().is_fully_replicated
    assert placed.spec((BATCH, None, None, MLP)) == PartitionSpec(
        ("data", "fsdp"), None, None, ("model",)
    )


def test_experts_are_split_as_mlps_are_and_a_shared_one_as_its_rule_says(even):
    config = dataclasses.replace(even, **EVERY_SECOND)
    mesh = MeshShape(fsdp=2, expert=2, model=2).build()
    assert DEFAULT_RULES[EXPERT_MLP] == DEFAULT_RULES[MLP]
    moe = Layout.of(mesh, {SHARED_MLP: ("model",)}).params(config)["layers"]["moe"]
    assert moe["up"].shard_shape((2, 4, 12, 10)) == (2, 2, 6, 5)
    assert moe["down"].shard_shape((2, 4, 10, 12)) == (2, 2, 5, 6)
    assert moe["shared_up"].shard_shape((2, 12, 6)) == (2, 3, 3)
    assert moe["shared_down"].shard_shape((2, 6, 12)) == (2, 3, 3)
    with pytest.raises(UserError, match=r"layers/moe/gate: expert_mlp of 7 .* 2 devices"):
        Layout(mesh).params(dataclasses.replace(config, expert_mlp_dim=7))


def loss_and_gradients(config, params, batch, placed=None):
    model = Transformer(config, layout=placed)
    gradients = jax.value_and_grad(
        lambda params: loss_and_metrics(model, RouterLosses(0.1, 0.1), params, batch)[0]
    )
    shardings = None if placed is None else (placed.replicated(), placed.params(config))
    return jax.jit(gradients, out_shardings=shardings)(params)


@pytest.fixture(scope="module")
def on_one_device(even, random_params, random_batch):
    @functools.cache
    def compute(config):
        return loss_and_gradients(config, random_params(config), random_batch(config, rows=8))

    return compute


@pytest.mark.parametrize(
    ("changes", "sizes"),
    [
        ({}, {"data": 8}),
        ({}, {"data": 2, "fsdp": 2, "model": 2}),
        ({"tie_embeddings": True}, {"fsdp": 4, "model": 2}),
        ({"vocab_size": 61}, {"data": 1, "slices": 2, "fsdp": 2, "model": 2}),
        (MIXTURE, {"data": 2, "expert": 2, "model": 2}),
        (MIXTURE, {"fsdp": 2, "expert": 4}),
        (EVERY_SECOND, {"data": 8}),
        (EVERY_SECOND, {"fsdp": 2, "expert": 2, "model": 2}),
    ],
    ids=str,
)
def test_loss_and_gradients_on_a_mesh_equal_those_on_one_device(
    even, random_params, random_batch, on_one_device, changes, sizes
):
    config = dataclasses.replace(even, **changes)
    placed = layout(**sizes)
    params = jax.device_put(random_params(config), placed.params(config))
    batch = jax.device_put(random_batch(config, rows=8), placed.batch())
    on_mesh = loss_and_gradients(config, params, batch, placed)
    assert max(np.abs(leaf).max() for leaf in jax.tree.leaves(on_mesh[1])) > 0.1
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5),
        on_mesh,
        on_one_device(config),
    )


def test_a_shared_expert_in_shards_equals_a_whole_one(
    even, random_params, random_batch, on_one_device
):
    config = dataclasses.replace(even, **EVERY_SECOND)
    mesh = MeshShape(data=2, expert=2, model=2).build()
    placed = Layout.of(mesh, {SHARED_MLP: ("model",)})
    params = jax.device_put(random_params(config), placed.params(config))
    batch = jax.device_put(random_batch(config, rows=8), placed.batch())
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5),
        loss_and_gradients(config, params, batch, placed),
        on_one_device(config),
    )


def growths(config):
    """Growths that take units along every axis, and draw at random, by their names."""
    up = {"embed_dim": 16, "num_layers": 4, "num_heads": 8, "mlp_dim": 28, "vocab_size": 72}
    larger = dataclasses.replace(config, **up)
    mixture = dataclasses.replace(config, **MIXTURE)
    slices = dataclasses.replace(mixture, num_experts=8, experts_per_token=4, expert_mlp_dim=10)
    return {
        "fpi": (ScaleUp("fpi"), larger),
        "aki_pro": (ScaleUp("aki_pro"), larger),
        "latent": (ScaleUp("latent", noise=0.1), larger),
        "copies": (ScaleOut(), mixture),
        "redrawn": (ScaleOut(redraw=0.5, noise=0.1), mixture),
        "slices": (ScaleOut(granularity=2), slices),
    }


def grown_on(placed, growth, source, target):
    """Growth jitted with its output in shards."""
    plan, _ = growth.plan(source, target)
    grow = functools.partial(apply_plan, plan, target=target, layout=placed)
    return jax.jit(grow, out_shardings=placed.params(target))


@pytest.mark.parametrize("name", ["fpi", "aki_pro", "latent", "copies", "redrawn", "slices"])
@pytest.mark.parametrize("sizes", [{"data": 2, "fsdp": 2, "model": 2}, {"fsdp": 4, "expert": 2}])
def test_growth_on_a_mesh_has_the_bits_of_growth_on_one_device(even, random_params, name, sizes):
    growth, target = growths(even)[name]
    placed, params, key = layout(**sizes), random_params(even), jax.random.key(3)
    source = jax.device_put(params, placed.params(even))
    on_mesh = grown_on(placed, growth, even, target)(source, key=key)
    assert jax.tree.map(lambda leaf: leaf.sharding, on_mesh) == placed.params(target)
    plan, _ = growth.plan(even, target)
    on_one = apply_plan(plan, params, target, key)
    jax.tree.map(np.testing.assert_array_equal, on_mesh, on_one)


@pytest.mark.parametrize(
    ("name", "share"),
    # A leaf in shards, as it is read, taken and written, and the layer above; equal experts less.
    [("fpi", 2), ("aki_pro", 3), ("latent", 3), ("copies", 0.1), ("redrawn", 3), ("slices", 3)],
)
def test_no_device_holds_a_whole_model_while_it_grows(even, name, share):
    """By the compiler's account of a model large enough for its leaves to outweigh the rest."""
    sizes = {"vocab_size": 512, "embed_dim": 64, "num_layers": 8, "num_heads": 8, "head_dim": 16}
    source = dataclasses.replace(even, num_kv_heads=8, mlp_dim=256, **sizes)
    growth, target = growths(source)[name]
    up = {"embed_dim": 96, "num_layers": 10, "num_heads": 16, "mlp_dim": 320, "vocab_size": 640}
    if isinstance(growth, ScaleUp):
        target = dataclasses.replace(source, **up)
    elif name == "slices":
        target = dataclasses.replace(target, expert_mlp_dim=128)
    placed = layout(data=1, fsdp=8)
    abstract = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        abstract_params(source),
        placed.params(source),
    )
    grow = grown_on(placed, growth, source, target)
    memory = grow.lower(abstract, key=jax.random.key(0)).compile().memory_analysis()
    assert memory is not None
    shard = sum(leaf.size * 4 for leaf in jax.tree.leaves(abstract_params(target))) / 8
    assert memory.output_size_in_bytes < 1.1 * shard
    assert memory.temp_size_in_bytes < share * shard


def test_what_splits_experts_splits_the_width_of_all_else(even):
    placed = layout(fsdp=2, expert=2, data=2)
    shardings = placed.params(dataclasses.replace(even, **MIXTURE))
    assert shardings["layers"]["moe"]["gate"].spec == PartitionSpec(
        None, ("expert",), ("fsdp",), None
    )
    assert shardings["layers"]["attention"]["query"].spec == PartitionSpec(
        None, ("fsdp", "expert"), None, None
    )
    assert shardings["token_embedder"]["embedding"].spec == PartitionSpec(None, ("fsdp", "expert"))


def test_a_constraint_splits_an_activation(even):
    placed = layout(data=2, fsdp=2, model=2)
    x = jax.jit(lambda x: placed.constrain(2 * x, BATCH, None, MLP))(jnp.ones((8, 3, 20)))
    assert x.addressable_shards[0].data.shape == (2, 3, 10)


@pytest.mark.parametrize(("tokens", "own"), [(10, 5), (7, 7)])
def test_the_residual_is_split_over_tokens_where_they_divide(tokens, own):
    placed = layout(data=2, fsdp=2, model=2)
    x = jax.jit(placed.constrain_residual)(jnp.ones((8, tokens, 12)))
    assert x.addressable_shards[0].data.shape == (2, own, 12)
    whole = Layout.of(placed.mesh, {TOKENS: ()})
    x = jax.jit(whole.constrain_residual)(jnp.ones((8, tokens, 12)))
    assert x.addressable_shards[0].data.shape == (2, tokens, 12)
