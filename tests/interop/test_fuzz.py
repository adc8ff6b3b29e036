"""Any bytes whatever: a clear refusal or the right answer, and never a file from elsewhere."""

import contextlib
import dataclasses
import json
import shutil
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar
from unittest import mock

import gguf
import numpy as np
import pytest
import safetensors
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from aquila_jax import UserError
from aquila_jax.interop import Directory, load_gguf, slices
from aquila_jax.interop.families import HubConfig
from aquila_jax.interop.safetensors_format import read_header

from . import test_gguf_file
from .conftest import CONFIGS, DENSE

T = TypeVar("T")
# One file is damaged over and over: each example puts it back.
BOUNDED = settings(
    max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
SIZES = st.one_of(
    st.integers(-3, 100), st.sampled_from([2**31, 2**63, 2**64, 10**30, -(2**63), 10**9, 10**400])
)
SCALARS = st.one_of(
    st.none(), st.booleans(), SIZES, st.floats(), st.text(max_size=8), st.just("\ud800")
)
JSON = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=6,
)
FILES = st.one_of(
    st.text(max_size=10),
    st.sampled_from(
        [
            "../model.safetensors",
            "/etc/passwd",
            "..",
            ".",
            "",
            "a\0b",
            "a" * 300,
            "x/../y",
            "\ud800",
        ]
    ),
)


def outcome(read: Callable[[], T], most_bytes: int = 8 << 20) -> T | None:
    """What is read, or None where it is refused by a UserError of one line."""
    result, refusal = None, ""
    tracemalloc.start()
    try:
        result = read()
    except UserError as error:
        refusal = str(error)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert "\n" not in refusal
    assert peak < most_bytes
    return result


def damaged(content: bytes, draw: st.DataObject) -> bytes:
    """Some bytes of a file changed, left out, repeated or cut off."""
    for _ in range(draw.draw(st.integers(1, 4))):
        at, length = draw.draw(st.integers(0, len(content))), draw.draw(st.integers(0, 12))
        new = draw.draw(st.one_of(st.binary(max_size=12), st.just(content[at : at + length])))
        content = content[:at] + new + content[at + length :]
    return content[: draw.draw(st.one_of(st.none(), st.integers(0, len(content))))]


@pytest.fixture
def whole(saved, tmp_path) -> Callable[..., Path]:
    """A directory of a tiny model, each time as it was."""
    original = saved(name="original", max_shard_bytes=4000)
    single = saved(name="single")

    def restore(is_single: bool = False) -> Path:
        path = tmp_path / "model"
        shutil.rmtree(path, ignore_errors=True)
        shutil.copytree(single if is_single else original, path)
        return path

    return restore


def assert_as_theirs(path: Path) -> None:
    """What our reader accepts, the format's own library reads alike."""
    ours = read_header(path)
    with safetensors.safe_open(path, "np") as theirs:
        assert set(theirs.keys()) == set(ours)
        for name, entry in ours.items():
            assert theirs.get_slice(name).get_shape() == list(entry.shape)


@BOUNDED
@given(draw=st.data())
def test_a_damaged_file_is_refused_or_read_as_the_formats_own_library_does(whole, draw):
    file = whole(is_single=True) / "model.safetensors"
    content = file.read_bytes()
    header_end = 8 + int.from_bytes(content[:8], "little")
    kept = damaged(content[:header_end], draw)
    file.write_bytes(draw.draw(st.sampled_from([kept, kept + content[header_end:]])))
    if outcome(lambda: read_header(file)):
        assert_as_theirs(file)


@BOUNDED
@given(entries=st.dictionaries(st.text(max_size=6), JSON, max_size=4), data=st.binary(max_size=64))
def test_any_header_is_refused_or_describes_the_file(tmp_path, entries, data):
    write_header(tmp_path / "file", entries, data)
    outcome(lambda: read_header(tmp_path / "file"))


@BOUNDED
@given(
    draw=st.data(),
    data=st.binary(max_size=64),
    dtype=st.one_of(st.sampled_from(["F32", "BF16", "F16", "I8", "F8_E4M3"]), JSON),
)
def test_any_entry_is_refused_or_lies_within_the_file(tmp_path, draw, data, dtype):
    entries = {
        name: {
            "dtype": dtype,
            "shape": draw.draw(st.one_of(st.lists(SIZES, max_size=3), JSON)),
            "data_offsets": draw.draw(st.one_of(st.lists(SIZES, min_size=2, max_size=2), JSON)),
        }
        for name in draw.draw(st.lists(st.text(max_size=3), max_size=2))
    }
    write_header(tmp_path / "file", entries, data)
    found = outcome(lambda: read_header(tmp_path / "file")) or {}
    size = (tmp_path / "file").stat().st_size
    for entry in found.values():
        assert 0 <= entry.offset <= entry.offset + entry.num_bytes <= size


