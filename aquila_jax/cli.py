"""The command line: flags and gin. The only file that imports gin.

    aquila train --gin_file=FILE [--gin_file=FILE ...] [--gin.NAME=VALUE ...] [--dry_run]
    aquila grow --from DIR --to DIR [--gin_file=GROWTH] [--gin.target.FIELD=VALUE ...]
    aquila convert --from MODEL --to DIR [--to_checkpoint]

A gin file describes one `TrainRun`; see `gin_configs/`. Exit codes: 0 done, 2 a mistake in what
was asked for (one line says which), 128 + n stopped by signal n after saving.
"""

import argparse
import contextlib
import difflib
import logging
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gin
from gin import config as gin_config

from aquila_jax.errors import UserError

if TYPE_CHECKING:
    from aquila_jax.config import ModelConfig
    from aquila_jax.training import TrainRun

_GIN_FLAG = "--gin."
_USER_MISTAKE = 2


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the console script `aquila`."""
    parser = _parser()
    arguments, rest = parser.parse_known_args(argv)
    bindings = [flag.removeprefix(_GIN_FLAG) for flag in rest if flag.startswith(_GIN_FLAG)]
    if unknown := [flag for flag in rest if not flag.startswith(_GIN_FLAG)]:
        parser.error(f"unknown arguments: {' '.join(unknown)}")
    # Orbax tells of every file it writes; a run tells of its checkpoints itself.
    logging.getLogger("absl").setLevel(logging.ERROR)
    try:
        return arguments.run_command(arguments, bindings)
    except UserError as error:
        return _fail(str(error))
    except KeyboardInterrupt:
        # Between steps the loop stops by itself; this is start-up, with nothing to save.
        print("interrupted; run the same command again to go on", file=sys.stderr)
        return 128 + signal.SIGINT


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="aquila",
        description="Grow pretrained language models and keep training them.",
        epilog="example: aquila train --gin_file=gin_configs/runs/demo/1_dense.gin --dry_run",
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for name, run_command, summary in (
        ("train", _train, "train one stage, from wherever its MODEL_DIR stands"),
        ("grow", _grow, "grow a stage's first checkpoint from its parent, and stop"),
        ("eval", _evaluate, "validation loss of the newest checkpoint, by language"),
    ):
        command = commands.add_parser(name, help=summary, description=summary, allow_abbrev=False)
        command.set_defaults(run_command=run_command)
        _add_gin_flags(command, is_required=name != "grow")
        if name == "grow":
            _add_disk_flags(command)
    _add_convert(commands)
    report = commands.add_parser("report", help="table, figure and page of one or more runs")
    report.set_defaults(run_command=_report)
    report.add_argument("model_dirs", nargs="+", metavar="MODEL_DIR", help="runs, oldest first")
    report.add_argument("--out", required=True, help="directory of report.png and report.html")
    return parser


def _add_convert(commands: Any) -> None:
    summary = "write a model in another format: Hugging Face, or a MODEL_DIR to train from"
    command = commands.add_parser("convert", help=summary, description=summary, allow_abbrev=False)
    command.set_defaults(run_command=_convert)
    command.add_argument(
        "--from",
        dest="source",
        required=True,
        metavar="MODEL",
        help="a Hugging Face directory, a GGUF file or a MODEL_DIR",
    )
    command.add_argument(
        "--to", dest="target", required=True, metavar="DIR", help="the directory to make"
    )
    command.add_argument(
        "--to_checkpoint",
        action="store_true",
        help="make a MODEL_DIR for TrainRun.init_from; its parameters are float32",
    )
    command.add_argument("--dtype", help="float32, bfloat16 or float16; the source's by default")
    command.add_argument(
        "--max_shard_bytes",
        type=int,
        metavar="N",
        help="of the tensors of one file; 5e9 by default",
    )
    command.epilog = "example: aquila convert --from runs/16b --to 16b-hf --dtype bfloat16"


def _add_disk_flags(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--from",
        dest="source",
        metavar="DIR",
        help="grow from disk to disk: a Hugging Face directory or a MODEL_DIR",
    )
    command.add_argument("--to", dest="target", metavar="DIR", help="the directory to make")
    command.add_argument("--dtype", help="float32, bfloat16 or float16; the source's by default")
    command.epilog = (
        "example: aquila grow --from 7b --to 16b --gin_file=gin_configs/growth/isometric.gin "
        "--gin.target.embed_dim=5120 --gin.target.num_heads=40"
    )


def _add_gin_flags(command: argparse.ArgumentParser, *, is_required: bool) -> None:
    command.add_argument(
        "--gin_file",
        action="append",
        default=[],
        required=is_required,
        help="a gin file; may be repeated",
    )
    command.add_argument(
        "--gin_search_paths",
        action="append",
        default=[],
        help="where gin files and their includes are looked for; may be repeated",
    )
    command.add_argument(
        "--dry_run",
        action="store_true",
        help="check bindings and shapes, print the operative configuration, run nothing",
    )
    command.epilog = "Any binding of the gin files can be changed: --gin.NAME=VALUE"


def _train(arguments: argparse.Namespace, bindings: list[str]) -> int:
    from aquila_jax.training import train

    return _with_run(arguments, bindings, train)


def _grow(arguments: argparse.Namespace, bindings: list[str]) -> int:
    if arguments.source is not None or arguments.target is not None:
        return _grow_files(arguments, bindings)
    if not arguments.gin_file:
        raise UserError("name a run by --gin_file=FILE, or directories by --from and --to")
    from aquila_jax.training import grow

    return _with_run(arguments, bindings, grow)


def _grow_files(arguments: argparse.Namespace, bindings: list[str]) -> int:
    """Growth from disk to disk: `GROWTH` says how, `target.FIELD` what the model shall be."""
    from aquila_jax.interop.growing import grow_files

    if arguments.source is None or arguments.target is None:
        raise UserError("--from and --to go together: the directory to read, and the one to make")
    path = Path(arguments.source)
    _register_growth()
    _parse(arguments.gin_file or [_DEFAULT_GROWTH], bindings, arguments.gin_search_paths)
    with _one_line_errors():
        gin.parse_config("growth_of.growth = %GROWTH")
        gin.finalize()
        growth = gin.get_configurable("growth_of")()
        opened = _open_model(path)
        target = gin.get_configurable("target")(opened.config)
    _, certificate = growth.plan(opened.config, target)
    if arguments.dry_run:
        print(certificate)
        return 0
    with _byte_bar(Path(arguments.target).name) as progress:
        certificate = grow_files(
            opened,
            arguments.target,
            target,
            growth,
            dtype=arguments.dtype,
            progress=progress,
        )
    print(f"{certificate.title}; {arguments.target}")
    return 0


def _open_model(path: Path) -> Any:
    """A MODEL_DIR or a Hugging Face directory, to be read by slices."""
    if _is_model_dir(path):
        from aquila_jax.training.leaves import SavedLeaves  # Orbax costs seconds

        return SavedLeaves(path)
    from aquila_jax.interop import Directory

    return Directory(path)


def _convert(arguments: argparse.Namespace, bindings: list[str]) -> int:
    _refuse_bindings("convert", bindings)
    if arguments.to_checkpoint:
        return _convert_to_checkpoint(arguments)
    from aquila_jax.interop.converting import convert_files

    source = Path(arguments.source)
    options = {"max_shard_bytes": arguments.max_shard_bytes, "dtype": arguments.dtype}
    with _byte_bar(Path(arguments.target).name) as progress:
        config = convert_files(
            _open_model(source) if _is_model_dir(source) else source,
            arguments.target,
            progress=progress,
            **{name: value for name, value in options.items() if value is not None},
        )
    print(f"{_num_parameters(config)}; {arguments.target}")
    return 0


def _convert_to_checkpoint(arguments: argparse.Namespace) -> int:
    if arguments.dtype not in (None, "float32") or arguments.max_shard_bytes is not None:
        raise UserError(
            "a MODEL_DIR's parameters are float32, in files of Orbax's choice: leave --dtype and "
            "--max_shard_bytes out with --to_checkpoint"
        )
    if _is_model_dir(Path(arguments.source)):
        raise UserError(f"{arguments.source} is a MODEL_DIR already: name it in TrainRun.init_from")
    from aquila_jax.interop.converting import load_any
    from aquila_jax.training.importing import save_as_parent

    params, config = load_any(arguments.source, dtype="float32")
    save_as_parent(params, config, arguments.target)
    print(f"{_num_parameters(config)}; --gin.INIT_FROM=\"'{arguments.target}'\"")
    return 0


def _num_parameters(config: "ModelConfig") -> str:
    from aquila_jax import accounting

    return f"{accounting.num_parameters(config):,} parameters"


def _is_model_dir(path: Path) -> bool:
    return (path / "checkpoints").is_dir()


def _refuse_bindings(command: str, bindings: Sequence[str]) -> None:
    if bindings:
        raise UserError(f"{command} takes no gin bindings, but got {', '.join(bindings)}")


# Exact at any size, so a mistake in it is seen at once.
_DEFAULT_GROWTH = "gin_configs/growth/isometric.gin"


def growth_of(growth: Any) -> Any:
    """What `GROWTH` stands for."""
    return growth


def target(source: "ModelConfig", **changes: Any) -> "ModelConfig":
    """The source's configuration with single fields changed.

    Raises:
        UserError: a field is unknown, or the changed configuration is not valid.
    """
    from aquila_jax.config import ModelConfig

    return ModelConfig.from_dict({**source.to_dict(), **changes})


@contextlib.contextmanager
def _byte_bar(name: str) -> Iterator[Callable[[int, int], None]]:
    """A bar in bytes where someone watches, silence elsewhere."""
    from tqdm import tqdm

    with tqdm(desc=name, unit="B", unit_scale=True, disable=not sys.stderr.isatty()) as bar:

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield show


def _evaluate(arguments: argparse.Namespace, bindings: list[str]) -> int:
    from aquila_jax.training import evaluate

    def run_and_print(run: "TrainRun", *, operative_config: str) -> None:
        del operative_config  # evaluating changes nothing in MODEL_DIR
        for language, loss in evaluate(run).items():
            print(f"{language}\t{loss:.4f}")

    return _with_run(arguments, bindings, run_and_print)


def _report(arguments: argparse.Namespace, bindings: list[str]) -> int:
    from aquila_jax.reports import write_report

    _refuse_bindings("report", bindings)
    paths = write_report([Path(path) for path in arguments.model_dirs], Path(arguments.out))
    print(paths.table)
    print(f"\nfigure: {paths.png}\nreport: {paths.html}")
    return 0


def _with_run(
    arguments: argparse.Namespace, bindings: list[str], command: Callable[..., Any]
) -> int:
    """Build the `TrainRun` that gin describes, and check it or hand it to `command`."""
    from aquila_jax.training import Interrupted, check

    run = configured_run(arguments.gin_file, bindings, arguments.gin_search_paths)
    operative_config = gin.operative_config_str()
    if arguments.dry_run:
        for note in check(run):
            print(f"# note: {note}")
        print(operative_config)
        return 0
    try:
        command(run, operative_config=operative_config)
    except Interrupted as stop:
        print(stop, file=sys.stderr)
        return 128 + stop.signum
    return 0


def configured_run(
    gin_files: Sequence[str], bindings: Sequence[str], search_paths: Sequence[str] = ()
) -> "TrainRun":
    """The run that gin files and bindings describe.

    Args:
        gin_files: parsed in order; later bindings win.
        bindings: "NAME=VALUE", parsed last.
        search_paths: looked in after the working directory and before this package's own configs.

    Raises:
        UserError: a file is missing or malformed, a binding is unknown, a required one is
            missing, or the run's settings do not fit each other.
    """
    _register_runs()
    _parse(gin_files, bindings, search_paths)
    with _one_line_errors():
        gin.finalize()
        return gin.get_configurable("TrainRun")()


def _parse(gin_files: Sequence[str], bindings: Sequence[str], search_paths: Sequence[str]) -> None:
    """Read files and bindings into gin's configuration, and check what it would not."""
    gin.clear_config()
    roots = [Path(__file__).parents[1], Path(__file__).parent]
    # gin would also take a file's folder for a Python package, import it, and fail where it has no
    # __init__.py. Its search path and readers have no public way to be set rather than added to.
    gin_config._FILE_READERS[:] = [(open, os.path.isfile)]
    gin_config._LOCATION_PREFIXES[:] = ["", *search_paths, *map(str, roots)]
    with _one_line_errors():
        gin.parse_config_files_and_bindings(list(gin_files), None, finalize_config=False)
        _check_macros(bindings)
        gin.parse_config(list(bindings))
        _check_required()


