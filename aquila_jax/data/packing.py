"""Documents packed into rows of equal length, and rows turned into a decoder's batches."""

import bisect
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from aquila_jax.data.pipeline import Batch

# Rows that are filled at the same time: more of them leave fewer gaps.
_OPEN_ROWS = 64


def pack(documents: Iterable[Sequence[int]], length: int) -> Iterator[list[np.ndarray]]:
    """Yields rows: runs of tokens, cut from the documents, of `length` tokens together at most.

    Every token of every document is in exactly one row. A document is cut into runs of `length`
    tokens and one that is left; that one goes into the fullest open row that still takes it.
    """
    # In order of the room that is left in each.
    rooms: list[int] = []
    rows: list[list[np.ndarray]] = []
    for document in documents:
        ids = np.asarray(document, np.int64)
        for start in range(0, len(ids), length):
            run = ids[start : start + length]
            place = bisect.bisect_left(rooms, len(run))
            if place == len(rooms):
                room, row = length, []
            else:
                room, row = rooms.pop(place), rows.pop(place)
            row.append(run)
            room -= len(run)
            if not room:
                yield row
                continue
            place = bisect.bisect_left(rooms, room)
            rooms.insert(place, room)
            rows.insert(place, row)
            if len(rows) > _OPEN_ROWS:
                rooms.pop(0)
                yield rows.pop(0)
    yield from rows


def encode_row(row: Sequence[np.ndarray], length: int, dtype: np.dtype) -> bytes:
    """A packed row as bytes: its targets, then where each belongs; both little-endian.

    Args:
        row: ids of each of its documents, `[tokens]`.
        length: tokens of a row; what is left of it is padding, document 0.
        dtype: of the targets as stored.
    """
    targets, segments = np.zeros(length, dtype), np.zeros(length, "<u2")
    end = 0
    for number, run in enumerate(row, 1):
        targets[end : end + len(run)] = run
        segments[end : end + len(run)] = number
        end += len(run)
    return targets.tobytes() + segments.tobytes()


def decode_rows(rows: Sequence[bytes], length: int, dtype: np.dtype, *, start_id: int = 0) -> Batch:
    """Rows of `encode_row` as the batch that `TextData.train_batches` describes, `[rows, length]`.

    Raises:
        ValueError: a row has another size.
    """
    split = length * dtype.itemsize
    targets = np.stack([np.frombuffer(row[:split], dtype) for row in rows]).astype(np.int32)
    segments = np.stack([np.frombuffer(row[split:], "<u2") for row in rows]).astype(np.int32)
    if segments.shape[1] != length:
        raise ValueError(f"a row has {segments.shape[1]} tokens, not {length}")
    goes_on = np.zeros(segments.shape, bool)
    goes_on[:, 1:] = (segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] > 0)
    index = np.broadcast_to(np.arange(length), segments.shape)
    starts = np.maximum.accumulate(np.where(goes_on, 0, index), axis=1)
    tokens = np.full_like(targets, start_id)
    tokens[:, 1:] = np.where(goes_on[:, 1:], targets[:, :-1], start_id)
    return {
        "tokens": tokens,
        "targets": targets,
        "loss_weights": (segments > 0).astype(np.float32),
        "segment_ids": segments,
        "positions": np.where(segments > 0, index - starts, 0).astype(np.int32),
    }
