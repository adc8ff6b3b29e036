"""Small sentencepiece models in the form of Llama 2's."""

import io
from collections.abc import Iterable
from typing import Any

import sentencepiece


def train(lines: Iterable[str], vocab_size: int, **options: Any) -> bytes:
    """Unknown, begin and end first, bytes for what is not known, a space before the text."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=iter(lines),
        model_writer=model,
        vocab_size=vocab_size,
        model_type="bpe",
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        byte_fallback=True,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        minloglevel=2,
        **options,
    )
    return model.getvalue()
