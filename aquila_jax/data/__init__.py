"""Text in two languages as packed batches; TensorFlow is imported when text is first read."""

from aquila_jax.data.cache import TokenCache, prepare_cache, write_cache
from aquila_jax.data.chat_data import ChatData
from aquila_jax.data.pipeline import Batch, TextData
from aquila_jax.data.pretrained_tokenizer import open_tokenizer
from aquila_jax.data.sources import SOURCES, Document, TextFiles, is_validation
from aquila_jax.data.vocabulary import load_vocabulary, train_sentencepiece

__all__ = [
    "SOURCES",
    "Batch",
    "ChatData",
    "Document",
    "TextData",
    "TextFiles",
    "TokenCache",
    "is_validation",
    "load_vocabulary",
    "open_tokenizer",
    "prepare_cache",
    "train_sentencepiece",
    "write_cache",
]
