import dataclasses
import json

import gguf
import jax
import numpy as np
import pytest

from aquila_jax import UserError, load_hf, save_hf
from aquila_jax.axes import flatten
from aquila_jax.data.pretrained_tokenizer import open_tokenizer
from aquila_jax.interop.converting import Loaded, convert_files, load_any, open_source
from tests.interop.conftest import CONFIGS, DENSE
from tests.interop.test_gguf_file import CONFIG
from tests.interop.test_gguf_file import write as write_gguf
from tests.pretrained import MODEL


def assert_equal(tree, other):
    jax.tree.map(np.testing.assert_array_equal, tree, other)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_directory_becomes_another_with_the_same_bits(saved, tmp_path, name):
    source = saved(CONFIGS[name], max_shard_bytes=5000)
    (source / "tokenizer.json").write_text("{}")
    assert convert_files(source, tmp_path / "new", max_shard_bytes=3000) == CONFIGS[name]
    assert_equal(load_hf(tmp_path / "new"), load_hf(source))
    assert (tmp_path / "new" / "tokenizer.json").read_text() == "{}"
    shards = list((tmp_path / "new").glob("*.safetensors"))
    assert len(shards) > len(list(source.glob("*.safetensors")))


def test_a_dtype_is_kept_or_the_one_asked_for(saved, tmp_path):
    source = saved(dtype="bfloat16")
    convert_files(source, tmp_path / "kept")
    convert_files(source, tmp_path / "wide", dtype="float32")
    kept, wide = (flatten(load_hf(tmp_path / name)[0]) for name in ("kept", "wide"))
    assert {leaf.dtype.name for leaf in kept.values()} == {"bfloat16"}
    assert {leaf.dtype.name for leaf in wide.values()} == {"float32"}
    assert_equal(wide, kept)


def test_leaves_of_several_dtypes_lose_nothing(tmp_path, random_params):
    params = flatten(random_params(DENSE))
    params["layers/mlp/up"] = params["layers/mlp/up"].astype("float16")
    source = Loaded(params, DENSE)
    convert_files(source, tmp_path / "new")
    written = flatten(load_hf(tmp_path / "new")[0])
    assert {leaf.dtype.name for leaf in written.values()} == {"float32"}
    assert_equal(written, params)


def test_a_gguf_file_becomes_a_directory_with_what_lies_beside_it(tmp_path, random_params):
    params = random_params(CONFIG)
    (tmp_path / "gguf").mkdir()
    path = write_gguf(tmp_path / "gguf" / "model.gguf", params)
    (tmp_path / "gguf" / "tokenizer.json").write_text("{}")
    for number, source in enumerate((path, path.parent)):
        target = tmp_path / str(number)
        assert convert_files(source, target) == CONFIG
        assert_equal(load_hf(target)[0], params)
        assert (target / "tokenizer.json").exists()
    assert_equal(load_any(path)[0], params)


@pytest.mark.skipif(not MODEL.exists(), reason="run `make data/models/installed`")
def test_the_tokenizer_inside_a_pretrained_file_is_written_out(tmp_path):
    convert_files(MODEL, tmp_path / "new", dtype="bfloat16")
    inside, written = open_tokenizer(MODEL), open_tokenizer(tmp_path / "new")
    text = "<|im_start|>user\nIt's 1984, 模型 🦅<|im_end|>\n"
    assert written.encode(text) == inside.encode(text)
    assert (written.eos_id, written.bos_id) == (inside.eos_id, inside.bos_id)
    said = json.loads((tmp_path / "new" / "generation_config.json").read_text())
    assert said["eos_token_id"] == inside.eos_id


def test_a_directory_of_both_formats_is_read_as_hugging_face(saved, random_params):
    source = saved()
    write_gguf(source / "model.gguf", random_params(CONFIG), kind=gguf.GGMLQuantizationType.Q8_0)
    assert open_source(source).config == DENSE


def test_progress_ends_with_every_byte(saved, tmp_path):
    seen = []
    convert_files(saved(), tmp_path / "new", progress=lambda *counts: seen.append(counts))
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    size = sum(leaf.nbytes for leaf in flatten(load_hf(tmp_path / "new")[0]).values())
    assert seen[-1] == (size, size)


def test_what_cannot_be_written_leaves_nothing(saved, tmp_path, random_params):
    source = saved()
    with pytest.raises(UserError, match="model exists"):
        convert_files(source, source)
    broken = Loaded(random_params(DENSE), DENSE)
    broken._leaves["layers/mlp/down"] = np.ones((3, 2, 2), np.float32)
    with pytest.raises(ValueError, match="layers/mlp/down"):
        convert_files(broken, tmp_path / "new")
    large = jax.tree.map(lambda leaf: leaf * 1e6, random_params(DENSE))
    save_hf(large, dataclasses.replace(DENSE), tmp_path / "large", dtype="float32")
    with pytest.raises(UserError, match="beyond float16"):
        convert_files(tmp_path / "large", tmp_path / "new", dtype="float16")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["large", "model"]
