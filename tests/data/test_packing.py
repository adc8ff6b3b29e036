import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aquila_jax.data.packing import decode_rows, encode_row, pack

U2 = np.dtype("<u2")


@given(st.lists(st.integers(0, 40), max_size=200), st.integers(1, 16))
def test_every_token_is_in_exactly_one_row_and_no_row_is_too_long(sizes, length):
    ends = np.cumsum(sizes)
    documents = [list(range(end - size, end)) for end, size in zip(ends, sizes, strict=True)]
    rows = list(pack(documents, length))
    assert all(0 < sum(map(len, row)) <= length for row in rows)
    found = sorted(int(token) for row in rows for run in row for token in run)
    assert found == list(range(sum(sizes)))
    # A run is a document's, cut at multiples of the length.
    bounds = {end - size for end, size in zip(ends, sizes, strict=True) if size}
    for row in rows:
        for run in row:
            assert np.array_equal(run, np.arange(run[0], run[-1] + 1))
            assert any((int(run[0]) - start) % length == 0 for start in bounds if start <= run[0])


def test_few_tokens_are_padding():
    rng = np.random.default_rng(0)
    documents = [[1] * int(size) for size in rng.integers(1, 100, 2000)]
    rows = list(pack(documents, 128))
    assert sum(map(len, documents)) / (128 * len(rows)) > 0.97


def test_a_row_comes_back_as_a_decoders_batch():
    row = encode_row([np.array([5, 6, 7]), np.array([7, 8])], 7, U2)
    batch = decode_rows([row, encode_row([np.arange(1, 8)], 7, U2)], 7, U2)
    expected = {
        "targets": [[5, 6, 7, 7, 8, 0, 0], [1, 2, 3, 4, 5, 6, 7]],
        "tokens": [[0, 5, 6, 0, 7, 0, 0], [0, 1, 2, 3, 4, 5, 6]],
        "segment_ids": [[1, 1, 1, 2, 2, 0, 0], [1] * 7],
        "positions": [[0, 1, 2, 0, 1, 0, 0], list(range(7))],
        "loss_weights": [[1, 1, 1, 1, 1, 0, 0], [1] * 7],
    }
    assert batch.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_array_equal(batch[name], values)
        assert batch[name].dtype == (np.float32 if name == "loss_weights" else np.int32)


def test_a_row_of_another_length_is_refused():
    with pytest.raises(ValueError, match="a row has"):
        decode_rows([encode_row([np.arange(4)], 6, U2)], 7, U2)
