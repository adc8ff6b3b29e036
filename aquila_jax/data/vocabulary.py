"""The tokenizer: a sentencepiece unigram model that gives back every text exactly.

Ids 0, 1 and 2 are padding, end of document and unknown, as seqio expects; id 0 also starts every
sequence of decoder inputs. There is no normalisation, and what no piece covers is spelled in
UTF-8 bytes, so `decode(encode(text)) == text` for every text but one kind: sentencepiece writes a
space as U+2581 inside its pieces, so a U+2581 in the text comes back as a space. (A lone surrogate
is no text: Python cannot encode it.)
"""

import io
import itertools
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from aquila_jax.data.pretrained_tokenizer import find_tokenizer, open_tokenizer
from aquila_jax.errors import UserError
from aquila_jax.files import write_bytes

if TYPE_CHECKING:
    import seqio

PAD_ID, EOS_ID, UNK_ID = 0, 1, 2

# UTF-8 bytes of each language to train on: equal shares of bytes come out as about equal
# numbers of tokens, and 1 MB trains in seconds; with 4 MB the text takes 2 % fewer tokens.
SAMPLE_BYTES = 1_000_000

# Longer lines than this are cut before training, whose time is not linear in a line's length.
MAX_LINE_CHARACTERS = 4000

# Part of the model's definition: sums over threads are taken in a fixed order, so the same
# number of threads gives the same model everywhere, and another number a slightly other one.
NUM_THREADS = 2


def train_sentencepiece(
    texts: Mapping[str, Iterable[str]], path: str | Path, vocab_size: int
) -> None:
    """Trains the tokenizer on an equal share of each language and writes it to `path`.

    Deterministic: the same texts give the same file. The file appears whole or not at all.

    Args:
        texts: the documents of each language.
        path: where the model goes; folders are made.
        vocab_size: number of ids, the 256 bytes and 4 special ids included.

    Raises:
        UserError: sentencepiece cannot make that many pieces of this text.
    """
    import sentencepiece

    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.Train(
            sentence_iterator=itertools.chain.from_iterable(map(_sample_lines, texts.values())),
            model_writer=model,
            vocab_size=vocab_size,
            model_type="unigram",
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            byte_fallback=True,
            # The rarest 0.05 % of characters (seldom-used Chinese ones) are spelled in bytes.
            character_coverage=0.9995,
            split_digits=True,
            # A line end is a piece of its own: none is learnt from lines, and bytes cost more.
            user_defined_symbols=["\n"],
            pad_id=PAD_ID,
            eos_id=EOS_ID,
            unk_id=UNK_ID,
            bos_id=-1,
            max_sentence_length=4 * MAX_LINE_CHARACTERS,
            num_threads=NUM_THREADS,
            minloglevel=2,
        )
    except RuntimeError as error:
        reason = str(error).split("]")[-1].strip()
        raise UserError(
            f"cannot train a tokenizer of {vocab_size} pieces on this text ({reason}): "
            "set TextData.vocab_size to another number"
        ) from error
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_bytes(Path(path), model.getvalue())


def load_vocabulary(path: str | Path) -> "seqio.Vocabulary":
    """Returns the tokenizer at `path` as seqio's vocabulary; the ids are the file's own.

    Args:
        path: what `TextData.prepare` trained, or whatever `open_tokenizer` opens.

    Raises:
        UserError: as `open_tokenizer`; or the file changed after this process first loaded it
            (seqio keeps a sentencepiece model under its path for the life of the process).
    """
    from aquila_jax.data.tensorflow_setup import seqio

    if not open_tokenizer(path).is_seqios:
        from aquila_jax.data.seqio_vocabulary import PretrainedVocabulary

        return PretrainedVocabulary(path)
    path = find_tokenizer(path)
    vocabulary = seqio.SentencePieceVocabulary(os.path.abspath(path), extra_ids=0)
    if vocabulary.sp_model != path.read_bytes():
        raise UserError(
            f"tokenizer {path} changed after this process loaded it: start a new process, or set "
            "TextData.tokenizer_path to a new name"
        )
    return vocabulary


def _sample_lines(texts: Iterable[str]) -> Iterator[str]:
    """Yields about `SAMPLE_BYTES` of lines, taken evenly from beginning to end."""
    lines = [
        line[start : start + MAX_LINE_CHARACTERS]
        for text in texts
        for line in text.split("\n")
        for start in range(0, len(line), MAX_LINE_CHARACTERS)
    ]
    share = min(1.0, SAMPLE_BYTES / max(1, sum(len(line.encode()) for line in lines)))
    for index, line in enumerate(lines):
        # A line is taken where the running count share * index passes a whole number.
        if int(share * (index + 1)) > int(share * index):
            yield line
