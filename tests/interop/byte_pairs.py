"""The tokenizer inside a GGUF file, for ASCII text: GPT-2's byte pairs, with digits one by one."""

import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Any

# GPT-2's rule for pieces that pairs never cross, except that every digit is a piece.
PIECE = re.compile(
    r"\d|'(?:s|t|re|ve|m|ll|d)| ?[A-Za-z]+| ?[^\sA-Za-z\d]+|\s+(?!\S)|\s+", flags=re.ASCII
)
# GPT-2 writes bytes that are no printable ASCII as letters from U+0100 on, in order.
WRITTEN = {byte: 0x100 + (byte if byte <= 32 else byte - 94) for byte in [*range(33), 127]}


def encode(text: str, metadata: Mapping[str, Any]) -> list[int]:
    """Token ids of an ASCII text, with no token before it."""
    assert metadata["tokenizer.ggml.pre"] == "smollm"
    assert text.isascii()
    ids = {token: i for i, token in enumerate(metadata["tokenizer.ggml.tokens"])}
    ranks = {tuple(m.split(" ")): i for i, m in enumerate(metadata["tokenizer.ggml.merges"])}
    return [
        ids[token]
        for piece in PIECE.findall(text)
        for token in merge(list(piece.translate(WRITTEN)), ranks)
    ]


def merge(symbols: list[str], ranks: Mapping[tuple[str, ...], int]) -> Sequence[str]:
    """Join neighbours, the pair of lowest rank first."""
    while len(symbols) > 1:
        pairs = [ranks.get(pair, len(ranks)) for pair in itertools.pairwise(symbols)]
        at = min(range(len(pairs)), key=pairs.__getitem__)
        if pairs[at] == len(ranks):
            break
        symbols[at : at + 2] = [symbols[at] + symbols[at + 1]]
    return symbols