@contextlib.contextmanager
def _one_line_errors() -> Iterator[None]:
    """What gin raises, and what it decorates, as one line."""
    try:
        yield
    except UserError as error:
        # gin appends where the value came from on further lines.
        raise UserError(str(error).splitlines()[0]) from error
    except (OSError, SyntaxError, ValueError, RuntimeError, TypeError, NameError) as error:
        raise UserError(_one_line(error)) from error


def _register_growth() -> None:
    """Tell gin of what a growth's files may bind."""
    from aquila_jax import growth

    for configurable in (growth.ScaleOut, growth.ScaleUp, growth_of, target):
        _register(configurable)


def _register_runs() -> None:
    """Tell gin of everything a run's files may bind."""
    from aquila_jax import config, data, sharding, training

    _register_growth()
    for configurable in (
        config.ModelConfig,
        config.preset,
        data.TextData,
        sharding.MeshShape,
        training.AdamW,
        training.Cosine,
        training.RouterLosses,
        training.TrainRun,
        training.WarmupStableDecay,
    ):
        _register(configurable)


def _register(configurable: Callable[..., Any]) -> None:
    name = configurable.__name__
    if name not in _registered:
        gin.external_configurable(configurable, name=name, module="aquila_jax")
        _registered.add(name)


_registered: set[str] = set()


