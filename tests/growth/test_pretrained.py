"""Growth of a real pretrained model, against figures taken by an independent implementation.

PyTorch, float32, the same 1024 tokens; the model scores 3.4623 nats a token before it grows.
"""

import dataclasses

import jax
import pytest

from aquila_jax import scale_out, scale_up

WIDER = {"embed_dim": 720, "num_heads": 12, "mlp_dim": 1920}
LARGER = {**WIDER, "num_layers": 40}


@pytest.mark.parametrize(
    ("method", "depth", "changes", "expected"),
    [
        ("fpi", None, {"embed_dim": 1152, "num_heads": 18, "mlp_dim": 3072}, 3.4623),
        pytest.param("fpi", None, WIDER, 3.6342, marks=pytest.mark.slow),
        ("isometric", None, WIDER, 3.4623),
        pytest.param("fpi", "stacking", LARGER, 5.5084, marks=pytest.mark.slow),
        ("fpi", "interpolation", LARGER, 7.9016),
        pytest.param("aki", "stacking", LARGER, 14.4624, marks=pytest.mark.slow),
        ("aki_pro", None, LARGER, 12.0536),
        # Exact with depth, too, and with another number of KV groups.
        pytest.param("latent", None, LARGER, 3.4623, marks=pytest.mark.slow),
        ("isometric", None, {**LARGER, "num_kv_heads": 4}, 3.4623),
    ],
    ids=str,
)
def test_a_pretrained_model_grows_as_elsewhere(pretrained, method, depth, changes, expected):
    target = dataclasses.replace(pretrained.config, **changes)
    grown = scale_up(pretrained.params, pretrained.config, target, method=method, depth=depth)
    assert pretrained.loss(grown.params, target) == pytest.approx(expected, abs=0.002)


def test_a_pretrained_model_becomes_a_mixture_without_a_change(pretrained):
    grown = scale_out(
        pretrained.params, pretrained.config, num_experts=2, granularity=2, key=jax.random.key(0)
    )
    assert pretrained.loss(grown.params, grown.config) == pytest.approx(3.4623, abs=0.002)
