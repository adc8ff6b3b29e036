import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aquila_jax import RopeScaling, axes
from aquila_jax.nn import Transformer, forward, transformer
from aquila_jax.nn.layers import rotation
from aquila_jax.nn.losses import cross_entropy
from aquila_jax.nn.transformer import REMAT_POLICIES

MIXTURE = {"num_experts": 4, "experts_per_token": 2}
FINE_GRAINED = {**MIXTURE, "expert_mlp_dim": 7, "shared_mlp_dim": 9}
EVERY_SECOND = {**FINE_GRAINED, "num_layers": 4, "moe_every": 2}
LINEAR = RopeScaling("linear", 3.0)
# With a rotary base of 100 and heads of 6, one frequency is kept, one between, one divided.
LLAMA3 = RopeScaling("llama3", 8.0, 1.0, 4.0, 32)

# The attention's softmax is float32 in every model, so float64 agrees only to its rounding.
SOFTMAX_ROUNDING = 2e-6


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_embeddings": True},
        {"qkv_bias": False},
        {"num_heads": 6, "num_kv_heads": 1},
        {"num_kv_heads": 4},
        MIXTURE,
        {"num_experts": 4, "experts_per_token": 1},
        {"num_experts": 4, "experts_per_token": 4},
        {**MIXTURE, "renormalize_gates": False},
        {**MIXTURE, "expert_mlp_dim": 7},
        {**MIXTURE, "shared_mlp_dim": 9},
        {**MIXTURE, "moe_every": 3},
        {**MIXTURE, "num_layers": 4, "moe_every": 2},
        EVERY_SECOND,
        {**FINE_GRAINED, "num_layers": 6, "moe_every": 3, "tie_embeddings": True},
        {"qk_norm": True, "rope_scaling": LINEAR},
        {"qk_norm": True, "qkv_bias": False, "norm_eps": 0.1},
        {**EVERY_SECOND, "qk_norm": True, "rope_scaling": LLAMA3},
        {**EVERY_SECOND, "shared_expert_gate": True, "renormalize_gates": False},
    ],
    ids=str,
)
def test_packed_logits_equal_the_numpy_decoder(
    tiny, random_params, random_batch, model_logits, reference_logits, changes
):
    config = dataclasses.replace(tiny, **changes)
    params, batch = random_params(config, dtype=np.float64), random_batch(config)
    packed = [batch[name] for name in ("tokens", "segment_ids", "positions")]
    with jax.enable_x64(True):
        logits = model_logits(config, params, *packed, dtype=np.float64)
        assert logits.dtype == np.float64
    expected = reference_logits(config, params, *packed)
    assert np.abs(expected).max() > 1
    np.testing.assert_allclose(logits, expected, rtol=0, atol=SOFTMAX_ROUNDING)


def test_a_row_without_packing_is_one_document(
    tiny, random_params, random_batch, model_logits, reference_logits
):
    params, tokens = random_params(tiny), random_batch(tiny)["tokens"]
    logits = model_logits(tiny, params, tokens)
    np.testing.assert_allclose(logits, reference_logits(tiny, params, tokens), rtol=0, atol=2e-5)


def test_logits_depend_on_all_earlier_tokens_and_on_no_later_one(tiny, random_params):
    params = jax.tree.map(jnp.asarray, random_params(tiny))
    tokens = jnp.arange(8)[None]

    def logits_of(embedding):
        changed = {**params, "token_embedder": {"embedding": embedding}}
        return Transformer(tiny).apply({"params": changed}, tokens)[0]

    weights = np.random.default_rng(0).normal(size=(8, tiny.vocab_size)).astype(np.float32)

    def pull_back(embedding):
        _, vjp = jax.vjp(logits_of, embedding)
        return jax.vmap(lambda t: vjp(weights * (jnp.arange(8) == t)[:, None])[0])(jnp.arange(8))

    gradients = np.asarray(jax.jit(pull_back)(params["token_embedder"]["embedding"]))
    influence = np.abs(gradients[:, :8]).max(axis=-1)
    assert (influence[np.triu_indices(8, 1)] == 0).all()
    assert (influence[np.tril_indices(8)] > 1e-4).all()


def test_packed_documents_give_what_they_give_alone(
    tiny, random_params, random_batch, model_logits
):
    params, batch = random_params(tiny), random_batch(tiny)
    packed = model_logits(tiny, params, batch["tokens"], batch["segment_ids"], batch["positions"])
    for document in (slice(0, 3), slice(3, 8)):
        alone = model_logits(tiny, params, batch["tokens"][:, document])
        np.testing.assert_allclose(packed[:, document], alone, rtol=0, atol=1e-5)


def test_grouped_queries_equal_attention_with_repeated_keys_and_values(
    tiny, random_params, random_batch, model_logits
):
    params, tokens = random_params(tiny), random_batch(tiny)["tokens"]
    attention = dict(params["layers"]["attention"])
    for name in ("key", "value", "key_bias", "value_bias"):
        attention[name] = np.repeat(attention[name], tiny.heads_per_group, axis=-2)
    repeated = {**params, "layers": {**params["layers"], "attention": attention}}
    config = dataclasses.replace(tiny, num_kv_heads=tiny.num_heads)
    np.testing.assert_allclose(
        model_logits(tiny, params, tokens),
        model_logits(config, repeated, tokens),
        rtol=0,
        atol=1e-5,
    )


