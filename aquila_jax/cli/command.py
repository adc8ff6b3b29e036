"""What the commands share: how one is declared, how it opens a model, how it shows progress."""

import argparse
import contextlib
import dataclasses
import sys
import tempfile
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aquila_jax.errors import UserError

if TYPE_CHECKING:
    from aquila_jax.config import ModelConfig

# A command takes its flags and the gin bindings, and gives the exit code.
RunCommand = Callable[[argparse.Namespace, list[str]], int]


def add_command(
    commands: Any, name: str, run_command: RunCommand, summary: str, *, example: str = ""
) -> argparse.ArgumentParser:
    """Declare one command; its flags are added to what this returns.

    Args:
        commands: what `ArgumentParser.add_subparsers` returned.
        name: the word after `aquila`.
        run_command: carries it out.
        summary: one line for `aquila --help` and the command's own.
        example: a whole command, shown below the flags.
    """
    command = commands.add_parser(
        name, help=summary, description=f"{summary[0].upper()}{summary[1:]}."
    )
    command.set_defaults(run_command=run_command, parser=command)
    if example:
        command.epilog = f"example: {example}"
    return command


def look_for_no_absent_tpu(environ: MutableMapping[str, str], devices: Path) -> None:
    """Where there is no TPU, keep libtpu from asking a metadata server about one, in many lines.

    The lock file has it, to compile for TPUs that are elsewhere, and JAX asks it first.

    Args:
        environ: is changed, where it says nothing of this.
        devices: the system's folder of devices.
    """
    if not any(devices.glob("accel*")) and not (devices / "vfio").exists():
        environ.setdefault("TPU_SKIP_MDS_QUERY", "1")


def refuse_bindings(command: str, bindings: Sequence[str]) -> None:
    """For a command that reads no gin files.

    Raises:
        UserError: there are bindings.
    """
    if bindings:
        raise UserError(f"{command} takes no gin bindings, but got {', '.join(bindings)}")


def is_model_dir(path: Path) -> bool:
    """Whether a run has left its checkpoints here."""
    return (path / "checkpoints").is_dir()


def has_tokenizer(path: Path) -> bool:
    """Whether a MODEL_DIR holds a tokenizer; of other models it is taken for granted."""
    from aquila_jax.data.pretrained_tokenizer import TOKENIZER_DIR

    return not is_model_dir(path) or (path / TOKENIZER_DIR).is_dir()


def open_model(path: Path) -> Any:
    """A MODEL_DIR or a Hugging Face directory, to be read by slices."""
    if is_model_dir(path):
        from aquila_jax.training.leaves import SavedLeaves  # Orbax costs seconds

        return SavedLeaves(path)
    from aquila_jax.interop import Directory

    return Directory(path)


def add_model_flags(command: argparse.ArgumentParser, *, positional: bool = True) -> None:
    """The flags of every command that computes with a model."""
    if positional:
        command.add_argument(
            "model", metavar="MODEL", help="Hugging Face directory, GGUF file or MODEL_DIR"
        )
    command.add_argument("--tokenizer", metavar="PATH", help="by default the one beside the model")
    command.add_argument(
        "--dtype",
        default="float32",
        choices=("float32", "bfloat16"),
        metavar="DTYPE",
        help="of activations: float32 (default) or bfloat16",
    )
    command.add_argument(
        "--mesh",
        metavar="AXIS=N,...",
        help="several devices, as in data=2,model=4; one by default",
    )


def open_layout(mesh: str | None) -> Any:
    """Where a model goes: None for one device, or a mesh described as in `data=2,model=4`.

    Raises:
        UserError: an axis is unknown, or the sizes do not multiply to the number of devices.
    """
    if not mesh:
        return None
    from aquila_jax.sharding import Layout, MeshShape

    # An axis that is not named has one device.
    axes = [field.name for field in dataclasses.fields(MeshShape)]
    numbers: dict[str, int] = dict.fromkeys(axes, 1)
    parts = [part.partition("=") for part in mesh.split(",")]
    try:
        numbers |= {axis: int(size) for axis, _, size in parts}
    except ValueError as error:
        raise UserError(f"--mesh {mesh} is not of the form data=2,model=4") from error
    named = [axis for axis, _, _ in parts]
    if twice := sorted({axis for axis in named if named.count(axis) > 1}):
        raise UserError(f"--mesh {mesh} names {', '.join(twice)} more than once")
    if unknown := sorted(set(numbers) - set(axes)):
        raise UserError(f"--mesh names {', '.join(unknown)}; there are {', '.join(axes)}")
    return Layout(MeshShape(**numbers).build())


def batch_rows(asked: int | None, default: int, layout: Any) -> int:
    """Rows of a batch: what was asked for; else `default`, and what is missing for the mesh."""
    if asked is not None:
        return asked
    shards = 1 if layout is None else layout.batch_shards
    return default + -default % shards


def check_model(path: str) -> None:
    """There is something that could be a model.

    Raises:
        UserError: there is not.
    """
    if not path or not Path(path).exists():
        raise UserError(f"there is no model at {path!r}")
    if Path(path).is_file() and not path.endswith(".gguf"):
        raise UserError(f"{path} is no model: name a GGUF file (*.gguf) or a directory")


def load_model(path: str, *, tokenizer: str | None) -> tuple[Any, "ModelConfig", Any]:
    """Parameters, architecture and tokenizer of a model of any format.

    Raises:
        UserError: the model or the tokenizer is absent, damaged or not supported.
    """
    from aquila_jax.data.pretrained_tokenizer import open_tokenizer

    check_model(path)
    where = Path(path)
    if tokenizer is None and not has_tokenizer(where):
        raise UserError(f"{path} holds no tokenizer: name the one of its run with --tokenizer")
    opened_tokenizer = open_tokenizer(tokenizer or path)
    if not is_model_dir(where):
        from aquila_jax.interop.converting import load_any

        return (*load_any(where), opened_tokenizer)
    import jax.numpy as jnp

    from aquila_jax import axes

    leaves = open_model(where)
    read = {name: jnp.asarray(leaves.read(name)) for name in axes.parameters(leaves.config)}
    return axes.unflatten(read), leaves.config, opened_tokenizer


def check_output(path: Path) -> None:
    """A file can be written here, which is found out before hours of work.

    Raises:
        UserError: it cannot.
    """
    if path.is_dir():
        raise UserError(f"{path} is a directory: name a file in it")
    if not path.parent.is_dir():
        raise UserError(f"there is no directory {path.parent} to write {path.name} to")
    try:
        tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error


def num_parameters(config: "ModelConfig") -> str:
    """How many there are, as people read it: "134,515,008 parameters"."""
    from aquila_jax import accounting

    return f"{accounting.num_parameters(config):,} parameters"


@contextlib.contextmanager
def byte_bar(name: str) -> Iterator[Callable[[int, int], None]]:
    """A bar in bytes where someone watches, silence elsewhere."""
    from tqdm import tqdm

    with tqdm(desc=name, unit="B", unit_scale=True, disable=not sys.stderr.isatty()) as bar:

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield show
