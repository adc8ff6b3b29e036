"""What a certificate says, as text, as a page of a notebook, and as plain values."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from aquila_jax import axes, scale_out, scale_up
from aquila_jax.growth.certificate import LeafRecord, Measurement


@pytest.fixture
def certificate(tiny, random_params):
    target = dataclasses.replace(tiny, embed_dim=18, num_heads=6, mlp_dim=28, num_layers=5)
    return scale_up(random_params(tiny), tiny, target, method="aki_pro").certificate


def test_text_and_table_tell_every_leaf_and_its_bytes(certificate):
    text, table = str(certificate), certificate._repr_html_()
    assert text.splitlines()[0] == "aki_pro + interpolation: function not kept"
    for leaf in certificate.leaves:
        assert leaf.path in text
        assert leaf.path in table
        size = f"{4 * np.prod(leaf.shape):,}"
        (line,) = [line for line in text.splitlines() if f" {leaf.path} " in line]
        assert size in line.split()


def test_bytes_are_told_where_the_dtype_is_known(certificate):
    planned = dataclasses.replace(certificate, dtype="")
    assert {planned.num_bytes(leaf) for leaf in planned.leaves} == {0}
    total = sum(certificate.num_bytes(leaf) for leaf in certificate.leaves)
    parameters = axes.parameters(certificate.target).values()
    assert total == 4 * sum(np.prod(p.shape(certificate.target)) for p in parameters)


def test_plain_values_survive_json(certificate):
    measured = Measurement(30, 1e-5, 1e-9, 4.25, 4.5)
    told = json.loads(json.dumps(dataclasses.replace(certificate, measured=measured).to_dict()))
    assert told["measured"]["grown_loss"] == 4.5
    assert told["source"] == certificate.source.to_dict()
    records = [LeafRecord(**{**leaf, "shape": tuple(leaf["shape"])}) for leaf in told["leaves"]]
    assert tuple(records) == certificate.leaves


def test_what_was_measured_and_hashed_is_said(certificate):
    assert "KL" not in str(certificate)
    measured = Measurement(30, 1e-5, 1e-9, 4.25, 4.5)
    whole = dataclasses.replace(certificate, measured=measured, source_hash="aa", target_hash="bb")
    for told in (str(whole), whole._repr_html_()):
        assert "source aa, grown bb" in told
        assert "on 30 predictions: loss 4.2500 before, 4.5000 after; KL 1e-09 nats" in told


def test_names_are_only_text_in_a_notebook(certificate):
    evil = dataclasses.replace(certificate, method="<script>")
    assert "<script>" not in evil._repr_html_()


def test_a_mixtures_title_names_no_depth(tiny, random_params):
    grown = scale_out(random_params(tiny), tiny, key=jax.random.key(0))
    assert grown.certificate.title == "sparse_upcycling: function kept"
