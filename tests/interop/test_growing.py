import dataclasses
import json
import os
import tempfile
from pathlib import Path

import jax
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from aquila_jax import RopeScaling, UserError, load_hf, save_hf, scale_out, scale_up
from aquila_jax.axes import flatten
from aquila_jax.files import json_bytes
from aquila_jax.growth import ScaleOut, ScaleUp, apply_plan
from aquila_jax.growth.content import content_hash
from aquila_jax.interop import growing, writer
from aquila_jax.interop.growing import grow_files, is_finite
from tests.growth.test_exact import growths

from .conftest import edit_tensors

METHODS = ("fpi", "aki_pro", "isometric", "zero_pad", "latent")
DTYPES = ("float32", "bfloat16")
LARGER = {"embed_dim": 18, "num_heads": 6, "mlp_dim": 33, "num_layers": 5, "vocab_size": 70}
MIXTURE = {"num_experts": 4, "experts_per_token": 2}
QWEN3 = {"qkv_bias": False, "qk_norm": True, "rope_scaling": RopeScaling("linear", 2.0)}


@pytest.fixture
def saved(tiny, random_params, tmp_path):
    """A source on disk, by its differences from the tiny decoder."""

    def save(dtype="float32", **changes):
        config = dataclasses.replace(tiny, **changes)
        path = tmp_path / "source"
        save_hf(random_params(config), config, path, dtype=dtype, max_shard_bytes=4000)
        return path, config

    return save


def assert_same_bits(tree, other):
    flat, expected = flatten(tree), flatten(other)
    assert set(flat) == set(expected)
    for path, leaf in expected.items():
        mine, theirs = np.asarray(flat[path]), np.asarray(leaf)
        assert mine.dtype == theirs.dtype, path
        assert mine.tobytes() == theirs.tobytes(), path


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("growth", "source_changes", "target_changes"),
    [
        (ScaleUp("aki_pro"), {}, LARGER),
        (ScaleUp("isometric", split="uneven", noise=0.1, seed=3), {"qkv_bias": False}, LARGER),
        (ScaleUp("latent"), {"tie_embeddings": True}, LARGER),
        (ScaleUp("isometric"), MIXTURE, {"embed_dim": 18, "mlp_dim": 33, "num_layers": 5}),
        (ScaleUp("fpi"), {"tie_embeddings": True}, {**LARGER, "tie_embeddings": False}),
        (ScaleOut(), {}, MIXTURE),
        (ScaleOut(redraw=0.5, noise=0.1, seed=5), {}, MIXTURE),
        (ScaleOut(redraw=0.5), QWEN3, {**MIXTURE, "moe_every": 3}),
        (
            ScaleUp("isometric", depth="stacking"),
            {**QWEN3, **MIXTURE, "moe_every": 3, "expert_mlp_dim": 7},
            {"embed_dim": 18, "num_heads": 6, "expert_mlp_dim": 9, "num_layers": 6},
        ),
        (
            ScaleUp("latent"),
            {**MIXTURE, "shared_mlp_dim": 5, "shared_expert_gate": True},
            {"embed_dim": 18, "mlp_dim": 33, "shared_mlp_dim": 8, "num_layers": 5},
        ),
        (
            ScaleOut(granularity=2),
            {},
            {"num_experts": 8, "experts_per_token": 4, "expert_mlp_dim": 10},
        ),
    ],
    ids=str,
)
def test_a_growth_from_disk_to_disk_gives_the_bits_of_one_in_memory(
    saved, tmp_path, growth, source_changes, target_changes, dtype
):
    path, config = saved(dtype, **source_changes)
    target = dataclasses.replace(config, **target_changes)
    certificate = grow_files(path, tmp_path / "grown", target, growth, max_shard_bytes=9000)
    params, _ = load_hf(path)
    grown, found = load_hf(tmp_path / "grown")
    plan, expected_certificate = growth.plan(config, target)
    expected = apply_plan(plan, params, target, jax.random.key(growth.seed))
    assert_same_bits(grown, expected)
    assert certificate == dataclasses.replace(
        expected_certificate,
        dtype=dtype,
        source_hash=content_hash(params, config),
        target_hash=content_hash(expected, target),
    )
    kept = json.loads((tmp_path / "grown" / "certificate.json").read_text())
    assert kept == json.loads(json_bytes(certificate.to_dict()))
    for name in ("embed_dim", "num_heads", "num_layers", "vocab_size", "num_experts"):
        assert getattr(found, name) == getattr(target, name)


