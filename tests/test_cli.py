import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import tokenizers
from tokenizers import pre_tokenizers

from aquila_jax import Transformer, cli, load_hf, preset, save_hf, scale_up
from aquila_jax.data import write_cache
from aquila_jax.training import train
from aquila_jax.training.checkpoints import open_existing
from aquila_jax.training.run import build

from .training.synthetic import tiny_run

ROOT = Path(__file__).parents[1]
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


@pytest.fixture(autouse=True)
def _in_a_directory_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def _error(capsys, *arguments):
    """The one line of a refused command."""
    assert cli.main(list(arguments)) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert "Traceback" not in captured.err
    assert captured.out == ""
    return captured.err


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


@pytest.mark.parametrize("command", ["train", "grow", "eval"])
def test_every_command_refuses_a_misspelt_file(command, capsys):
    assert "gin_configs/runs/pretrian.gin" in _error(
        capsys, command, "--gin_file=gin_configs/runs/pretrian.gin"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gin.MODLE_DIR='x'"], "no macro 'MODLE_DIR' in the gin files; did you mean MODEL_DIR?"),
        (["--gin.MODEL_DIR"], "has no value"),
        (["--gin.TrainRun.stepz=3"], "stepz"),
        (["--gin.TrainRum.steps=3"], "TrainRum"),
        (["--gin.STEPS=three"], "three"),
        (["--gin.MODEL='aquila'"], "no preset 'aquila'; there are"),
        (["--gin.model/preset.num_heads=5"], r"num_heads (5) must be a multiple of num_kv_heads"),
        (["--gin.VOCAB_SIZE=9999"], "vocab_size 9999 is larger than the model's 4096"),
        (["--gin.MeshShape.data=3"], "data=3, fsdp=1, expert=1, model=1"),
        (["--gin.WARMUP_STEPS=500"], "warmup_steps (500)"),
        (["--gin.REMAT='most'"], "no remat 'most'"),
        (["--gin.DTYPE='float31'"], "float31"),
    ],
)
def test_a_wrong_binding_gives_one_line_that_names_it(arguments, message, capsys):
    assert message in _error(capsys, "train", f"--gin_file={DENSE}", "--dry_run", *arguments)


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
def test_shapes_that_cannot_grow_give_one_line(arguments, message, capsys):
    stage = "gin_configs/runs/demo/2_scale_up.gin"
    assert message in _error(capsys, "train", f"--gin_file={stage}", "--dry_run", *arguments)


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
        (["--gin.RouterLosses.z=-1"], "RouterLosses.z must be at least 0, not -1"),
    ],
)
def test_a_mixture_that_cannot_be_gives_one_line(arguments, message, capsys):
    stage = "gin_configs/runs/demo/3_scale_out.gin"
    dispatch = "--gin.TrainRun.dispatch=@Dispatch()"
    assert message in _error(
        capsys, "train", f"--gin_file={stage}", "--dry_run", dispatch, *arguments
    )


