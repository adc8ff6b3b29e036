import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aquila_jax.errors import UserError
from aquila_jax.evaluation.scoring import Scorer
from aquila_jax.evaluation.windows import TextLoss, pieces, read_text, text_losses, windows

from .letters import Letters


@pytest.mark.parametrize(("length", "stride"), [(8, 8), (8, 3), (8, 1), (100, 50), (1, 1)])
@pytest.mark.parametrize("size", [1, 7, 8, 9, 40])
def test_windows_score_every_token_once_with_enough_context(size, length, stride):
    ids = list(range(10, 10 + size))
    found = list(windows(ids, start_id=0, length=length, stride=stride))
    assert [i for _, scored in found for i in scored] == ids
    for number, (context, scored) in enumerate(found):
        assert context
        assert len(context) + len(scored) <= length + 1
        whole = [0, *ids]
        at = whole.index(scored[0])
        assert context == whole[at - len(context) : at]
        if number:
            # All but a window's last tokens are context.
            assert len(scored) <= stride
            assert len(context) >= min(at, length + 1 - stride)


def test_a_stride_longer_than_the_window_is_refused():
    with pytest.raises(UserError, match="stride"):
        list(windows([1, 2], start_id=0, length=4, stride=5))


def test_losses_of_long_texts_are_sums_over_windows(tiny, random_params, reference_logits):
    params = jax.tree.map(jnp.asarray, random_params(tiny))
    scorer = Scorer(params, tiny, Letters(), max_length=8, batch_size=4)
    texts = ["THE QUICK BROWN FOX JUMPS", "A"]
    for text, loss in zip(texts, text_losses(scorer, texts, stride=3), strict=True):
        ids, nats = [1, *Letters().encode(text)], 0.0
        for at in range(1, len(ids)):
            # A later window of 8 scores its last 3; the first scores all that it reads.
            end = at if at <= 8 else 8 + 3 * math.ceil((at - 8) / 3)
            start = max(0, min(end, len(ids) - 1) + 1 - 9)
            logits = reference_logits(tiny, params, np.array([ids[start:at]]))[0, -1]
            nats -= logits[ids[at]] - np.log(np.exp(logits).sum())
        assert loss.nats == pytest.approx(nats, abs=1e-3)
        assert (loss.num_tokens, loss.num_bytes) == (len(text), len(text))


def test_normalisation_by_tokens_and_by_bytes():
    loss = TextLoss(nats=math.log(2) * 12, num_tokens=4, num_bytes=6)
    assert loss.bits_per_byte == pytest.approx(2)
    assert loss.perplexity == pytest.approx(8)


def test_pieces_are_the_text_and_end_with_lines():
    text = "".join(f"line {i}\n" for i in range(100))
    found = pieces(text, length=50)
    assert "".join(found) == text
    assert len(found) > 10
    assert all(piece.endswith("\n") for piece in found)


def test_texts_that_cannot_be_measured_are_said(tmp_path):
    with pytest.raises(UserError, match="no file"):
        read_text(tmp_path / "absent")
    (tmp_path / "empty").write_text(" \n")
    with pytest.raises(UserError, match="is empty"):
        read_text(tmp_path / "empty")
    (tmp_path / "latin").write_bytes(b"caf\xe9")
    with pytest.raises(UserError, match="not UTF-8"):
        read_text(tmp_path / "latin")


def test_what_is_given_before_a_text_is_context_in_every_window():
    ids, context = list(range(10, 30)), [5, 6, 7]
    found = list(windows(ids, start_id=1, length=8, stride=4, context=context))
    assert [i for _, scored in found for i in scored] == ids
    whole = [1, *context, *ids]
    for before, scored in found:
        end = len(before) + len(scored)
        assert end <= 9
        place = whole.index(scored[0])
        assert before == whole[max(0, place + len(scored) - 9) : place]
