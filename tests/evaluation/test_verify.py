import numpy as np
import pytest

from aquila_jax.errors import UserError
from aquila_jax.evaluation.verify import Ours, Reading, compare, read

from .letters import Letters

TEXT = "A TEXT OF SOME LENGTH, AND MORE THAN A WINDOW OF IT."


@pytest.fixture(scope="module")
def model(tiny, random_params):
    return Ours(random_params(tiny), tiny, Letters(), dtype="float32")


def readings(seed=0, size=(70, 61)):
    rng = np.random.default_rng(seed)
    first, noise = rng.normal(size=(2, *size)).astype(np.float32)
    ids = list(rng.integers(size[1], size=size[0]))
    return ids, first, first + 0.1 * noise


def test_every_measure_is_numpys():
    """In two windows, the second of which is longer than what is compared at once."""
    ids, first, second = readings(size=(90, 61))
    found = compare(*(Reading(ids, ids, [logits[:10], logits[10:]]) for logits in (first, second)))
    a, b = (logits.astype(np.float64) for logits in (first, second))
    logs = [np.log(np.exp(x) / np.exp(x).sum(-1, keepdims=True)) for x in (a, b)]
    kl = (np.exp(logs[0]) * (logs[0] - logs[1])).sum(-1)
    # The last row of a window predicts nothing.
    rows = np.array([i for i in range(89) if i != 9])
    nats = [-np.mean(x[rows, np.asarray(ids)[rows + 1]]) for x in logs]
    assert found.first_difference is None
    assert found.num_tokens == 90
    np.testing.assert_allclose(found.max_abs, np.abs(a - b).max(), rtol=1e-12)
    np.testing.assert_allclose(found.mean_abs, np.abs(a - b).mean(), rtol=1e-12)
    np.testing.assert_allclose(found.relative, np.abs(a - b).max() / np.abs(a).max(), rtol=1e-12)
    np.testing.assert_allclose([found.kl, found.max_kl], [kl.mean(), kl.max()], rtol=1e-9)
    np.testing.assert_allclose(found.losses, nats, rtol=1e-12)
    np.testing.assert_allclose(found.loss_difference, abs(nats[0] - nats[1]), rtol=1e-9)


def test_nan_is_the_largest_difference():
    ids, first, second = readings()
    second[3, 4] = np.nan
    found = compare(Reading(ids, ids, [first]), Reading(ids, ids, [second]))
    assert (found.max_abs, found.max_kl) == (np.inf, np.inf)


@pytest.mark.parametrize(("theirs", "at"), [([1, 2, 4], 2), ([1, 2], 2), ([1, 2, 3, 4], 3)])
def test_where_ids_part(theirs, at):
    _, first, _ = readings(size=(3, 61))
    found = compare(Reading([1, 2, 3], [1, 2, 3], [first]), Reading(theirs, [1, 2, 3], [first]))
    assert found.first_difference == at
    assert found.max_abs == 0


def test_a_text_is_read_in_windows(model, tiny, random_params, reference_logits):
    reading = read(model, TEXT, window=20, max_tokens=30)
    assert reading.own_ids == Letters().encode(TEXT)
    assert reading.ids == reading.own_ids[:30]
    assert [len(window) for window in reading.windows] == [20, 10]
    expected = reference_logits(tiny, random_params(tiny), np.array([reading.ids[20:30]]))[0]
    np.testing.assert_allclose(reading.windows[1], expected, rtol=0, atol=1e-4)


def test_what_cannot_be_read_is_refused(model):
    with pytest.raises(UserError, match="between 2 and the context of 32, not 33"):
        read(model, TEXT, window=33, max_tokens=30)
    with pytest.raises(UserError, match="1 tokens are too few"):
        read(model, "A", window=8, max_tokens=30)
    with pytest.raises(UserError, match="the id 99, and the model 61 ids"):
        read(model, TEXT, window=8, max_tokens=30, ids=[1, 99])
    ids, first, _ = readings()
    with pytest.raises(UserError, match="61 and 60 ids"):
        compare(Reading(ids, ids, [first]), Reading(ids, ids, [first[:, :60]]))
