"""Digests that tell models apart and do not depend on how one is held."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aquila_jax import axes
from aquila_jax.growth.content import Content, content_hash, digest, outputs_first
from aquila_jax.sharding import Layout, MeshShape

MIXTURE = {"num_experts": 4, "experts_per_token": 2, "moe_every": 3}


@pytest.fixture
def model(tiny, random_params):
    config = dataclasses.replace(tiny, **MIXTURE)
    return random_params(config), config


def test_it_does_not_depend_on_order_library_or_mesh(tiny, random_params):
    config = dataclasses.replace(tiny, vocab_size=64)
    params = random_params(config)
    expected = content_hash(params, config)
    backwards = axes.unflatten(dict(reversed(axes.flatten(params).items())))
    layout = Layout(MeshShape(data=2, fsdp=2, model=2).build())
    on_mesh = jax.device_put(params, layout.params(config))
    for other in (backwards, jax.tree.map(jnp.asarray, params), on_mesh):
        assert content_hash(other, config) == expected


def test_every_leaf_its_dtype_and_its_order_count(model):
    params, config = model
    hashes = {content_hash(params, config)}
    flat = axes.flatten(params)
    for path, leaf in flat.items():
        changed = np.array(leaf)
        changed.reshape(-1)[-1] += 1
        hashes.add(content_hash(axes.unflatten({**flat, path: changed}), config))
    narrow = {**flat, "final_norm/scale": flat["final_norm/scale"].astype(np.float64)}
    hashes.add(content_hash(axes.unflatten(narrow), config))
    turned = {**flat, "lm_head/kernel": flat["lm_head/kernel"][:, ::-1]}
    hashes.add(content_hash(axes.unflatten(turned), config))
    assert len(hashes) == len(flat) + 3


def test_slices_that_stream_by_in_any_order_give_the_whole(model):
    params, config = model
    content, flat = Content(config), axes.flatten(params)
    for path, leaf in reversed(flat.items()):
        parameter = axes.parameters(config)[path]
        stacks = leaf.shape[: len(axes.stack_axes(parameter))]
        for index in reversed(list(np.ndindex(stacks))):
            found = digest(outputs_first(leaf[index], parameter))
            assert content.get(path, index) is None
            content.add(path, index, found)
            assert content.get(path, index) == found
    dtypes = {path: leaf.dtype for path, leaf in flat.items()}
    assert content.hexdigest(dtypes) == content_hash(params, config)


def test_a_slice_that_never_came_is_missed(tiny):
    with pytest.raises(KeyError):
        Content(tiny).hexdigest(dict.fromkeys(axes.parameters(tiny), np.float32))