def weights_of(config, params, layer):
    """One layer's own weights, out of the stacks that hold it."""
    own = {}
    for path, leaf in axes.flatten(params["layers"], "layers/").items():
        depths = axes.layers_of(config, axes.parameters(config)[path].axes[0])
        if layer in depths:
            own[path.removeprefix("layers/")] = leaf[depths.index(layer)]
    return axes.unflatten(own)


@pytest.mark.parametrize("changes", [{}, MIXTURE, EVERY_SECOND], ids=["dense", "moe", "every_2nd"])
def test_scanned_layers_equal_layers_one_by_one(
    tiny, random_params, random_batch, model_logits, changes
):
    config = dataclasses.replace(tiny, **changes)
    params, batch = random_params(config), random_batch(config)
    segments, positions = batch["segment_ids"], batch["positions"]
    blocks = {
        has_experts: jax.jit(transformer.Block(config, jnp.float32, has_experts).apply)
        for has_experts in (False, True)
    }
    x = params["token_embedder"]["embedding"][np.asarray(batch["tokens"])]
    for layer in range(config.num_layers):
        variables = {"params": weights_of(config, params, layer)}
        block = blocks[config.has_experts(layer)]
        x, _ = block(variables, x, rotation(config, positions), segments)
    x = np.asarray(x)
    x = x / np.sqrt(np.square(x).mean(axis=-1, keepdims=True) + config.norm_eps)
    expected = x * params["final_norm"]["scale"] @ params["lm_head"]["kernel"]
    logits = model_logits(config, params, batch["tokens"], segments, positions)
    np.testing.assert_allclose(logits, expected, rtol=0, atol=2e-5)


def policies(jaxpr):
    """What every recomputed part of a program stores, also in its inner programs."""
    for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        if "policy" in equation.params:
            yield equation.params["policy"]
        for inner in jax.tree.leaves(tuple(equation.params.values())):
            if hasattr(inner, "jaxpr") or hasattr(inner, "eqns"):
                yield from policies(inner)


@pytest.mark.parametrize("changes", [MIXTURE, EVERY_SECOND], ids=["moe", "every_2nd"])
def test_recomputation_changes_neither_loss_nor_gradients(
    tiny, random_params, random_batch, changes
):
    config = dataclasses.replace(tiny, **changes)
    params, batch = random_params(config), random_batch(config)

    def loss_and_gradients(remat):
        model = Transformer(config, remat=remat)

        def loss(params):
            logits, _ = forward(model, params, batch)
            return cross_entropy(logits, batch["targets"], batch["loss_weights"]).mean

        used = list(policies(jax.make_jaxpr(loss)(params)))
        return used, jax.jit(jax.value_and_grad(loss))(params)

    plain_policies, plain = loss_and_gradients("none")
    for remat in ("dots", "full"):
        used, recomputed = loss_and_gradients(remat)
        # Layers with experts and, where there are some, layers without.
        assert used.count(REMAT_POLICIES[remat]) == (1 if config.moe_every == 1 else 2)
        assert REMAT_POLICIES[remat] not in plain_policies
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5), plain, recomputed
        )


@pytest.mark.parametrize("changes", [{}, {**MIXTURE, "experts_per_token": 4}], ids=["dense", "moe"])
def test_bfloat16_compute_stays_near_float32(
    tiny, random_params, random_batch, model_logits, changes
):
    config = dataclasses.replace(tiny, **changes)
    params, tokens = random_params(config), random_batch(config)["tokens"]
    exact = model_logits(config, params, tokens)
    rough = model_logits(config, params, tokens, dtype=jnp.bfloat16)
    assert rough.dtype == np.float32
    error = np.asarray(jnp.abs(rough - exact))
    assert 0 < error.mean() < 0.02 * np.abs(exact).mean() * np.sqrt(config.num_layers)


def test_gains_start_at_one_biases_at_zero_and_matrices_keep_the_scale(tiny):
    config = dataclasses.replace(tiny, vocab_size=400, embed_dim=64, mlp_dim=96)
    model = Transformer(config)
    params = jax.jit(model.init)(jax.random.key(0, impl="rbg"), jnp.zeros((1, 2), jnp.int32))[
        "params"
    ]
    layers = params["layers"]
    for norm in (layers["pre_attention_norm"], layers["pre_mlp_norm"], params["final_norm"]):
        assert (np.asarray(norm["scale"]) == 1).all()
    assert not np.asarray(layers["attention"]["query_bias"]).any()
    residual = 1 / np.sqrt(2 * config.num_layers)
    expected = {
        ("attention", "query"): 1 / np.sqrt(64),
        ("attention", "out"): residual / np.sqrt(config.num_heads * config.head_dim),
        ("mlp", "up"): 1 / np.sqrt(64),
        ("mlp", "down"): residual / np.sqrt(96),
    }
    for (part, name), std in expected.items():
        assert np.std(layers[part][name]) == pytest.approx(std, rel=0.1), (part, name)
    assert np.std(params["lm_head"]["kernel"]) == pytest.approx(1 / np.sqrt(64), rel=0.1)
    assert np.std(params["token_embedder"]["embedding"]) == pytest.approx(0.02, rel=0.1)
    assert not np.array_equal(layers["mlp"]["up"][0], layers["mlp"]["up"][1])
