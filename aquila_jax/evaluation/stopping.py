"""The text of tokens as they come, until a string that ends it."""

from collections.abc import Sequence

from aquila_jax.data.pretrained_tokenizer import Tokenizer
from aquila_jax.errors import UserError

# So much of a prompt is decoded with what follows it, for spaces between words to come out right.
_CONTEXT_TOKENS = 8
# What stands for bytes that are no whole character (yet).
_BROKEN = "\N{REPLACEMENT CHARACTER}"


def check_stops(stops: Sequence[str]) -> tuple[str, ...]:
    """The strings, or an error.

    Raises:
        UserError: one string is given for a list, or one of them is empty.
    """
    if isinstance(stops, str) or not all(isinstance(stop, str) and stop for stop in stops):
        raise UserError(f"stop strings must be a list of strings that are not empty, not {stops!r}")
    return tuple(stops)


class TextStream:
    """What one row has said so far.

    Attributes:
        ids: the generated tokens, without the one that ends a document.
        reason: why it ended: "eos", "stop", "length", or "" while it goes on.

    Args:
        tokenizer: decodes.
        prompt: ids before the first generated one.
        stops: strings that end the text, wherever tokens divide them; the text ends before.
        max_new_tokens: how many tokens may come.
        stop_at_eos: whether the tokenizer's `eos_id` ends the text.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt: Sequence[int],
        *,
        stops: Sequence[str] = (),
        max_new_tokens: int,
        stop_at_eos: bool = True,
    ) -> None:
        self.ids: list[int] = []
        self.reason = ""
        self._tokenizer, self._stops = tokenizer, tuple(stops)
        self._max_new_tokens, self._stop_at_eos = max_new_tokens, stop_at_eos
        self._context = list(prompt[-_CONTEXT_TOKENS:])
        self._text = ""
        self._num_shown = 0

    def push(self, token: int) -> None:
        """Take one more token; what comes after the end is ignored."""
        if self.reason:
            return
        if self._stop_at_eos and token == self._tokenizer.eos_id:
            self.reason = "eos"
            return
        self.ids.append(token)
        self._text = self._decoded()
        found = [at for stop in self._stops if (at := self._text.find(stop)) >= 0]
        if found:
            self._text, self.reason = self._text[: min(found)], "stop"
        elif len(self.ids) >= self._max_new_tokens:
            self.reason = "length"

    @property
    def text(self) -> str:
        """The whole text so far."""
        return self._text

    def news(self) -> str:
        """What can be shown since the last call: nothing that may yet become a stop string."""
        end = len(self._text)
        if not self.reason:
            end -= self._num_held_back()
        # The beginning of a character that turns out otherwise is never shown, so nothing is lost.
        shown, self._num_shown = self._text[self._num_shown : end], max(self._num_shown, end)
        return shown

    def _num_held_back(self) -> int:
        text = self._text.rstrip(_BROKEN)
        held = max(
            (
                length
                for stop in self._stops
                for length in range(1, len(stop))
                if text.endswith(stop[:length])
            ),
            default=0,
        )
        return held + len(self._text) - len(text)

    def _decoded(self) -> str:
        before = self._tokenizer.decode(self._context)
        both = self._tokenizer.decode([*self._context, *self.ids])
        return both[len(before) :] if both.startswith(before) else self._tokenizer.decode(self.ids)