def test_a_pretrained_model_is_trained_on_with_its_own_tokenizer(
    capsys, tmp_path, tiny, random_params
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
    assert "absent holds no checkpoints" in _error(
        capsys, "train", *flags, "--gin.INIT_FROM='absent'", "--dry_run"
    )


def test_a_token_cache_takes_the_place_of_text(capsys, tmp_path):
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
    assert "CACHE must be set" in _error(capsys, "train", "--dry_run", *files)


def test_own_text_takes_the_place_of_the_demonstrations(capsys, tmp_path):
    files = [f"--gin_file={DENSE}", "--gin_file=gin_configs/data/own_text.gin"]
    assert cli.main(["train", "--dry_run", *files, "--gin.TEXT='/data/*.txt'"]) == 0
    assert "TextFiles.pattern = %TEXT" in capsys.readouterr().out
    assert "TEXT must be set" in _error(capsys, "train", "--dry_run", *files)
    prepare = ["data", "prepare", "--to", str(tmp_path / "cache"), "--source"]
    assert "--source takes NAME=LANGUAGE:PATTERN" in _error(capsys, *prepare, "/data/*.txt")
    assert "no file matches" in _error(capsys, *prepare, f"web=en:{tmp_path}/*.txt")


def test_required_macros_are_listed_with_the_flags_to_add(capsys):
    error = _error(capsys, "train", "--gin_file=gin_configs/runs/scale_up.gin", "--dry_run")
    assert "MODEL_DIR, INIT_FROM must be set" in error or "INIT_FROM, MODEL_DIR" in error
    assert "--gin.INIT_FROM=" in error


def test_missing_text_is_named_with_the_way_out(capsys):
    error = _error(capsys, "train", f"--gin_file={DENSE}", "--gin.TEXT_DIR='nowhere'")
    assert "nowhere" in error
    assert "make" in error


def test_search_paths_find_a_file_and_later_bindings_win(tmp_path, capsys):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "short.gin").write_text(f"include '{DENSE}'\nSTEPS = 77\n")
    arguments = ["train", "--gin_file=short.gin", "--gin_search_paths=mine", "--dry_run"]
    assert cli.main(arguments) == 0
    assert "STEPS = 77" in capsys.readouterr().out
    assert cli.main([*arguments, "--gin.STEPS=78"]) == 0
    assert "STEPS = 78" in capsys.readouterr().out


def test_several_files_are_read_in_order(capsys):
    files = ["gin_configs/runs/demo/2_scale_up.gin", "gin_configs/growth/fpi.gin"]
    assert cli.main(["train", *(f"--gin_file={name}" for name in files), "--dry_run"]) == 0
    assert "ScaleUp.method = 'fpi'" in capsys.readouterr().out


def test_a_report_of_nothing_says_what_to_do(capsys):
    assert "nowhere" in _error(capsys, "report", "nowhere", "--out", "here")


def test_unknown_flags_and_commands_exit_with_2():
    for arguments in (["train", "--gin_fil=x"], ["tarin"], ["data"]):
        with pytest.raises(SystemExit) as stop:
            cli.main(arguments)
        assert stop.value.code == 2


def test_help_needs_no_jax():
    code = "import sys; from aquila_jax.cli import make_parser as make; make(); "
    code += "print('tensorflow' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@pytest.fixture
def on_disk(tmp_path):
    """A small model as a Hugging Face directory."""
    config = preset("toy_dense", vocab_size=64, embed_dim=8, num_layers=2, mlp_dim=12)
    tokens = jax.numpy.zeros((1, 4), "int32")
    params = Transformer(config).init(jax.random.key(0), tokens)["params"]
    save_hf(params, config, tmp_path / "small", dtype="float32")
    return tmp_path / "small"


def test_a_directory_grows_into_another(on_disk, tmp_path, capsys):
    grown, mixture = tmp_path / "grown", tmp_path / "moe"
    flags = ["--gin.target.embed_dim=12", "--gin.target.num_layers=3"]
    assert cli.main(["grow", "--from", str(on_disk), "--to", str(grown), *flags]) == 0
    out, err = capsys.readouterr()
    assert "isometric + identity: function kept" in out
    assert err == ""
    experts = ["--gin.target.num_experts=4", "--gin.target.experts_per_token=2"]
    upcycle = ["--gin_file=gin_configs/growth/sparse_upcycling.gin", "--dtype=bfloat16"]
    assert cli.main(["grow", "--from", str(grown), "--to", str(mixture), *upcycle, *experts]) == 0
    params, config = load_hf(mixture)
    assert (config.embed_dim, config.num_layers, config.num_experts) == (12, 3, 4)
    assert params["layers"]["moe"]["up"].dtype == "bfloat16"