def _macros() -> dict[str, str]:
    """Every macro of the parsed files, with the text of its value."""
    return dict(re.findall(r"^([A-Za-z_]\w*) = ?(.*)$", gin.config_str(), flags=re.MULTILINE))


def _check_macros(bindings: Sequence[str]) -> None:
    """A binding without a dot changes a macro, so the macro must be there to change."""
    macros = _macros()
    for binding in bindings:
        name = binding.partition("=")[0].strip()
        if "=" not in binding:
            raise UserError(f"--gin.{binding} has no value: write --gin.{binding}=VALUE")
        if "." not in name and name not in macros:
            near = difflib.get_close_matches(name, macros, n=1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(sorted(macros))}"
            raise UserError(f"no macro {name!r} in the gin files; {hint}")


def _check_required() -> None:
    """Every macro that a file marks as required has been given."""
    missing = [name for name, value in _macros().items() if value.strip() == "%gin.REQUIRED"]
    if missing:
        flags = " ".join(f"--gin.{name}=\"'...'\"" for name in missing)
        raise UserError(f"{', '.join(missing)} must be set: add {flags}")


def _one_line(error: BaseException) -> str:
    """What gin says, without its traceback-like tail."""
    text = str(error).strip() or type(error).__name__
    kept = [line.strip() for line in text.splitlines() if line.strip()]
    return " ".join(kept[:2])


def _fail(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return _USER_MISTAKE


if __name__ == "__main__":
    sys.exit(main())
