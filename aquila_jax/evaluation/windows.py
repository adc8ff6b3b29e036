"""Perplexity of any text, by token and by byte, in sliding windows."""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from aquila_jax.errors import UserError
from aquila_jax.evaluation.scoring import Scorer


class TextLoss(NamedTuple):
    """What a model makes of a text.

    Attributes:
        nats: the loss, summed over all tokens.
        num_tokens: how many the model's tokenizer makes of it.
        num_bytes: of its UTF-8; the same for every tokenizer.
    """

    nats: float
    num_tokens: int
    num_bytes: int

    @property
    def per_token(self) -> float:
        """Nats per token."""
        return self.nats / self.num_tokens

    @property
    def perplexity(self) -> float:
        """The exponential of the nats per token; infinite where that is no float."""
        return math.exp(self.per_token) if self.per_token < 700 else math.inf

    @property
    def bits_per_byte(self) -> float:
        """Bits per byte, which compares models with different tokenizers."""
        return self.nats / self.num_bytes / math.log(2)


def read_text(path: str | Path) -> str:
    """A file's text.

    Raises:
        UserError: there is no such file, it is not UTF-8, or it is empty.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"there is no file {path}")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 ({error})") from error
    if not text.strip():
        raise UserError(f"{path} is empty: nothing can be measured on it")
    return text


def pieces(text: str, *, length: int = 2000) -> list[str]:
    """A text cut at ends of lines, into pieces of `length` characters or somewhat more.

    For confidence intervals, which need more than one item; no model decides where it is cut.
    """
    found, piece = [], ""
    for line in text.splitlines(keepends=True):
        piece += line
        if len(piece) >= length:
            found.append(piece)
            piece = ""
    return [part for part in (*found, piece) if part.strip()]


def windows(
    ids: Sequence[int],
    *,
    start_id: int,
    length: int,
    stride: int,
    context: Sequence[int] = (),
) -> Iterator[tuple[list[int], list[int]]]:
    """A text as pairs of context and continuation, in which every token is scored once.

    Args:
        ids: the text.
        start_id: stands before the first token.
        length: tokens that the model reads at once.
        stride: tokens scored in each window; the rest of it is context. `length` is no overlap:
            faster, and with less context for the first tokens of a window.
        context: what is given before the text, and not scored.

    Raises:
        UserError: the stride is not between 1 and the length.
    """
    if not 1 <= stride <= length:
        raise UserError(f"stride must lie between 1 and {length}, not {stride}")
    text = [start_id, *context, *ids]
    done = 1 + len(context)
    while done < len(text):
        # The first window has nothing to go on, so it scores all that it reads.
        end = min(done + (length if done == 1 else stride), len(text))
        yield text[max(0, end - length - 1) : done], text[done:end]
        done = end


def text_losses(
    scorer: Scorer,
    texts: Sequence[str],
    *,
    stride: int | None = None,
    contexts: Sequence[str] | None = None,
) -> list[TextLoss]:
    """The loss of every text by itself.

    Args:
        scorer: the model.
        texts: of any length.
        stride: tokens scored in each window of `scorer.max_length`; None is half of it.
        contexts: what is given before each; None is nothing.

    Raises:
        UserError: a text is empty, or the stride is out of its range.
    """
    length = scorer.max_length
    stride = max(1, length // 2) if stride is None else stride
    pairs, owners, tokens = [], [], []
    for number, text in enumerate(texts):
        ids = scorer.tokenizer.encode(text)
        context = scorer.tokenizer.encode(contexts[number]) if contexts else []
        if not ids:
            raise UserError(f"text {number + 1} of {len(texts)} is empty: leave it out")
        own = list(
            windows(ids, start_id=scorer.start_id, length=length, stride=stride, context=context)
        )
        pairs += own
        owners += [number] * len(own)
        tokens.append(len(ids))
    nats = [0.0] * len(texts)
    for owner, score in zip(owners, scorer.score(pairs), strict=True):
        nats[owner] -= score.log_likelihood
    return [
        TextLoss(total, count, len(text.encode()))
        for total, count, text in zip(nats, tokens, texts, strict=True)
    ]


def total_loss(losses: Sequence[TextLoss]) -> TextLoss:
    """Of several texts together."""
    return TextLoss(*(sum(column) for column in zip(*losses, strict=True)))
