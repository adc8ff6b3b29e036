"""`aquila train`, from gin files to a run that is checked or refused."""

import dataclasses
import re
from pathlib import Path

import pytest
import tokenizers
from tokenizers import pre_tokenizers

from aquila_jax import cli, save_hf
from aquila_jax.data import write_cache

ROOT = Path(__file__).parents[2]
GIN_FILES = sorted(ROOT.glob("gin_configs/**/*.gin"))
DENSE = "gin_configs/runs/demo/1_dense.gin"
# What a person must give; the others have every value they need.
REQUIRED = {
    "pretrain.gin": ["--gin.MODEL_DIR='runs/pretrain'"],
    "scale_up.gin": ["--gin.MODEL_DIR='runs/up'", "--gin.INIT_FROM='runs/pretrain'"],
    "scale_out.gin": ["--gin.MODEL_DIR='runs/out'", "--gin.INIT_FROM='runs/up'"],
    "sft.gin": [
        *("--gin.MODEL_DIR='runs/sft'", "--gin.INIT_FROM='runs/out'"),
        *("--gin.DATA_FILE='chats.jsonl'", "--gin.TOKENIZER='runs/tokenizer'"),
    ],
    "sft_smollm2.gin": ["--gin.MODEL_DIR='runs/sft'", "--gin.DATA_FILE='chats.jsonl'"],
}
# The paper's batches are split over a pod; any multiple of the test's 8 devices will do.
RUNNABLE = [path for path in GIN_FILES if path.parent.name in ("runs", "demo")]
# One is included by the others, and one needs a model to be there.
RUNNABLE = [path for path in RUNNABLE if path.name not in ("common.gin", "continue.gin")]


def _name(path):
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", GIN_FILES, ids=_name)
def test_every_gin_file_opens_with_its_command_and_what_to_expect(path):
    header = re.match(r"(#.*\n)+", path.read_text())
    assert header is not None
    command = "python -m t5x.train" if path.parent.name == "t5x" else "aquila train"
    assert f"{command} --gin_file=gin_configs/" in header.group()
    assert "xpect" in header.group()


@pytest.mark.parametrize("path", RUNNABLE, ids=_name)
def test_every_runnable_gin_file_passes_a_dry_run_and_runs_nothing(path, capsys, tmp_path):
    required = REQUIRED.get(path.name, [])
    assert cli.main(["train", f"--gin_file={_name(path)}", "--dry_run", *required]) == 0
    assert "TrainRun.model_dir = %MODEL_DIR" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gin.MODEL='toy_dense'", "--gin.PARENT_MODEL='toy_large'"], "from 128 to 96"),
        (["--gin.model/preset.head_dim=64"], "head_dim 32 in the source and 64 in the target"),
        (["--gin.model/preset.num_kv_heads=6"], "2 query heads a KV group into 1"),
        (
            ["--gin.model/preset.num_kv_heads=3"],
            "aki_pro cannot grow num_kv_heads from 2 to 3",
        ),
        (["--gin.parent/preset.vocab_size=5000"], "cannot grow vocab_size from 5000 to 4096"),
        (
            ["--gin.ScaleUp.method='aki_plus'"],
            "no growth method 'aki_plus'; there are fpi, isometric",
        ),
        (["--gin.ScaleUp.depth='sideways'"], "no depth method 'sideways'"),
    ],
)
def test_shapes_that_cannot_grow_give_one_line(arguments, message, refused):
    stage = "gin_configs/runs/demo/2_scale_up.gin"
    assert message in refused("train", f"--gin_file={stage}", "--dry_run", *arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gin.model/preset.experts_per_token=9"], "(9) must lie between 1 and num_experts (8)"),
        (
            ["--gin.MeshShape.expert=8", "--gin.model/preset.num_experts=6"],
            "experts of 6 does not divide over the 8 devices of mesh axes ('expert',)",
        ),
        (["--gin.Dispatch.capacity_factor=0.0"], "capacity_factor (0.0) must be above 0"),
        (["--gin.Dispatch.strategy='capasity'"], "one of dropless, capacity, reference"),
        (["--gin.RouterLosses.z=-1"], "RouterLosses.z must be a number, at least 0, not -1"),
    ],
)
def test_a_mixture_that_cannot_be_gives_one_line(arguments, message, refused):
    stage = "gin_configs/runs/demo/3_scale_out.gin"
    dispatch = "--gin.TrainRun.dispatch=@Dispatch()"
    assert message in refused("train", f"--gin_file={stage}", "--dry_run", dispatch, *arguments)


def test_a_pretrained_model_is_trained_on_with_its_own_tokenizer(
    capsys, tmp_path, tiny, random_params, refused
):
    config = dataclasses.replace(tiny, context_length=64, vocab_size=264)
    save_hf(random_params(config), config, tmp_path / "model", dtype="float32")
    alphabet = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(alphabet, []))
    tokenizer.add_special_tokens(["<|endoftext|>"])
    tokenizer.save(str(tmp_path / "model" / "tokenizer.json"))
    sizes = ["--gin.BATCH_SIZE=8", "--gin.SEQUENCE_LENGTH=64", "--gin.VOCAB_SIZE=257"]
    sizes += ["--gin.MeshShape.fsdp=1", "--gin.MeshShape.data=-1"]
    flags = ["--gin_file=gin_configs/runs/continue.gin", "--gin.MODEL_DIR='run'", *sizes]
    assert cli.main(["train", *flags, "--gin.INIT_FROM='model'", "--dry_run"]) == 0
    captured = capsys.readouterr()
    assert "note" not in captured.out
    assert "absent holds no checkpoints" in refused(
        "train", *flags, "--gin.INIT_FROM='absent'", "--dry_run"
    )


def test_a_token_cache_takes_the_place_of_text(capsys, tmp_path, refused):
    write_cache(
        tmp_path / "cache",
        {("train", "a"): [[1, 2, 3]], ("validation", "a"): [[3, 2, 1]]},
        sequence_length=16,
        vocab_size=64,
        vocabulary="v",
    )
    files = [f"--gin_file={DENSE}", "--gin_file=gin_configs/data/cache.gin"]
    cache = f"--gin.CACHE='{tmp_path / 'cache'}'"
    assert cli.main(["train", "--dry_run", *files, cache]) == 0
    assert "TokenCache.batch_size = %BATCH_SIZE" in capsys.readouterr().out
    assert "CACHE must be set" in refused("train", "--dry_run", *files)


def test_own_text_takes_the_place_of_the_demonstrations(capsys, refused):
    files = [f"--gin_file={DENSE}", "--gin_file=gin_configs/data/own_text.gin"]
    assert cli.main(["train", "--dry_run", *files, "--gin.TEXT='/data/*.txt'"]) == 0
    assert "TextFiles.pattern = %TEXT" in capsys.readouterr().out
    assert "TEXT must be set" in refused("train", "--dry_run", *files)


def test_missing_text_is_named_with_the_way_out(refused):
    error = refused("train", f"--gin_file={DENSE}", "--gin.TEXT_DIR='nowhere'")
    assert "nowhere" in error
    assert "make" in error
