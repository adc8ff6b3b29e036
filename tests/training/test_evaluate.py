"""Validation of what is on disk."""

import pytest

from aquila_jax.training import evaluate, train

from .synthetic import tiny_run


def test_evaluate_repeats_the_last_validation(tmp_path):
    run = tiny_run(tmp_path)
    end = train(run).current.validation_end
    assert end is not None
    assert evaluate(run) == pytest.approx(dict(end), rel=1e-6)
