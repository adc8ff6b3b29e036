"""What is written is whole or absent, in any order, and no more is held than a tensor."""

import errno
import json
import os
import random
import re
import shutil
import subprocess
import sys
import threading
import tracemalloc
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from aquila_jax import UserError, axes
from aquila_jax.config import ModelConfig
from aquila_jax.interop import Directory, Slice, Writer, arrays, slices

from .conftest import CONFIGS, DENSE, MIXTURE


def write_all(writer, params, items=None):
    leaves = axes.flatten(params)
    for item in items or slices(writer.config).values():
        part = leaves[item.path][item.index]
        writer.write(item.path, part, layer=item.layer, experts=item.expert)


def assert_nothing_is_left(path):
    """Neither a directory of that name, nor anything beside it."""
    assert not path.exists()
    assert list(path.parent.iterdir()) == []


def same_files(one, other):
    names = sorted(path.name for path in one.iterdir())
    assert names == sorted(path.name for path in other.iterdir())
    for name in names:
        assert (one / name).read_bytes() == (other / name).read_bytes(), name


@pytest.mark.parametrize("max_shard_bytes", [10**9, 4000, 1])
def test_the_order_of_writing_does_not_show(tmp_path, saved, random_params, max_shard_bytes):
    params = random_params(MIXTURE)
    items = list(slices(MIXTURE).values())
    random.Random(0).shuffle(items)
    options = {"dtype": "float32", "max_shard_bytes": max_shard_bytes}
    with Writer(tmp_path / "shuffled", MIXTURE, **options) as writer:
        write_all(writer, params, items)
    with (
        Writer(tmp_path / "threaded", MIXTURE, **options) as writer,
        ThreadPoolExecutor(8) as workers,
    ):
        list(workers.map(lambda item: write_all(writer, params, [item]), items))
    path = saved(MIXTURE, max_shard_bytes=max_shard_bytes)
    same_files(tmp_path / "shuffled", path)
    same_files(tmp_path / "threaded", path)


def test_shards_are_no_larger_than_asked_unless_a_tensor_is(saved):
    path = saved(max_shard_bytes=4000)
    index = json.loads((path / "model.safetensors.index.json").read_text())
    shards = {file.name: file for file in path.glob("*.safetensors")}
    assert set(index["weight_map"].values()) == set(shards)
    assert index["metadata"]["total_size"] == 4 * sum(
        Directory(path).read(item.path, item.layer, item.expert).size
        for item in slices(DENSE).values()
    )
    names = list(slices(DENSE))
    assert [name for name in names if name in index["weight_map"]] == names
    for name, file in shards.items():
        tensors = [tensor for tensor, place in index["weight_map"].items() if place == name]
        assert file.stat().st_size < 4000 + 2000 or len(tensors) == 1


def test_one_array_is_written_for_several_experts(tmp_path, random_params):
    leaves = axes.flatten(random_params(MIXTURE))
    with Writer(tmp_path / "model", MIXTURE) as writer:
        for item in slices(MIXTURE).values():
            if item.expert is None:
                writer.write(item.path, leaves[item.path][item.index], layer=item.layer)
            elif item.expert == 0:
                part = leaves[item.path][item.index]
                writer.write(item.path, part, layer=item.layer, experts=range(4))
    directory = Directory(tmp_path / "model")
    for item in slices(MIXTURE).values():
        if item.expert is not None:
            part = leaves[item.path][item.layer, 0].astype(arrays.BFLOAT16)
            found = directory.read(item.path, item.layer, item.expert)
            np.testing.assert_array_equal(found, part)


def test_copying_a_directory_holds_no_copy_of_a_tensor(tmp_path, random_params):
    config = ModelConfig(
        vocab_size=8000,
        embed_dim=128,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=32,
        mlp_dim=2000,
    )
    with Writer(tmp_path / "one", config, dtype="float32") as writer:
        write_all(writer, random_params(config))
    directory = Directory(tmp_path / "one")
    largest = directory.read("token_embedder/embedding").nbytes
    tracemalloc.start()
    try:
        with Writer(tmp_path / "two", config, dtype="float32", max_shard_bytes=10**6) as writer:
            for item in slices(config).values():
                part = directory.read(item.path, item.layer, item.expert)
                writer.write(item.path, part, layer=item.layer, experts=item.expert)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < largest / 10
    copied = Directory(tmp_path / "two")
    for item in slices(config).values():
        where = (item.path, item.layer, item.expert)
        np.testing.assert_array_equal(copied.read(*where), directory.read(*where))


