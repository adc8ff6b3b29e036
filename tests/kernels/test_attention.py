"""Attention by every backend that runs or compiles here, beside float64 written out."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aquila_jax.kernels import attention
from aquila_jax.planning.chips import parse_topology
from aquila_jax.planning.topology import devices_of
from aquila_jax.sharding import Layout, MeshShape

T = 128


def draw(num_heads, num_kv_heads, head_dim=64, rows=2, num_tokens=T):
    rng = np.random.default_rng(0)
    query, key, value = (
        rng.normal(size=(rows, num_tokens, heads, head_dim)).astype(np.float32)
        for heads in (num_heads, num_kv_heads, num_kv_heads)
    )
    # Documents of unlike lengths, then padding; one row is one document.
    ids = np.repeat([1, 2, 3, 0], [50, 1, 60, num_tokens - 111]).astype(np.int32)
    segments = np.stack(
        [ids if row % 2 == 0 else np.ones(num_tokens, np.int32) for row in range(rows)]
    )
    return tuple(map(jnp.asarray, (query, key, value, segments)))


def written_out(query, key, value, segments):
    query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
    group = query.shape[2] // key.shape[2]
    key, value = np.repeat(key, group, axis=2), np.repeat(value, group, axis=2)
    scores = np.einsum("bthd,bshd->bhts", query, key) / np.sqrt(query.shape[-1])
    segments = np.asarray(segments)
    sees = (segments[:, :, None] == segments[:, None]) & np.tri(segments.shape[1], dtype=bool)
    scores = np.where(sees[:, None], scores, -np.inf)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    return np.einsum("bhts,bshd->bthd", weights, value)


@pytest.mark.parametrize("backend", ["xla", "interpret"])
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(4, 2), (2, 1), (2, 2)])
def test_packed_rows_equal_attention_written_out(backend, num_heads, num_kv_heads):
    operands = draw(num_heads, num_kv_heads)
    mixed = attention.attend(*operands, backend=backend)
    np.testing.assert_allclose(mixed, written_out(*operands), rtol=0, atol=3e-6)


def test_what_is_kept_for_gradients_grows_with_a_row_and_not_with_its_square():
    operands = draw(4, 2, head_dim=8, num_tokens=1100)

    def pull(query, key, value, segments):
        backend = functools.partial(attention.attend, segment_ids_BT=segments, backend="xla")
        return jax.vjp(backend, query, key, value)[1]

    kept = jax.tree.leaves(jax.eval_shape(pull, *operands))
    assert sum(leaf.size for leaf in kept) < 8 * operands[0].size


@pytest.mark.parametrize("num_tokens", [127, 128, 129, 300, 1100])
def test_rows_of_any_length_are_cut_into_blocks(num_tokens):
    operands = draw(4, 2, head_dim=8, num_tokens=num_tokens)
    mixed = attention.attend(*operands, backend="xla")
    np.testing.assert_allclose(mixed, written_out(*operands), rtol=0, atol=3e-6)


def test_gradients_through_blocks_equal_those_of_one_softmax_in_float64():
    *heads, segments = draw(4, 2, head_dim=8, num_tokens=300)
    weights = np.random.default_rng(1).normal(size=heads[0].shape)

    def whole(query, key, value):
        key, value = (jnp.repeat(x, 2, axis=2) for x in (key, value))
        scores = jnp.einsum("bthd,bshd->bhts", query, key) / np.sqrt(query.shape[-1])
        scores = jnp.where(attention.causal_mask(segments), scores, -np.inf)
        return jnp.sum(weights * jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(scores), value))

    def blocks(query, key, value):
        return jnp.sum(weights * attention.attend(query, key, value, segments, backend="xla"))

    with jax.enable_x64(True):
        heads = [np.asarray(x, np.float64) for x in heads]
        wanted = jax.grad(whole, argnums=(0, 1, 2))(*heads)
        found = jax.grad(blocks, argnums=(0, 1, 2))(*heads)
    for ours, theirs in zip(found, wanted, strict=True):
        assert ours.dtype == np.float64
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-12)


def test_blocks_leave_out_most_of_what_the_mask_hides():
    """Of a row of 8 blocks, 36 of 64 blocks of scores are computed."""
    operands = draw(4, 2, num_tokens=1024)

    def flops(num_blocks, monkeypatch):
        monkeypatch.setattr(attention, "_MOST_BLOCKS", num_blocks)
        attend = functools.partial(attention.attend, backend="xla")
        cost: Any = jax.jit(attend).lower(*operands).compile().cost_analysis()
        return cost["flops"]

    with pytest.MonkeyPatch.context() as monkeypatch:
        assert flops(8, monkeypatch) / flops(1, monkeypatch) == pytest.approx(36 / 64, abs=0.02)


def test_gradients_of_splash_attention_equal_those_of_xla():
    query, key, value, segments = draw(4, 2)
    weights = jnp.asarray(np.random.default_rng(1).normal(size=query.shape), jnp.float32)

    def gradients(backend):
        def total(query, key, value):
            return jnp.sum(weights * attention.attend(query, key, value, segments, backend=backend))

        return jax.jit(jax.grad(total, argnums=(0, 1, 2)))(query, key, value)

    for found, wanted in zip(gradients("interpret"), gradients("xla"), strict=True):
        assert jnp.abs(wanted).max() > 0.5
        np.testing.assert_allclose(found, wanted, rtol=0, atol=2e-5)


def test_rows_and_heads_lie_on_a_mesh():
    layout = Layout(MeshShape(data=2, fsdp=2, model=2).build())
    operands = draw(4, 2, rows=4)
    found = jax.jit(lambda *a: attention.attend(*a, layout=layout, backend="interpret"))(*operands)
    np.testing.assert_allclose(found, written_out(*operands), rtol=0, atol=3e-6)


@pytest.mark.parametrize("head_dim", [64, 128])
def test_tpus_get_splash_attention_and_no_mask(head_dim):
    """Compiled for chips that are not here, by the real compiler."""
    devices = devices_of(parse_topology("v5p:2x2x1"))
    layout = Layout(MeshShape(data=1, fsdp=2, model=2).build(devices))
    batch = layout.batch()
    shapes = [(2, 1024, heads, head_dim) for heads in (4, 2, 2)]
    operands = [jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=batch) for shape in shapes]
    segments = jax.ShapeDtypeStruct((2, 1024), jnp.int32, sharding=batch)

    def total(*operands):
        return attention.attend(*operands, layout=layout).astype(jnp.float32).sum()

    # The kernels multiply bfloat16, which has no higher precision to ask for.
    with jax.default_matmul_precision("default"):
        lowered = jax.jit(jax.grad(total, argnums=(0, 1, 2))).lower(*operands, segments)
        text = str(lowered.compile().as_text())
    for kernel in ("fwd", "dq", "dkv"):
        assert f"splash_mha_{kernel}_segmented" in text
    assert "1024,1024" not in text


@pytest.mark.parametrize(
    ("tokens", "head_dim", "dtype", "platform", "chosen"),
    [
        (256, 128, jnp.bfloat16, "gpu", "cudnn"),
        (250, 64, jnp.bfloat16, "gpu", "cudnn"),
        (256, 128, jnp.float32, "gpu", "xla"),
        (256, 256, jnp.bfloat16, "gpu", "xla"),
        (256, 128, jnp.float32, "cpu", "auto"),
        (250, 128, jnp.bfloat16, "tpu", "xla"),
        (256, 128, jnp.bfloat16, "tpu", "auto"),
    ],
)
def test_what_does_not_fit_a_backend_goes_to_xla(
    monkeypatch, tokens, head_dim, dtype, platform, chosen
):
    monkeypatch.setattr(jax, "default_backend", lambda: platform)
    query = jnp.zeros((1, tokens, 4, head_dim), dtype)
    assert attention._choose(query, None, "auto")[0] == chosen
