"""`aquila convert`: a model in another format."""

import argparse
import sys
from pathlib import Path
from typing import Any

from aquila_jax.cli.command import (
    add_command,
    byte_bar,
    is_model_dir,
    num_parameters,
    open_model,
    refuse_bindings,
)
from aquila_jax.cli.parser import at_least
from aquila_jax.errors import UserError


def add_to(commands: Any) -> None:
    """Declare the command."""
    command = add_command(
        commands,
        "convert",
        _convert,
        "write a model as a Hugging Face directory or a MODEL_DIR",
        example="aquila convert --from runs/16b --to 16b-hf --dtype bfloat16",
    )
    command.add_argument(
        "--from",
        dest="source",
        required=True,
        metavar="MODEL",
        help="Hugging Face directory, GGUF file or MODEL_DIR",
    )
    command.add_argument(
        "--to", dest="target", required=True, metavar="DIR", help="the directory to make"
    )
    command.add_argument(
        "--to_checkpoint",
        action="store_true",
        help="make a MODEL_DIR, to train from; float32",
    )
    command.add_argument("--dtype", help="float32, bfloat16, float16; the source's by default")
    command.add_argument(
        "--max_shard_bytes",
        type=at_least(1),
        metavar="N",
        help="bytes of tensors in a file; 5e9 by default",
    )
    command.add_argument(
        "--family", help="to write the model as, as qwen2_moe; the smallest by default"
    )


def _convert(arguments: argparse.Namespace, bindings: list[str]) -> int:
    refuse_bindings("convert", bindings)
    if arguments.to_checkpoint:
        return _convert_to_checkpoint(arguments)
    from aquila_jax.interop.converting import convert_files

    source = Path(arguments.source)
    options = {name: getattr(arguments, name) for name in ("max_shard_bytes", "dtype", "family")}
    with byte_bar(Path(arguments.target).name) as progress:
        config = convert_files(
            open_model(source) if is_model_dir(source) else source,
            arguments.target,
            progress=progress,
            **{name: value for name, value in options.items() if value is not None},
        )
    print(f"{num_parameters(config)}; {arguments.target}")
    if not any(Path(arguments.target).glob("tokenizer*")):
        print(
            f"warning: no tokenizer came with {source}; put the model's tokenizer.json into "
            f"{arguments.target}",
            file=sys.stderr,
        )
    return 0


def _convert_to_checkpoint(arguments: argparse.Namespace) -> int:
    beyond = (arguments.max_shard_bytes, arguments.family)
    if arguments.dtype not in (None, "float32") or any(flag is not None for flag in beyond):
        raise UserError(
            "a MODEL_DIR's parameters are float32, in files of Orbax's choice: leave --dtype, "
            "--max_shard_bytes and --family out with --to_checkpoint"
        )
    if is_model_dir(Path(arguments.source)):
        raise UserError(f"{arguments.source} is a MODEL_DIR already: name it in TrainRun.init_from")
    from aquila_jax.data.pretrained_tokenizer import open_tokenizer
    from aquila_jax.interop.converting import load_any
    from aquila_jax.training.importing import save_as_parent

    params, config = load_any(arguments.source, dtype="float32")
    tokenizer, warning = arguments.source, None
    try:
        open_tokenizer(tokenizer)
    except UserError as error:
        tokenizer, warning = None, f"warning: no tokenizer goes with the model: {error}"
    save_as_parent(params, config, arguments.target, tokenizer)
    if warning:
        print(warning, file=sys.stderr)
    print(f"{num_parameters(config)}; --gin.INIT_FROM=\"'{arguments.target}'\"")
    return 0
