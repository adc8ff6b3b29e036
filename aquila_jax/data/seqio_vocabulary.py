"""Tokenizers of pretrained models in seqio: their vocabulary, and batches where id 0 is a word.

Imports TensorFlow: imported when text is read.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from aquila_jax.data.pretrained_tokenizer import Tokenizer, open_tokenizer
from aquila_jax.data.tensorflow_setup import seqio, tf

if TYPE_CHECKING:
    import tensorflow


class PretrainedVocabulary(seqio.Vocabulary):
    """The tokenizer of a pretrained model as seqio's vocabulary; the ids are the file's own.

    seqio's feature converters take id 0 for padding, which in most pretrained models is a word or
    a special token: batch such ids with `LanguageModelConverter`.

    Args:
        path: as for `open_tokenizer`.

    Raises:
        UserError: as `open_tokenizer`.
    """

    def __init__(self, path: str | Path) -> None:
        super().__init__(extra_ids=0)
        self.tokenizer: Tokenizer = open_tokenizer(path)

    @property
    def bos_id(self) -> int | None:
        """Begins a document; None where the model was trained without."""
        return self.tokenizer.bos_id

    @property
    def eos_id(self) -> int | None:
        """Ends a document."""
        return self.tokenizer.eos_id

    @property
    def pad_id(self) -> int:
        """Fills a row; `eos_id` where the file has no padding."""
        return self.tokenizer.pad_id

    @property
    def unk_id(self) -> int | None:
        """For what cannot be spelled; None where everything can."""
        return self.tokenizer.unk_id

    @property
    def _base_vocab_size(self) -> int:
        return self.tokenizer.num_ids

    def _encode(self, s: str) -> Sequence[int]:
        return self.tokenizer.encode(s)

    def _decode(self, ids: Iterable[int]) -> str:
        return self.tokenizer.decode(ids)

    def _encode_tf(self, s: "tensorflow.Tensor") -> "tensorflow.Tensor":
        def encode(text: Any) -> np.ndarray:
            # Eagerly it is an array of one object.
            text = text if isinstance(text, bytes) else text.item()
            return np.asarray(self.tokenizer.encode(text.decode()), np.int32)

        text = tf.convert_to_tensor(s)
        return tf.ensure_shape(tf.numpy_function(encode, [text], tf.int32), [None])

    def _decode_tf(self, ids: "tensorflow.Tensor") -> "tensorflow.Tensor":
        def decode(rows: np.ndarray) -> Any:
            texts = [
                self.tokenizer.decode(row).encode() for row in rows.reshape(-1, rows.shape[-1])
            ]
            return np.array(texts, object).reshape(rows.shape[:-1])

        return tf.ensure_shape(tf.numpy_function(decode, [ids], tf.string), ids.shape[:-1])

    def __eq__(self, other: object) -> bool:
        """Whether ids mean the same."""
        if not isinstance(other, PretrainedVocabulary):
            return False
        return self.tokenizer.digest == other.tokenizer.digest

    def __hash__(self) -> int:
        """Of what ids mean."""
        return hash(self.tokenizer.digest)


class LanguageModelConverter(seqio.LMFeatureConverter):
    """seqio's own converter for decoders, for ids of which 0 is no padding.

    Ids are one higher inside, so that seqio's padding is nobody's id. Padding is known by its loss
    weight and its segment, which are 0.

    Args:
        start_id: stands before every piece of a document.
        **options: of `seqio.LMFeatureConverter`.
    """

    def __init__(self, *, start_id: int = 0, **options: Any) -> None:
        super().__init__(**options)
        self._start_id = start_id

    def _convert_features(
        self, ds: "tensorflow.data.Dataset", task_feature_lengths: Mapping[str, int]
    ) -> "tensorflow.data.Dataset":
        raised = ds.map(lambda example: {name: ids + 1 for name, ids in example.items()})
        return super()._convert_features(raised, task_feature_lengths).map(self._lowered)

    def _lowered(self, features: Mapping[str, Any]) -> dict[str, Any]:
        tokens, targets = (features[f"decoder_{kind}_tokens"] for kind in ("input", "target"))
        # 0 now begins a piece, or is padding, of which the first is not to be told from a start.
        return {
            **features,
            "decoder_input_tokens": tf.where(tokens > 0, tokens - 1, self._start_id),
            "decoder_target_tokens": tf.maximum(targets - 1, 0),
        }
