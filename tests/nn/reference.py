"""A decoder in float64 NumPy, one row, one head and one token at a time.

Written from the papers' formulas and shares no code with the library, so that agreement means
something. Rotary positions are products of complex numbers here.
"""

from typing import Any

import numpy as np


def decoder(
    config: Any,
    params: dict[str, Any],
    tokens: Any,
    segment_ids: Any = None,
    positions: Any = None,
) -> np.ndarray:
    """Logits `[B, T, V]`."""
    rows, length = tokens.shape
    tokens = np.asarray(tokens)
    segment_ids = np.ones((rows, length), int) if segment_ids is None else segment_ids
    positions = np.tile(np.arange(length), (rows, 1)) if positions is None else positions
    return np.stack(
        [
            _row(config, params, tokens[b], np.asarray(segment_ids[b]), np.asarray(positions[b]))
            for b in range(rows)
        ]
    )


def _wide(leaf: Any) -> np.ndarray:
    return np.asarray(leaf).astype(np.float64)


def _row(config, params, tokens, segments, positions):
    embedding = _wide(params["token_embedder"]["embedding"])
    x = embedding[tokens]
    layers = params["layers"]
    mixtures, mlps = (_by_depth(layers.get(name, {})) for name in ("moe", "mlp"))
    for index in range(config.num_layers):
        attention = {name: _wide(leaf)[index] for name, leaf in layers["attention"].items()}
        normed = _norm(config, x, layers["pre_attention_norm"]["scale"][index])
        x = x + _attention(config, attention, normed, segments, positions)
        normed = _norm(config, x, layers["pre_mlp_norm"]["scale"][index])
        if config.num_experts and index % config.moe_every == config.moe_every - 1:
            moe = mixtures.pop(0)
            x = x + np.stack([_mixture(config, moe, token) for token in normed])
        else:
            mlp = mlps.pop(0)
            x = x + _mlp(normed, mlp["gate"], mlp["up"], mlp["down"])
    assert not mixtures
    assert not mlps
    x = _norm(config, x, params["final_norm"]["scale"])
    head = embedding.T if config.tie_embeddings else _wide(params["lm_head"]["kernel"])
    return x @ head


def _by_depth(stacks):
    """The weights of every layer that has them, first the lowest."""
    count = len(next(iter(stacks.values()), ()))
    return [{name: _wide(leaf)[i] for name, leaf in stacks.items()} for i in range(count)]


def _norm(config, x, gain):
    root_mean_square = np.sqrt((x**2).mean(axis=-1, keepdims=True) + config.norm_eps)
    return x / root_mean_square * _wide(gain)


def _softmax(scores):
    powers = np.exp(scores - scores.max())
    return powers / powers.sum()


def frequency(i, half, theta, scaling):
    """Radians of pair i from one position to the next; "llama3" is told by wavelengths."""
    radians = theta ** (-2 * i / (2 * half))
    if scaling is None:
        return radians
    if scaling.kind == "linear":
        return radians / scaling.factor
    assert scaling.kind == "llama3"
    wavelength, original = 2 * np.pi / radians, scaling.original_context_length
    if wavelength > original / scaling.low_freq_factor:
        return radians / scaling.factor
    if wavelength < original / scaling.high_freq_factor:
        return radians
    span = scaling.high_freq_factor - scaling.low_freq_factor
    smooth = (original / wavelength - scaling.low_freq_factor) / span
    return (1 - smooth) * radians / scaling.factor + smooth * radians


def rotate(vectors, positions, theta, scaling=None):
    """Each pair (i, i + H/2) of `[T, H]` is a complex number, turned by its position."""
    half = vectors.shape[-1] // 2
    pairs = vectors[:, :half] + 1j * vectors[:, half:]
    frequencies = np.array([frequency(i, half, theta, scaling) for i in range(half)])
    turned = pairs * np.exp(1j * np.outer(positions, frequencies))
    return np.concatenate([turned.real, turned.imag], axis=-1)


def _attention(config, weights, x, segments, positions):
    result = np.zeros_like(x)
    heads_per_group = config.num_heads // config.num_kv_heads
    for head in range(config.num_heads):
        group = head // heads_per_group
        query = x @ weights["query"][:, head]
        key = x @ weights["key"][:, group]
        value = x @ weights["value"][:, group]
        if config.qkv_bias:
            query = query + weights["query_bias"][head]
            key = key + weights["key_bias"][group]
            value = value + weights["value_bias"][group]
        if config.qk_norm:
            query = _norm(config, query, weights["query_norm"])
            key = _norm(config, key, weights["key_norm"])
        query = rotate(query, positions, config.rope_theta, config.rope_scaling)
        key = rotate(key, positions, config.rope_theta, config.rope_scaling)
        for t in range(len(x)):
            seen = [s for s in range(t + 1) if segments[s] == segments[t]]
            scores = np.array([query[t] @ key[s] for s in seen]) / np.sqrt(config.head_dim)
            mixed = _softmax(scores) @ value[seen]
            result[t] += mixed @ weights["out"][head]
    return result


def _mlp(x, gate, up, down):
    gated = x @ gate
    return (gated / (1 + np.exp(-gated)) * (x @ up)) @ down


def _mixture(config, weights, x):
    probabilities = _softmax(x @ weights["router"])
    chosen = np.argsort(-probabilities)[: config.experts_per_token]
    gates = probabilities[chosen]
    if config.renormalize_gates:
        gates = gates / gates.sum()
    experts = [(weights["gate"][e], weights["up"][e], weights["down"][e]) for e in chosen]
    if config.shared_mlp_dim:
        weight = 1.0
        if config.shared_expert_gate:
            weight = 1 / (1 + np.exp(-(x @ weights["shared_router"])))
        gates = [*gates, weight]
        experts.append((weights["shared_gate"], weights["shared_up"], weights["shared_down"]))
    return sum(gate * _mlp(x, *expert) for gate, expert in zip(gates, experts, strict=True))
