"""What a run asks of its data."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

import numpy as np

NumpyBatch = dict[str, np.ndarray]


class Data(Protocol):
    """What a run needs of its data; `aquila_jax.data.TextData` is one."""

    @property
    def batch_size(self) -> int:
        """B, rows of a batch."""
        ...

    @property
    def sequence_length(self) -> int:
        """T, tokens of a row."""
        ...

    @property
    def vocab_size(self) -> int:
        """Token ids lie below this."""
        ...

    @property
    def tokenizer_path(self) -> str:
        """Where the tokenizer is, of which MODEL_DIR keeps a copy; "" for none."""
        ...

    def prepare(self) -> None:
        """Make what is made once, or raise `UserError` for what is missing."""
        ...

    def identity(self) -> Mapping[str, str]:
        """Digests of `vocabulary`, what ids mean, and of `order`, which batch comes when."""
        ...

    def train_batches(
        self, start: int = 0, *, rows: Sequence[int] | None = None
    ) -> Iterator[NumpyBatch]:
        """Endless batches, the same for the same seed, beginning with number `start`.

        Of each the given `rows`, in their order; all of them by default.
        """
        ...

    def validation_batches(self, num_batches: int) -> Mapping[str, list[NumpyBatch]]:
        """Fixed batches of held-out text, by language."""
        ...