def test_a_block_that_fails_leaves_nothing(tmp_path, random_params):
    path = tmp_path / "new" / "model"
    path.parent.mkdir()

    def fail_midway():
        with Writer(path, DENSE, max_shard_bytes=4000) as writer:
            write_all(writer, random_params(DENSE), list(slices(DENSE).values())[:20])
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail_midway()
    assert_nothing_is_left(path)


def test_a_tensor_that_is_not_written_is_told(tmp_path, random_params):
    path = tmp_path / "new" / "model"
    items = list(slices(DENSE).values())
    with (
        pytest.raises(ValueError, match=r"1 tensors were not written, as lm_head\.weight"),
        Writer(path, DENSE) as writer,
    ):
        write_all(writer, random_params(DENSE), items[:-1])
    assert_nothing_is_left(path)


KILLED = """
import os, sys
import numpy as np
from aquila_jax.config import ModelConfig
from aquila_jax import axes
from aquila_jax.interop import Writer, slices
config = ModelConfig.from_dict(eval(sys.argv[2]))
parameters = axes.parameters(config)
with Writer(sys.argv[1], config, max_shard_bytes=4000) as writer:
    for item in list(slices(config).values())[:-1]:
        leaf = np.ones(parameters[item.path].shape(config), np.float32)
        writer.write(item.path, leaf[item.index], layer=item.layer, experts=item.expert)
    os._exit(9)
"""


def test_a_killed_writer_leaves_nothing_that_looks_finished(tmp_path, saved, capsys):
    path = tmp_path / "new" / "model"
    done = subprocess.run([sys.executable, "-c", KILLED, path, repr(DENSE.to_dict())], check=False)
    assert done.returncode == 9
    left, lock = sorted(path.parent.iterdir())
    assert re.fullmatch(r"\.model\.partial-[0-9a-f]{32}", left.name)
    assert lock.name == ".model.partial.lock"
    with pytest.raises(UserError, match=r"config\.json"):
        Directory(left)
    # The next one cleans up.
    assert Directory(saved(name="new/model")).config == DENSE
    assert os.listdir(path.parent) == ["model"]
    assert f"warning: removed {left}, which a process that is gone left" in capsys.readouterr().err


@pytest.mark.parametrize("call", ["pwrite", "fsync", "rename", "ftruncate", "mkdir"])
def test_a_refusal_of_the_disk_is_one_line_and_leaves_nothing(
    tmp_path, random_params, monkeypatch, call
):
    path = tmp_path / "new" / "model"
    path.parent.mkdir()

    def refuse(*_args, **_kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, call, refuse)
    message = f"cannot write {re.escape(str(path))}: No space left on device; free some space"
    with pytest.raises(UserError, match=message), Writer(path, DENSE) as writer:
        write_all(writer, random_params(DENSE))
    monkeypatch.undo()
    assert_nothing_is_left(path)


def test_too_little_space_is_told_before_anything_is_written(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=20_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    path = tmp_path / "new" / "model"
    with (
        pytest.raises(UserError, match=r"needs 2\.82e-05 GB, and 2e-05 GB are free"),
        Writer(path, DENSE, dtype="float32"),
    ):
        pytest.fail("the block was entered")
    assert_nothing_is_left(path)


def test_partial_writes_go_on_where_they_stopped(tmp_path, saved, random_params, monkeypatch):
    whole, real = saved(), os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: real(fd, data[:100], offset))
    with Writer(tmp_path / "slow", DENSE, dtype="float32") as writer:
        write_all(writer, random_params(DENSE))
    same_files(tmp_path / "slow", whole)


