"""Headers: ours are what the format's own library reads, and damage is told."""

import json

import numpy as np
import pytest
import safetensors.numpy

from aquila_jax import UserError
from aquila_jax.interop import arrays, slices
from aquila_jax.interop.safetensors_format import plan_file, read_header

from .conftest import DENSE, read_raw, write_raw


@pytest.fixture
def file(saved):
    return saved() / "model.safetensors"


def test_the_formats_own_library_reads_what_we_write(file, random_params):
    theirs = safetensors.numpy.load_file(file)
    assert list(read_header(file)) == list(slices(DENSE))
    assert set(theirs) == set(slices(DENSE))
    embedding = random_params(DENSE)["token_embedder"]["embedding"]
    np.testing.assert_array_equal(theirs["model.embed_tokens.weight"], embedding)


def test_we_read_what_the_formats_own_library_writes(tmp_path):
    rng = np.random.default_rng(0)
    tensors = {
        "a": rng.normal(size=(3, 5)).astype(np.float32),
        "b": rng.normal(size=7).astype(np.float16),
        "c": np.arange(3),
    }
    safetensors.numpy.save_file(tensors, tmp_path / "file", metadata={"format": "np"})
    content = (tmp_path / "file").read_bytes()
    entries = read_header(tmp_path / "file")
    assert {name: entry.dtype for name, entry in entries.items()} == {
        "a": "F32",
        "b": "F16",
        "c": "I64",
    }
    for name, entry in entries.items():
        assert entry.shape == tensors[name].shape
        stored = content[entry.offset : entry.offset + entry.num_bytes]
        assert stored == tensors[name].tobytes()


@pytest.mark.parametrize("dtype", [arrays.FLOAT32, arrays.BFLOAT16, arrays.FLOAT16], ids=str)
def test_a_planned_file_is_aligned_and_reads_as_planned(tmp_path, dtype):
    shapes = {"a": (3, 5), "b": (7,), "ab" * 40: (2, 2)}
    header, entries = plan_file(shapes, dtype)
    assert len(header) % 64 == 0
    (tmp_path / "file").write_bytes(header + bytes(26 * dtype.itemsize))
    assert read_header(tmp_path / "file") == entries


def longer(header):
    header["lm_head.weight"]["data_offsets"][1] += 4


def moved(header):
    header["lm_head.weight"]["data_offsets"] = [
        offset + 4 for offset in header["lm_head.weight"]["data_offsets"]
    ]


def overlapping(header):
    header["model.norm.weight"]["data_offsets"] = header["model.layers.0.input_layernorm.weight"][
        "data_offsets"
    ]


def backwards(header):
    header["model.norm.weight"] = {"dtype": "I8", "shape": [1], "data_offsets": [9, 8]}


def negative(header):
    header["model.norm.weight"]["shape"] = [-12, -1]


def fractional(header):
    header["model.norm.weight"]["shape"] = [12.0]


def without_offsets(header):
    del header["model.norm.weight"]["data_offsets"]


def with_more_keys(header):
    header["model.norm.weight"]["more"] = 1


def of_words(header):
    header["model.norm.weight"] = "twelve numbers"


@pytest.mark.parametrize(
    "damage",
    [
        longer,
        moved,
        overlapping,
        backwards,
        negative,
        fractional,
        without_offsets,
        with_more_keys,
        of_words,
    ],
)
def test_a_header_that_contradicts_itself_is_refused(file, damage):
    header, data = read_raw(file)
    damage(header)
    write_raw(file, header, data)
    with pytest.raises(UserError, match=r"model\.safetensors is no whole safetensors file"):
        read_header(file)


def test_a_file_cut_anywhere_is_refused(file):
    content = file.read_bytes()
    for length in (0, 3, 8, 50, len(content) // 2, len(content) - 1):
        file.write_bytes(content[:length])
        with pytest.raises(UserError, match=r"model\.safetensors is no whole safetensors file"):
            read_header(file)
    file.write_bytes(content + b"\0")
    with pytest.raises(UserError, match="goes on for 1 bytes"):
        read_header(file)


@pytest.mark.parametrize("text", [b"no JSON", b"[]", b"\xff\xfe", b"[" * 100_000, b"null"])
def test_a_header_that_is_no_object_is_refused(tmp_path, text):
    (tmp_path / "file").write_bytes(len(text).to_bytes(8, "little") + text)
    with pytest.raises(UserError, match="header is unreadable"):
        read_header(tmp_path / "file")


def test_a_header_longer_than_the_file_is_not_read(tmp_path):
    (tmp_path / "file").write_bytes((1 << 62).to_bytes(8, "little") + json.dumps({}).encode())
    with pytest.raises(UserError, match="10 bytes long"):
        read_header(tmp_path / "file")
