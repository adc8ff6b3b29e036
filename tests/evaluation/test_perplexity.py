import math

import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import log_softmax

from aquila_jax import Transformer
from aquila_jax.evaluation import validation_losses
from aquila_jax.evaluation.perplexity import bits_per_byte, bytes_per_token, make_eval_step
from aquila_jax.nn.losses import WeightedSum

from .letters import Letters


def test_tokens_weigh_alike_within_a_language_and_languages_alike_in_the_mean():
    def eval_step(params, batch):
        assert params == "params"
        return WeightedSum(jnp.asarray(batch["total"]), jnp.asarray(batch["weight"]))

    batches = {
        "en": [{"total": 30.0, "weight": 10.0}, {"total": 2.0, "weight": 2.0}],
        "zh": iter([{"total": 4.0, "weight": 4.0}]),
    }
    losses = validation_losses(eval_step, "params", batches)
    assert losses == {"en": pytest.approx(32 / 12), "zh": 1.0, "mean": pytest.approx(11 / 6)}


def test_the_loss_is_the_negative_log_likelihood_of_targets_that_count(
    tiny, random_params, random_batch, reference_logits
):
    params = random_params(tiny)
    batches = [random_batch(tiny, seed=seed) for seed in range(2)]
    batches[1]["loss_weights"] = batches[1]["loss_weights"].at[0].set(0.0)
    total, count = 0.0, 0.0
    for batch in batches:
        packed = (batch["tokens"], batch["segment_ids"], batch["positions"])
        log_probabilities = log_softmax(reference_logits(tiny, params, *packed), axis=-1)
        for place in np.ndindex(2, 10):
            weight = float(batch["loss_weights"][place])
            total -= weight * log_probabilities[place][int(batch["targets"][place])]
            count += weight
    assert count == 24
    losses = validation_losses(make_eval_step(Transformer(tiny)), params, {"en": batches})
    assert losses["en"] == losses["mean"] == pytest.approx(total / count, rel=1e-5)


class _Bytes(Letters):
    """Ids 3 and up are bytes, some more are 0, 1 and 2."""

    pad_id, eos_id = 0, 1
    bos_id: int | None = 2

    def decode(self, ids):
        return bytes(i - 3 for i in ids).decode(errors="replace")


def test_bytes_are_those_of_the_documents_that_are_scored():
    documents = ["abc", "\u4e2d\u6587", "\U0001f985!"]
    ids = [[*(byte + 3 for byte in text.encode()), 1] for text in documents]
    row = [*ids[0], *ids[1], *ids[2], 0, 0]
    segments = [n for n, part in enumerate(ids, 1) for _ in part] + [0, 0]
    batch = {
        "targets": np.array([row, row]),
        "segment_ids": np.array([segments, segments]),
        "loss_weights": np.array(
            [[float(s > 0) for s in segments], [float(s == 2) for s in segments]]
        ),
    }
    num_bytes = sum(len(text.encode()) for text in documents) + len(documents[1].encode())
    num_tokens = num_bytes + 4
    found = bytes_per_token(_Bytes(), {"en": [batch]})
    assert found == {"en": pytest.approx(num_bytes / num_tokens)}
    assert bits_per_byte(3.0, found["en"]) * num_bytes * math.log(2) == pytest.approx(
        3 * num_tokens
    )


def test_a_letter_that_a_row_cuts_counts_about_its_halves():
    first, second = "\u4e2d".encode()[:1], "\u4e2d".encode()[1:]
    rows = [[byte + 3 for byte in b"ab" + first], [byte + 3 for byte in second + b"c"]]
    batch = {
        "targets": np.array(rows), "segment_ids": np.ones((2, 3), int),
        "loss_weights": np.ones((2, 3)),
    }  # fmt: skip
    assert 5 / 6 <= bytes_per_token(_Bytes(), {"zh": [batch]})["zh"] <= 1.0
