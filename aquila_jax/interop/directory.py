"""A Hugging Face directory, checked whole and read tensor by tensor."""

import mmap
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from aquila_jax import axes
from aquila_jax.errors import UserError
from aquila_jax.interop import layout
from aquila_jax.interop.families import HubConfig, read_json
from aquila_jax.interop.safetensors_format import DTYPES, Entry, read_header

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

# Rotary frequencies, which old checkpoints store and everyone computes.
_HARMLESS = re.compile(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")
_OUTPUT_BIAS = "model.layers.{layer}.self_attn.o_proj.bias"


class Directory:
    """The configuration and the tensors of a Hugging Face directory.

    Opening one reads headers only, and checks that the tensors are exactly those its
    `config.json` asks for. Files are mapped into memory when a tensor of theirs is first read.

    Attributes:
        path: the directory.
        model_type: its family, as "llama".
        config: its architecture.
        whole_leaves: that a tensor is read without the others of its leaf.
        companions: where its tokenizer is: the directory.

    Raises:
        UserError: naming the file or the tensors that are missing, unknown, damaged, of another
            shape, or beyond what is supported.
    """

    whole_leaves = False

    def __init__(self, path: str | Path) -> None:
        self.path = self.companions = Path(path)
        hub = HubConfig.read(self.path)
        self.model_type = hub.model_type
        self.config = hub.to_model()
        self._parameters = axes.parameters(self.config)
        self._maps: dict[Path, mmap.mmap] = {}
        self._entries = _find_tensors(self.path)
        self._refuse_hopeless()
        biases = _output_biases(self.config.num_layers) if hub.has_output_bias else ()
        self._check_tensors(biases)
        for name in biases:
            if self._tensor(name).any():
                raise hub.refusal(
                    f"attention_bias: {name} is not zero, and the attention's output has no bias "
                    "here; only biases of query, key and value are supported"
                )

    def dtype(self, path: str) -> np.dtype:
        """The dtype of a leaf: of its tensors, or what theirs promote to."""
        stored = {
            DTYPES[self._entries[name][1].dtype]
            for name, item in layout.slices(self.config).items()
            if item.path == path
        }
        return np.dtype(jnp.result_type(*stored))

    def read(self, path: str, layer: int | None = None, expert: int | None = None) -> np.ndarray:
        """One layer of a leaf, or one expert of one layer, in our layout.

        Args:
            path: the leaf, as in `axes.parameters`.
            layer: which layer, for a leaf that has layers; None for one that has none.
            expert: which expert, for the weights of experts.

        Returns:
            A read-only view into the file, in the stored dtype; matrices are transposed by their
            strides, so that writing one to another directory copies it straight through.

        Raises:
            ValueError: the model has no such slice.
        """
        name = layout.checked_name(self.config, layout.Slice(path, layer, expert))
        return layout.from_file(self._tensor(name), self._parameters[path], self.config)

    def release(self, path: str, layer: int | None = None, expert: int | None = None) -> None:
        """Let go of the memory behind a slice that was read; reading it again is allowed."""
        name = layout.checked_name(self.config, layout.Slice(path, layer, expert))
        file, entry = self._entries[name]
        if file in self._maps and hasattr(mmap, "MADV_DONTNEED"):
            # Whole pages within the tensor: the ones at its ends may be another's, too.
            first = -(-entry.offset // mmap.PAGESIZE) * mmap.PAGESIZE
            last = (entry.offset + entry.num_bytes) // mmap.PAGESIZE * mmap.PAGESIZE
            if last > first:
                self._maps[file].madvise(mmap.MADV_DONTNEED, first, last - first)

    def _tensor(self, name: str) -> np.ndarray:
        file, entry = self._entries[name]
        if file not in self._maps:
            with file.open("rb") as opened:
                self._maps[file] = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
        dtype = DTYPES[entry.dtype]
        count = entry.num_bytes // dtype.itemsize
        flat = np.frombuffer(self._maps[file], dtype, count, entry.offset)
        return flat.reshape(entry.shape)

    def _refuse_hopeless(self) -> None:
        """A configuration of more layers or experts than there are tensors is not spelled out."""
        config, found = self.config, len(self._entries)
        experts = config.num_layers // config.moe_every * config.num_experts
        if max(config.num_layers, experts) > found:
            raise UserError(
                f"{self.path}: config.json asks for {config.num_layers} layers"
                + (f" and {config.num_experts} experts" if config.is_moe else "")
                + f", and there are {found} tensors in all; fetch both again"
            )

    def _check_tensors(self, biases: Iterable[str]) -> None:
        """Names, shapes and dtypes are those of the configuration."""
        expected = {
            name: layout.file_shape(self._parameters[item.path], self.config)
            for name, item in layout.slices(self.config).items()
        }
        expected.update((name, (self.config.embed_dim,)) for name in biases)
        # A tied head may have been written out all the same.
        head = (self.config.vocab_size, self.config.embed_dim)
        optional = {layout.HEAD: head} if self.config.tie_embeddings else {}
        found = {
            name: entry
            for name, (_, entry) in self._entries.items()
            if not _HARMLESS.fullmatch(name)
        }
        layout.refuse_listed(
            f"tensors of {self.path} are of a type other than {', '.join(DTYPES)}",
            {
                dtype: [name for name, entry in found.items() if entry.dtype == dtype]
                for dtype in {entry.dtype for entry in found.values()} - set(DTYPES)
            },
        )
        shapes = {name: entry.shape for name, entry in found.items()}
        layout.check_names_and_shapes(str(self.path), expected, shapes, optional)


def _find_tensors(path: Path) -> dict[str, tuple[Path, Entry]]:
    """File and place of every tensor by name, from the headers of one file or of all shards."""
    single, index = path / SINGLE_FILE, path / INDEX_FILE
    if single.exists():
        return {name: (single, entry) for name, entry in read_header(single).items()}
    if not index.exists():
        raise UserError(
            f"{path} holds neither {SINGLE_FILE} nor {INDEX_FILE}; other formats (.bin, .pth) "
            "are not read: save the model with safe_serialization=True first"
        )
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
        raise UserError(f"{index} has no weight_map from tensors to files; fetch or write it again")
    headers = {file: _shard_header(path, file) for file in sorted(set(weight_map.values()))}
    _check_index(index, weight_map, headers)
    return {
        name: (path / file, entry)
        for file, header in headers.items()
        for name, entry in header.items()
    }


def _shard_header(path: Path, file: str) -> dict[str, Entry]:
    if Path(file).name != file:
        raise UserError(f"{path / INDEX_FILE} names {file!r}, which is no file of this directory")
    try:
        is_there = (path / file).is_file()
    except OSError:  # a name too long to be one
        is_there = False
    if not is_there:
        name = layout.printable(file)
        raise UserError(f"{path / INDEX_FILE} names {name}, which is missing; fetch it again")
    return read_header(path / file)


def _check_index(
    index: Path, weight_map: Mapping[str, str], headers: Mapping[str, Mapping[str, Entry]]
) -> None:
    """Index and shards say the same about which tensor lies where."""
    lies_in = {(name, file) for file, header in headers.items() for name in header}
    said = set(weight_map.items())
    layout.refuse_listed(
        f"{index} and its files disagree about tensors",
        {
            "named but not there": [f"{name} in {file}" for name, file in sorted(said - lies_in)],
            "there but not named": [f"{name} in {file}" for name, file in sorted(lies_in - said)],
        },
    )


def _output_biases(num_layers: int) -> list[str]:
    return [_OUTPUT_BIAS.format(layer=layer) for layer in range(num_layers)]
