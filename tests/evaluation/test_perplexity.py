import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import log_softmax

from aquila_jax import Transformer
from aquila_jax.evaluation import validation_losses
from aquila_jax.evaluation.perplexity import make_eval_step
from aquila_jax.nn.losses import WeightedSum


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
