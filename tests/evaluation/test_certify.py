import dataclasses

import jax
import numpy as np
import pytest

from aquila_jax import UserError, certify, scale_out, scale_up
from aquila_jax.growth.content import content_hash

TOKENS = np.array([[3, 1, 4, 1, 5, 9, 2, 6], [2, 7, 1, 8, 2, 8, 1, 8]])


def reference(before, after):
    """What a certificate claims, by its definitions, in float64."""

    def log_softmax(x):
        return x - np.log(np.exp(x).sum(-1, keepdims=True))

    before, after = before[:, :-1], after[:, :-1]
    known = after[..., : before.shape[-1]]
    p, q = log_softmax(before), log_softmax(known)
    targets = TOKENS[:, 1:, None]
    return {
        "max_logit_difference": np.abs(known - before).max(),
        "kl": (np.exp(p) * (p - q)).sum(-1).mean(),
        "source_loss": -np.take_along_axis(p, targets, -1).mean(),
        "grown_loss": -np.take_along_axis(log_softmax(after), targets, -1).mean(),
    }


@pytest.mark.parametrize("method", ["fpi", "aki_pro", "isometric"])
def test_what_is_measured_is_what_a_reference_says(tiny, random_params, reference_logits, method):
    target = dataclasses.replace(tiny, vocab_size=64, embed_dim=18, mlp_dim=30, num_layers=4)
    params = random_params(tiny)
    grown = scale_up(params, tiny, target, method=method)
    measured = certify((params, tiny), grown, TOKENS).measured
    assert measured is not None
    assert measured.num_tokens == 14
    grown_params = jax.tree.map(np.asarray, grown.params)
    expected = reference(
        reference_logits(tiny, params, TOKENS), reference_logits(target, grown_params, TOKENS)
    )
    for name, value in expected.items():
        assert getattr(measured, name) == pytest.approx(value, rel=1e-4, abs=1e-5), name
    assert grown.certificate.exact == (measured.max_logit_difference < 1e-4)


def test_a_growth_may_be_the_source_of_the_next(tiny, random_params):
    target = dataclasses.replace(tiny, embed_dim=18)
    large = scale_up(random_params(tiny), tiny, target, method="isometric")
    mixture = scale_out(large.params, large.config, key=jax.random.key(0))
    first = certify((random_params(tiny), tiny), large, TOKENS)
    second = certify(large, mixture, TOKENS)
    assert first.target_hash == second.source_hash
    assert len({first.source_hash, first.target_hash, second.target_hash}) == 3


def test_a_hash_sees_every_value_shape_and_type_and_no_order(tiny, random_params):
    params = random_params(tiny)
    digest = content_hash(params, tiny)
    turned = dict(reversed(params.items()))
    on_device = jax.tree.map(jax.numpy.asarray, params)
    assert content_hash(turned, tiny) == content_hash(on_device, tiny) == digest
    changed = random_params(tiny)
    changed["layers"]["mlp"]["up"][1, 2, 3] += 1e-6
    assert content_hash(changed, tiny) != digest
    assert content_hash(jax.tree.map(np.float16, params), tiny) != digest


def test_a_certificate_can_be_read_as_text_and_in_a_notebook(tiny, random_params):
    target = dataclasses.replace(tiny, embed_dim=18)
    params = random_params(tiny)
    grown = scale_up(params, tiny, target, method="isometric")
    certificate = certify((params, tiny), grown, TOKENS)
    for shown in (str(certificate), certificate._repr_html_()):
        assert "function kept" in shown
        assert "layers/mlp/up" in shown
        assert f"{3 * 18 * 20 * 4:,}" in shown
        assert certificate.source_hash in shown
        assert "KL" in shown


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (np.array([1, 2, 3]), r"must be \[B, T\] .* not \(3,\)"),
        (np.array([[1]]), "T at least 2"),
        (np.array([[1, 61]]), "token 61 is outside the source's vocabulary 61"),
    ],
)
def test_tokens_that_cannot_be_measured_on_are_refused(tiny, random_params, tokens, message):
    params = random_params(tiny)
    grown = scale_up(params, tiny, tiny)
    with pytest.raises(UserError, match=message):
        certify((params, tiny), grown, tokens)
