"""Routing and permutation in float64 NumPy, token by token, from their definitions."""

from typing import Any, NamedTuple

import numpy as np


class ByHand(NamedTuple):
    gates: np.ndarray
    experts: np.ndarray
    slots: np.ndarray
    counts: np.ndarray
    real_counts: np.ndarray
    probability_sum: np.ndarray
    z_sum: float


def route(
    logits: Any,
    is_token: Any,
    k: int,
    renormalize: bool = True,
    scores: str = "softmax",
    bias: Any = None,
    sequences: int = 1,
    experts: Any = None,
) -> ByHand:
    """`experts` [N, k] fixes what is chosen, to take derivatives by the logits."""
    logits = np.asarray(logits, np.float64)
    num_tokens, num_experts = logits.shape
    gates = np.zeros((num_tokens, k))
    chosen = np.zeros((num_tokens, k), int)
    real_counts = np.zeros((sequences, num_experts), int)
    probability_sum = np.zeros((sequences, num_experts))
    z_sum = 0.0
    for n, row in enumerate(logits):
        if scores == "softmax":
            score = np.exp(row - row.max())
            score /= score.sum()
            probability = score
        else:
            score = 1 / (1 + np.exp(-row))
            probability = score / score.sum()
        keys = row if bias is None else score + np.asarray(bias, np.float64)
        order = sorted(range(num_experts), key=lambda e: (-keys[e], e))
        chosen[n] = order[:k] if experts is None else experts[n]
        gates[n] = score[chosen[n]]
        if renormalize:
            gates[n] /= gates[n].sum()
        if is_token[n]:
            sequence = n * sequences // num_tokens
            real_counts[sequence, chosen[n]] += 1
            probability_sum[sequence] += probability
            z_sum += (row.max() + np.log(np.exp(row - row.max()).sum())) ** 2
    pairs = sorted((expert, n, j) for n in range(num_tokens) for j, expert in enumerate(chosen[n]))
    slots = np.zeros((num_tokens, k), int)
    for place, (_, n, j) in enumerate(pairs):
        slots[n, j] = place
    counts = np.bincount(chosen.ravel(), minlength=num_experts)
    return ByHand(gates, chosen, slots, counts, real_counts, probability_sum, z_sum)


def permute(x: Any, slots: Any, num_rows: int) -> np.ndarray:
    rows = np.zeros((num_rows, x.shape[1]))
    for n, places in enumerate(slots):
        for place in places:
            if 0 <= place < num_rows:
                rows[place] = x[n]
    return rows


def unpermute(rows: Any, slots: Any, gates: Any) -> np.ndarray:
    out = np.zeros((len(slots), rows.shape[1]))
    for n, places in enumerate(slots):
        for place, gate in zip(places, gates[n], strict=True):
            if 0 <= place < len(rows):
                out[n] += np.float64(gate) * np.asarray(rows[place], np.float64)
    return out