@settings(max_examples=8, deadline=None)
@given(pair=growths(), method=st.sampled_from(METHODS), dtype=st.sampled_from(DTYPES))
def test_any_growth_from_disk_to_disk_gives_the_bits_of_one_in_memory(
    random_params, pair, method, dtype
):
    source, target = pair
    growth = ScaleUp(method)
    with tempfile.TemporaryDirectory() as work:
        path, grown_path = Path(work) / "source", Path(work) / "grown"
        try:
            growth.plan(source, target)
            save_hf(random_params(source), source, path, dtype=dtype)
            certificate = grow_files(path, grown_path, target, growth)
        except UserError as error:
            refused = "no Hugging Face family" in str(error) or "cannot grow num_kv_heads" in str(
                error
            )
            assume(not refused)
            raise
        params, found = load_hf(path)
        expected = scale_up(params, found, target, method=method).params
        grown = load_hf(grown_path)[0]
        assert_same_bits(grown, expected)
        assert certificate.target_hash == content_hash(expected, target)


def test_the_public_functions_give_the_same_bits(saved, tmp_path):
    path, config = saved()
    params, _ = load_hf(path)
    target = dataclasses.replace(config, **LARGER)
    grow_files(path, tmp_path / "large", target, ScaleUp("isometric"))
    large = scale_up(params, config, target, method="isometric")
    assert_same_bits(load_hf(tmp_path / "large")[0], large.params)
    mixture = dataclasses.replace(target, **MIXTURE)
    grow_files(tmp_path / "large", tmp_path / "moe", mixture, ScaleOut(seed=7))
    moe = scale_out(large.params, target, num_experts=4, key=jax.random.key(7))
    assert_same_bits(load_hf(tmp_path / "moe")[0], moe.params)


def test_the_certificate_and_the_tokenizer_travel_and_progress_ends_at_the_whole(saved, tmp_path):
    path, config = saved()
    (path / "tokenizer.json").write_text("{}")
    target = dataclasses.replace(config, **LARGER)
    seen = []
    grow_files(
        path,
        tmp_path / "grown",
        target,
        ScaleUp("isometric"),
        progress=lambda done, total: seen.append((done, total)),
    )
    kept = json.loads((tmp_path / "grown" / "certificate.json").read_text())
    assert (kept["method"], kept["exact"], kept["dtype"]) == ("isometric", True, "float32")
    assert (tmp_path / "grown" / "tokenizer.json").read_text() == "{}"
    done, totals = zip(*seen, strict=True)
    assert list(done) == sorted(done)
    written = flatten(load_hf(tmp_path / "grown")[0])
    assert done[-1] == totals[-1] == sum(leaf.nbytes for leaf in written.values())


def test_the_hashes_of_leaves_of_two_types_and_of_another_dtype_are_those_of_what_is_loaded(
    saved, tmp_path
):
    path, config = saved("bfloat16")

    def widen(tensors):
        norm = np.full(12, 0.1, np.float32)
        tensors["model.layers.1.input_layernorm.weight"] |= {"dtype": "F32", "data": norm.tobytes()}

    shard = next(
        file for file in path.glob("*.safetensors") if b"layers.1.input" in file.read_bytes()
    )
    edit_tensors(shard, widen)
    target = dataclasses.replace(config, **LARGER)
    certificate = grow_files(
        path, tmp_path / "grown", target, ScaleUp("isometric"), dtype="float16"
    )
    assert certificate.source_hash == content_hash(*load_hf(path))
    assert certificate.target_hash == content_hash(*load_hf(tmp_path / "grown"))