@pytest.mark.parametrize("make", ["mkdir", "touch"])
def test_what_exists_is_not_replaced(tmp_path, make):
    path = tmp_path / "model"
    getattr(path, make)()
    with pytest.raises(UserError, match="model exists; remove it"):
        Writer(path, DENSE)
    assert path.exists()


def test_what_comes_to_exist_meanwhile_is_not_replaced(tmp_path, random_params):
    path = tmp_path / "model"
    writer = Writer(path, DENSE)
    writer.__enter__()
    write_all(writer, random_params(DENSE))
    path.mkdir()
    (path / "mine").touch()
    with pytest.raises(UserError, match="model exists"):
        writer.__exit__(None, None, None)
    assert [file.name for file in tmp_path.rglob("*")] == ["model", "mine"]


def test_a_link_that_leads_nowhere_is_not_replaced(tmp_path):
    (tmp_path / "model").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserError, match="model exists"):
        Writer(tmp_path / "model", DENSE)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("layers/mlp/gate", (12, 20), 3), "name one tensor"),
        (("layers/mlp/gate", (20, 12), 0), "is .12, 20. a slice, not .20, 12."),
        (("layers/mlp/middle", (20, 12), 0), "has no 'layers/mlp/middle'"),
    ],
)
def test_slices_that_do_not_exist_are_refused(tmp_path, arguments, message):
    path, shape, layer = arguments
    with (
        pytest.raises(ValueError, match=message),
        Writer(tmp_path / "model", DENSE) as writer,
    ):
        writer.write(path, np.zeros(shape, np.float32), layer=layer)


def test_a_slice_is_written_once(tmp_path, random_params):
    items = [Slice("final_norm/scale")] * 2
    with (
        pytest.raises(ValueError, match=r"model\.norm\.weight is written already"),
        Writer(tmp_path / "model", DENSE) as writer,
    ):
        write_all(writer, random_params(DENSE), items)


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan, 65504.0, 1e-30])
def test_float16_keeps_what_it_can_say(tmp_path, value):
    with (
        pytest.raises(ValueError, match="tensors were not written"),
        Writer(tmp_path / "model", DENSE, dtype="float16") as writer,
    ):
        writer.write("final_norm/scale", np.full(12, value, np.float32))


@pytest.mark.parametrize("dtype", [arrays.FLOAT32, arrays.BFLOAT16], ids=str)
def test_float16_refuses_what_it_cannot_say(tmp_path, dtype):
    with (
        pytest.raises(UserError, match=r"model\.norm\.weight holds values beyond float16"),
        Writer(tmp_path / "model", DENSE, dtype="float16") as writer,
    ):
        writer.write("final_norm/scale", np.full(12, 70000, dtype))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "int8"}, "one of float32, bfloat16, float16, not int8"),
        ({"dtype": "float8"}, "not float8"),
        ({"max_shard_bytes": 0}, "max_shard_bytes must be positive, not 0"),
        ({"copy_from": "nowhere"}, "copy_from nowhere is no directory"),
    ],
)
def test_bad_arguments_are_refused(tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        Writer(tmp_path / "model", DENSE, **options)
    assert list(tmp_path.iterdir()) == []


def test_what_goes_with_the_weights_is_copied(tmp_path, saved):
    source = saved(CONFIGS["qwen2"], name="source")
    companions = [
        "tokenizer.json",
        "tokenizer_config.json",
        "tokenizer.model",
        "special_tokens_map.json",
        "vocab.json",
        "merges.txt",
        "generation_config.json",
        "chat_template.jinja",
    ]
    for name in companions:
        (source / name).write_text(f"the {name}")
    (source / "README.md").write_text("of the source")
    (source / "tokenizer_directory").mkdir()
    path = saved(name="target", copy_from=source)
    assert {file.name for file in path.iterdir()} == {
        "config.json",
        "model.safetensors",
        *companions,
    }
    for name in companions:
        assert (path / name).read_text() == f"the {name}"


def test_no_thread_is_left(saved):
    before = threading.active_count()
    saved()
    assert threading.active_count() == before
