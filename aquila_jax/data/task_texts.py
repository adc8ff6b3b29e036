"""The text of seqio tasks, for models with tokenizers of their own. Imports TensorFlow."""

import importlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from aquila_jax.data.tensorflow_setup import seqio
from aquila_jax.errors import UserError

_CONTEXT, _TEXT = "inputs", "targets"
# Longer than any example, so that nothing is trimmed.
_UNTRIMMED = np.iinfo(np.int32).max


class TaskText(NamedTuple):
    """An example of a task: what is given, "" where nothing is, and what follows."""

    context: str
    text: str


def read_task_texts(
    name: str, split: str = "validation", module: str = "", limit: int | None = None
) -> list[TaskText]:
    """The examples of a task or a mixture, in order, as text.

    Where the task keeps the text from before its tokenizer (`targets_pretokenized`), that is read;
    elsewhere its own vocabulary spells out the ids.

    Args:
        name: as registered with seqio. Its features are `targets` and perhaps `inputs`.
        split: of the task.
        module: Python code that registers it, which is run; "" where that has been done.
        limit: the first so many; None is all.

    Raises:
        UserError: there is no such module, task or split, or it has no text.

    References:
        https://github.com/google/seqio
    """
    if module:
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise UserError(f"cannot import {module}, which registers tasks: {error}") from error
    known = {*seqio.TaskRegistry.names(), *seqio.MixtureRegistry.names()}
    if name not in known:
        raise UserError(
            f"seqio knows no task or mixture {name!r}: import the module that registers it "
            f"(--seqio_module); there are {', '.join(sorted(known)) or 'none'}"
        )
    task: Any = seqio.get_mixture_or_task(name)
    if split not in task.splits:
        raise UserError(f"{name} has no split {split!r}; there are {', '.join(task.splits)}")
    features: Mapping[str, Any] = task.output_features
    if _TEXT not in features:
        raise UserError(f"{name} has features {', '.join(features)}, and not {_TEXT}")
    dataset = task.get_dataset(
        sequence_length=dict.fromkeys(features, _UNTRIMMED), split=split, shuffle=False
    )
    dataset = dataset if limit is None else dataset.take(limit)
    found = [
        TaskText(*(_spelled(example, part, features) for part in (_CONTEXT, _TEXT)))
        for example in dataset.as_numpy_iterator()
    ]
    if not any(example.text for example in found):
        raise UserError(f"{name} has no text in its split {split!r}")
    return [example for example in found if example.text]


def _spelled(example: Mapping[str, Any], part: str, features: Mapping[str, Any]) -> str:
    before = example.get(f"{part}_pretokenized")
    if isinstance(before, bytes):
        return before.decode()
    if part not in features:
        return ""
    vocabulary = features[part].vocabulary
    ids = [int(i) for i in example[part] if i not in (vocabulary.eos_id, vocabulary.pad_id)]
    return vocabulary.decode(ids)
