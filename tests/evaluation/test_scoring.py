import dataclasses
import io
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aquila_jax.errors import UserError
from aquila_jax.evaluation.scoring import Scorer, padded_length, progress
from aquila_jax.sharding import Layout, MeshShape

from .letters import Letters


@pytest.fixture(scope="module")
def params(tiny, random_params):
    return jax.tree.map(jnp.asarray, random_params(tiny))


@pytest.fixture(scope="module")
def scorer(tiny, params):
    return Scorer(params, tiny, Letters(), batch_size=3)


@pytest.fixture(scope="module")
def by_hand(tiny, params, reference_logits):
    """Log-likelihood of the last tokens of a row in float64, and whether all are the likeliest."""

    def compute(ids, num_scored):
        logits = reference_logits(tiny, params, np.array([ids[:-1]]))[0]
        log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        rows = np.arange(len(ids) - 1)[-num_scored:]
        targets = np.array(ids)[1:][-num_scored:]
        return log_p[rows, targets].sum(), (logits[rows].argmax(-1) == targets).all()

    return compute


def test_scores_are_those_of_each_row_by_itself(tiny, params, scorer, by_hand, reference_logits):
    rng = np.random.default_rng(0)
    pairs = [
        (rng.integers(2, 61, size=n).tolist(), rng.integers(2, 61, size=m).tolist())
        for n, m in [(3, 2), (10, 1), (1, 7), (20, 5)]
    ]
    context = [5, 9, 12]
    best = int(reference_logits(tiny, params, np.array([context]))[0, -1].argmax())
    pairs.append((context, [best]))
    found = scorer.score(pairs)
    for (before, after), score in zip(pairs, found, strict=True):
        expected, is_greedy = by_hand([*before, *after], len(after))
        assert score.log_likelihood == pytest.approx(expected, abs=1e-4)
        assert (score.is_greedy, score.num_tokens) == (is_greedy, len(after))
    assert found[-1].is_greedy


def test_an_empty_context_is_the_beginning_of_a_document(scorer, by_hand):
    (found,) = scorer.score_texts([("", "HELLO")])
    expected, _ = by_hand([Letters.bos_id, *Letters().encode("HELLO")], 5)
    assert found.log_likelihood == pytest.approx(expected, abs=1e-4)


def test_a_long_context_loses_its_beginning(tiny, scorer, by_hand):
    ids = np.random.default_rng(1).integers(2, 61, size=50).tolist()
    (found,) = scorer.score([(ids[:-4], ids[-4:])])
    expected, _ = by_hand(ids[-(tiny.context_length + 1) :], 4)
    assert found.log_likelihood == pytest.approx(expected, abs=1e-4)


def test_spaces_between_go_to_the_continuation(scorer):
    assert scorer.encode_pair("A ", "B") == scorer.encode_pair("A", " B") == ([35], [2, 36])


@pytest.mark.parametrize(("continuation", "says"), [([], "without tokens"), ([3] * 33, "33 tok")])
def test_continuations_that_cannot_be_scored(scorer, continuation, says):
    with pytest.raises(UserError, match=says):
        scorer.score([([5], continuation)])


def test_numbers_out_of_range_are_refused(tiny, params):
    with pytest.raises(UserError, match="max_length"):
        Scorer(params, tiny, Letters(), max_length=33)
    with pytest.raises(UserError, match="batch_size"):
        Scorer(params, tiny, Letters(), batch_size=0)


def test_a_tokenizer_of_another_model_is_refused(tiny, params):
    with pytest.raises(UserError, match="61 ids and the model 60: they are of two models"):
        Scorer(params, dataclasses.replace(tiny, vocab_size=60), Letters())


@pytest.mark.parametrize(("length", "padded"), [(1, 64), (63, 64), (64, 64), (65, 128)])
def test_lengths_are_rounded_up_to_few(length, padded):
    assert padded_length(length) == padded


def test_a_mesh_gives_the_scores_of_one_device(tiny, params, scorer):
    rng = np.random.default_rng(2)
    pairs = [(rng.integers(2, 61, size=n).tolist(), [3, 4]) for n in (1, 30, 9, 9, 12)]
    layout = Layout(MeshShape(data=2, fsdp=2, expert=2).build())
    meshed = Scorer(params, tiny, Letters(), batch_size=8, layout=layout)
    expected = [score.log_likelihood for score in scorer.score(pairs)]
    found = [score.log_likelihood for score in meshed.score(pairs)]
    assert found == pytest.approx(expected, abs=1e-4)
    with pytest.raises(UserError, match="batch_size 3 does not divide over the 8"):
        Scorer(params, tiny, Letters(), batch_size=3, layout=layout)


class _Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize(("stream", "is_shown"), [(_Terminal(), True), (io.StringIO(), False)])
def test_progress_is_shown_where_someone_watches_and_not_in_a_pipe(stream, is_shown, monkeypatch):
    monkeypatch.setattr(sys, "stderr", stream)
    with progress("scoring", 2) as bar:
        if not bar.disable:
            bar.start_t -= 2  # as if two seconds had gone
            bar.last_print_t -= 2
        bar.update(2)
    assert ("scoring" in stream.getvalue()) == is_shown