@pytest.mark.parametrize("growth", [ScaleUp("aki_pro"), ScaleOut()], ids=str)
def test_no_slice_is_hashed_twice(saved, tmp_path, monkeypatch, growth):
    path, config = saved()
    monkeypatch.setattr(growing, "_WORKERS", 1)
    hashed, real = [], growing.digest

    def digest(content):
        hashed.append(content.nbytes)
        return real(content)

    monkeypatch.setattr(growing, "digest", digest)
    monkeypatch.setattr(writer, "digest_of", digest)
    changes = MIXTURE if isinstance(growth, ScaleOut) else LARGER
    target = dataclasses.replace(config, **changes)
    grow_files(path, tmp_path / "grown", target, growth)
    size = sum(leaf.nbytes for leaf in flatten(load_hf(path)[0]).values())
    grown = flatten(load_hf(tmp_path / "grown")[0])
    # What is copied has the digest of what was read: of a mixture only routers are hashed anew.
    fresh = (
        grown["layers/moe/router"].nbytes
        if isinstance(growth, ScaleOut)
        else sum(leaf.nbytes for leaf in grown.values())
    )
    assert sum(hashed) <= size + fresh


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_nan_and_inf_are_refused_with_their_leaf_and_nothing_is_left(
    tiny, random_params, tmp_path, value, dtype
):
    params = random_params(tiny)
    params["layers"]["mlp"]["up"][1, 2, 3] = value
    save_hf(params, tiny, tmp_path / "source", dtype=dtype)
    before = sorted(os.listdir(tmp_path))
    target = dataclasses.replace(tiny, **LARGER)
    with pytest.raises(UserError, match="layers/mlp/up of layer 1 holds NaN or Inf"):
        grow_files(tmp_path / "source", tmp_path / "grown", target, ScaleUp("fpi"))
    assert sorted(os.listdir(tmp_path)) == before


def test_finiteness_is_seen_at_the_ends_of_the_range():
    for dtype in ("float16", "float32", "float64"):
        limits = np.array([np.finfo(dtype).max, np.finfo(dtype).smallest_subnormal, -0.0], dtype)
        assert is_finite(limits)
        assert not is_finite(np.append(limits, np.array([np.nan], dtype)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda path: next(path.glob("*-00002-*")).unlink(), "00002"),
        (lambda path: os.truncate(next(path.glob("*-00002-*")), 900), "00002"),
        (lambda path: (path / "config.json").unlink(), "config.json"),
    ],
)
def test_a_damaged_source_is_refused_before_anything_is_written(saved, tmp_path, change, message):
    path, config = saved()
    change(path)
    with pytest.raises(UserError, match=message):
        grow_files(path, tmp_path / "grown", dataclasses.replace(config, **LARGER), ScaleUp())
    assert os.listdir(tmp_path) == ["source"]


def test_a_target_that_exists_or_is_out_of_reach_is_refused(saved, tmp_path):
    path, config = saved()
    (tmp_path / "grown").mkdir()
    larger = dataclasses.replace(config, **LARGER)
    with pytest.raises(UserError, match="grown exists"):
        grow_files(path, tmp_path / "grown", larger, ScaleUp())
    smaller = dataclasses.replace(config, embed_dim=10)
    with pytest.raises(UserError, match="cannot grow embed_dim from 12 to 10"):
        grow_files(path, tmp_path / "other", smaller, ScaleUp())
    assert not list((tmp_path / "grown").iterdir())


def test_a_failure_in_the_middle_leaves_nothing(saved, tmp_path, monkeypatch):
    path, config = saved()
    real, calls = growing.Directory.read, []

    def failing(self, *arguments, **settings):
        calls.append(arguments)
        if len(calls) == 20:
            raise OSError(5, "Input/output error")
        return real(self, *arguments, **settings)

    monkeypatch.setattr(growing.Directory, "read", failing)
    with pytest.raises((OSError, UserError)):
        grow_files(
            path, tmp_path / "grown", dataclasses.replace(config, **LARGER), ScaleUp("isometric")
        )
    assert os.listdir(tmp_path) == ["source"]
