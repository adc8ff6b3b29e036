"""Models as PyTorch's `transformers` reads them, to be compared with what this library reads.

Optional, and imported when such a model is opened. No code of a model's directory is run, and
nothing is fetched.
"""

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from aquila_jax.errors import UserError, first_line
from aquila_jax.interop.families import CONFIG_FILE, HubConfig


class TransformersModel:
    """A model and its tokenizer by `transformers`, in float32.

    Attributes:
        context_length: tokens it reads at most.

    Args:
        path: a Hugging Face directory, a GGUF file or a directory that holds one.
        tokenizer: a directory to take the tokenizer from; None is the model's own.

    Raises:
        UserError: `transformers` or PyTorch is not installed, the directory is not one that it
            reads, or parameters are missing, which it would draw at random.
    """

    def __init__(self, path: Path, tokenizer: Path | None = None) -> None:
        try:
            transformers = importlib.import_module("transformers")
            self._torch = importlib.import_module("torch")
        except ImportError as error:
            raise UserError(
                f"{path} is to be read by transformers, which is not installed here "
                f"({error.name} is missing): pip install torch transformers"
            ) from error
        transformers.utils.logging.set_verbosity_error()
        folder, options = _where(path)
        local: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
        try:
            self._model, report = transformers.AutoModelForCausalLM.from_pretrained(
                folder, dtype=self._torch.float32, output_loading_info=True, **local, **options
            )
            named, own = (folder, options) if tokenizer is None else _where(tokenizer)
            self._tokenizer = transformers.AutoTokenizer.from_pretrained(named, **local, **own)
        except (OSError, ValueError, KeyError, RuntimeError, ImportError, TypeError) as error:
            raise UserError(f"transformers does not read {path}: {first_line(error)}") from error
        for kind in ("missing_keys", "mismatched_keys"):
            if names := sorted(map(str, report.get(kind) or ())):
                raise UserError(
                    f"transformers reads {path} with {len(names)} {kind.replace('_', ' ')}, as "
                    f"{names[0]}: it draws them at random"
                )
        self._model.eval()
        self.context_length: int = self._model.config.max_position_embeddings

    def encode(self, text: str) -> list[int]:
        """The ids of a text, with none added at its ends."""
        return list(self._tokenizer.encode(text, add_special_tokens=False))

    def logits(self, ids: Sequence[int]) -> np.ndarray:
        """`[T, V]` float32.

        Raises:
            UserError: an id lies beyond the model's.
        """
        num_ids = self._model.get_input_embeddings().weight.shape[0]
        if max(ids) >= num_ids:
            raise UserError(f"the text has the id {max(ids)}, and the model {num_ids} ids")
        with self._torch.no_grad():
            return self._model(self._torch.tensor([list(ids)])).logits[0].float().numpy()


def _where(path: Path) -> tuple[Path, dict[str, str]]:
    """The directory, and the GGUF file in it where it is one.

    Raises:
        UserError: it is neither, or of a family of this library's own.
    """
    if (path / CONFIG_FILE).is_file():
        family = HubConfig.read(path).model_type
        if family.startswith("aquila"):
            raise UserError(
                f"{path} holds a model of the family {family}, which transformers does not know"
            )
        return path, {}
    files = sorted(path.glob("*.gguf")) if path.is_dir() else [path]
    if len(files) != 1 or files[0].suffix != ".gguf" or not files[0].is_file():
        raise UserError(
            f"{path} is neither a Hugging Face directory nor one GGUF file, which is what "
            "transformers reads: write it as one by `aquila convert`"
        )
    return files[0].parent, {"gguf_file": files[0].name}