def test_a_growth_from_disk_can_be_looked_at_without_being_done(on_disk, tmp_path, capsys):
    flags = ["--to", str(tmp_path / "grown"), "--gin.target.embed_dim=12", "--dry_run"]
    assert cli.main(["grow", "--from", str(on_disk), *flags]) == 0
    assert "layers/mlp/up" in capsys.readouterr().out
    assert not (tmp_path / "grown").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--from", "{small}"], "--from and --to go together"),
        (["--from", "{none}", "--to", "{new}"], "none/config.json"),
        (["--from", "{small}", "--to", "{small}"], "small exists"),
        (["--from", "{small}", "--to", "{new}", "--gin.target.embed_dim=4"], "from 8 to 4"),
        (["--from", "{small}", "--to", "{new}", "--gin.target.depth=4"], "fields ['depth']"),
        (["--from", "{small}", "--to", "{new}", "--dtype=int8"], "int8"),
        (["--from", "{small}", "--to", "{new}", "--gin_file=absent.gin"], "absent.gin"),
        ([], "name a run by --gin_file=FILE, or directories by --from and --to"),
    ],
)
def test_a_growth_from_disk_that_cannot_be_gives_one_line(
    on_disk, tmp_path, capsys, arguments, words
):
    paths = {name: str(tmp_path / name) for name in ("small", "none", "new")}
    assert words in _error(capsys, "grow", *(part.format(**paths) for part in arguments))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["small"]


def test_a_run_grows_into_a_directory(tmp_path, capsys):
    run = tiny_run(tmp_path / "run")
    train(run)
    capsys.readouterr()
    flags = ["--gin.target.embed_dim=24", "--gin_file=gin_configs/growth/latent.gin"]
    grown = tmp_path / "grown"
    assert cli.main(["grow", "--from", run.model_dir, "--to", str(grown), *flags]) == 0
    params, config = load_hf(grown)
    with open_existing(run.path) as checkpoints:
        abstract = build(run, 6).abstract.params
        source = checkpoints.restore_params(6, abstract)
    target = dataclasses.replace(run.model, embed_dim=24)
    expected = scale_up(source, run.model, target, method="latent").params
    jax.tree.map(np.testing.assert_array_equal, params, expected)
    assert config.embed_dim == 24


def test_models_are_converted_from_format_to_format(on_disk, tmp_path, capsys):
    narrow, run_dir, back = tmp_path / "narrow", tmp_path / "run", tmp_path / "back"
    convert = ["convert", "--from", str(on_disk), "--to"]
    assert cli.main([*convert, str(narrow), "--dtype=bfloat16", "--max_shard_bytes=2000"]) == 0
    assert cli.main([*convert, str(run_dir), "--to_checkpoint"]) == 0
    assert cli.main(["convert", "--from", str(run_dir), "--to", str(back)]) == 0
    out, err = capsys.readouterr()
    assert "parameters; " in out
    # None lay beside the weights.
    warnings = [line[: len("warning: no tokenizer")] for line in err.splitlines()]
    assert warnings == ["warning: no tokenizer"] * 3
    assert load_hf(narrow)[0]["layers"]["mlp"]["up"].dtype == "bfloat16"
    assert len(list(narrow.glob("*.safetensors"))) > 1
    jax.tree.map(np.testing.assert_array_equal, load_hf(back), load_hf(on_disk))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--from", "{none}", "--to", "{new}"], "none/config.json"),
        (["--from", "{none}.gguf", "--to", "{new}"], "no file"),
        (["--from", "{small}", "--to", "{small}"], "small exists"),
        (["--from", "{small}", "--to", "{small}", "--to_checkpoint"], "small exists"),
        (["--from", "{small}", "--to", "{new}", "--dtype=int8"], "int8"),
        (["--from", "{small}", "--to", "{new}", "--max_shard_bytes=0"], "max_shard_bytes"),
        (["--from", "{small}", "--to", "{new}", "--to_checkpoint", "--dtype=bfloat16"], "float32"),
        (["--from", "{small}", "--to", "{new}", "--gin.STEPS=3"], "takes no gin bindings"),
    ],
)
def test_a_conversion_that_cannot_be_gives_one_line(on_disk, tmp_path, capsys, arguments, words):
    paths = {name: str(tmp_path / name) for name in ("small", "none", "new")}
    assert words in _error(capsys, "convert", *(part.format(**paths) for part in arguments))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["small"]