def write_header(path: Path, header: object, data: bytes) -> None:
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


@BOUNDED
@given(draw=st.data())
def test_any_index_is_refused_or_right_and_opens_files_of_its_directory_alone(whole, draw):
    path = whole()
    (path.parent / "model.safetensors").write_bytes(b"from elsewhere")
    index = path / "model.safetensors.index.json"
    values = json.loads(index.read_text())
    kind = draw.draw(st.sampled_from(["bytes", "map", "value"]))
    if kind == "bytes":
        index.write_bytes(damaged(index.read_bytes(), draw))
    elif kind == "map":
        names = st.one_of(st.sampled_from(sorted(values["weight_map"])), st.text(max_size=4))
        changes = draw.draw(st.dictionaries(names, FILES, min_size=1, max_size=2))
        index.write_text(json.dumps({**values, "weight_map": values["weight_map"] | changes}))
    else:
        index.write_text(json.dumps(draw.draw(st.fixed_dictionaries({"weight_map": JSON}) | JSON)))
    with opened() as files:
        directory = outcome(lambda: Directory(path))
    assert all(Path(file).parent == path for file in files)
    if directory is not None:
        assert_reads_like(directory, Directory(path.parent / "original"))


@contextlib.contextmanager
def opened() -> Iterator[list[Path]]:
    """The files that `Path.open` opens."""
    files: list[Path] = []
    real = Path.open

    def note(path, *arguments, **options):
        files.append(path)
        return real(path, *arguments, **options)

    with mock.patch.object(Path, "open", note):
        yield files


def assert_reads_like(directory: Directory, original: Directory) -> None:
    for item in slices(DENSE).values():
        where = (item.path, item.layer, item.expert)
        np.testing.assert_array_equal(directory.read(*where), original.read(*where))


KEYS = sorted(
    {
        *("model_type", "rope_scaling", "rope_parameters", "head_dim", "num_key_value_heads"),
        *("quantization_config", "attention_bias", "num_hidden_layers", "hidden_size"),
        *("num_attention_heads", "intermediate_size", "max_position_embeddings", "vocab_size"),
        *("rms_norm_eps", "rope_theta", "num_experts", "num_local_experts", "num_experts_per_tok"),
        *("sliding_window", "use_sliding_window", "max_window_layers", "decoder_sparse_step"),
        *("moe_intermediate_size", "mlp_only_layers", "partial_rotary_factor", "hidden_act"),
    }
)


@BOUNDED
@given(draw=st.data(), name=st.sampled_from(sorted(CONFIGS)))
def test_any_configuration_is_refused_or_read(saved, tmp_path, draw, name):
    path = tmp_path / name
    if not path.exists():
        saved(CONFIGS[name], name=name)
        shutil.copy(path / "config.json", tmp_path / f"{name}.json")
    values = json.loads((tmp_path / f"{name}.json").read_text())
    if draw.draw(st.integers(0, 3)):
        changes = st.dictionaries(st.sampled_from(KEYS), st.one_of(SCALARS, JSON), min_size=1)
        (path / "config.json").write_text(json.dumps(values | draw.draw(changes)))
    else:
        content = json.dumps(values).encode()
        (path / "config.json").write_bytes(damaged(content, draw))
    config = outcome(lambda: HubConfig.read(path).to_model())
    directory = outcome(lambda: Directory(path))
    if directory is not None:
        assert directory.config == config


@pytest.mark.parametrize("key", ["num_hidden_layers", "num_local_experts", "vocab_size"])
def test_a_configuration_of_a_billion_is_refused_at_once(saved, key):
    path = saved(CONFIGS["mixtral"])
    values = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(values | {key: 10**9}))
    with pytest.raises(UserError):
        Directory(path)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
def test_json_nested_without_end_is_refused(whole, name):
    path = whole()
    (path / name).write_text("[" * 100_000)
    with pytest.raises(UserError, match=f"{name} is not JSON"):
        Directory(path)


@BOUNDED
@given(draw=st.data())
def test_a_damaged_gguf_file_is_refused_or_read(tmp_path, random_params, draw):
    file, original = tmp_path / "model.gguf", tmp_path / "original"
    config = dataclasses.replace(test_gguf_file.CONFIG, num_layers=1)
    if not original.exists():
        test_gguf_file.write(original, random_params(config), config)
    content = original.read_bytes()
    data = gguf.GGUFReader(original).data_offset
    file.write_bytes(damaged(content[:data], draw) + content[data:])
    found = outcome(lambda: load_gguf(file), most_bytes=64 << 20)
    if found is not None:
        assert set(found[0]) == {"token_embedder", "layers", "final_norm", "lm_head"}
