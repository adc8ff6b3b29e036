"""Gin files and bindings, read into the values they describe. The only file that imports gin."""

import argparse
import contextlib
import difflib
import functools
import io
import os
import re
import sys
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import gin
from gin import config as gin_config

from aquila_jax.errors import UserError

if TYPE_CHECKING:
    from aquila_jax.config import ModelConfig
    from aquila_jax.training import TrainRun

# The files' own folder where the package was installed, and the checkout's root otherwise.
_ROOTS = (Path(__file__).parents[2], Path(__file__).parents[1])


def add_gin_flags(command: argparse.ArgumentParser, *, is_required: bool) -> None:
    """The flags of every command that reads gin files."""
    command.add_argument(
        "--gin_file",
        action="append",
        default=[],
        required=is_required,
        metavar="FILE",
        help="describes a run. Repeatable, later ones win",
    )
    command.add_argument(
        "--gin_search_paths",
        action="append",
        default=[],
        metavar="DIR",
        help="where gin files are looked for, too. Repeatable",
    )
    command.add_argument(
        "--allow_imports",
        action="store_true",
        help="let gin files import, that is run, Python modules",
    )
    command.add_argument(
        "--dry_run",
        action="store_true",
        help="check bindings and shapes, print them, run nothing",
    )
    # Not declared: which names there are is known when the files are read.
    command.description = f"{command.description} Any binding: --gin.NAME=VALUE."


def with_run(
    arguments: argparse.Namespace, bindings: list[str], command: Callable[..., Any]
) -> int:
    """Build the `TrainRun` that gin describes, and check it or hand it to `command`."""
    from aquila_jax.hosts import joined
    from aquila_jax.training import Interrupted, check

    def configured() -> tuple["TrainRun", str]:
        run = configured_run(
            arguments.gin_file,
            bindings,
            arguments.gin_search_paths,
            allow_imports=arguments.allow_imports,
        )
        return run, gin.operative_config_str()

    if arguments.dry_run:
        run, operative_config = configured()
        for note in check(run):
            print(f"# note: {note}")
        print(operative_config)
        return 0
    try:
        with joined():
            run, operative_config = configured()
            command(run, operative_config=operative_config)
    except Interrupted as stop:
        print(stop, file=sys.stderr)
        return 128 + stop.signum
    return 0


def configured_run(
    gin_files: Sequence[str],
    bindings: Sequence[str],
    search_paths: Sequence[str] = (),
    unread: Mapping[str, str] = types.MappingProxyType({}),
    *,
    allow_imports: bool = False,
) -> "TrainRun":
    """The run that gin files and bindings describe.

    Args:
        gin_files: parsed in order; later bindings win.
        bindings: "NAME=VALUE", parsed last.
        search_paths: looked in after the working directory and before this package's own configs.
        unread: values for required macros that nobody set, where what they name is not read.
        allow_imports: whether files may import modules; a file from elsewhere is then a program.

    Raises:
        UserError: a file is missing or malformed, a binding is unknown, a required one is
            missing, or the run's settings do not fit each other.
    """
    _register_runs()
    _parse(gin_files, bindings, search_paths, unread, allow_imports=allow_imports)
    with _one_line_errors():
        gin.finalize()
        return gin.get_configurable("TrainRun")()


def configured_growth(
    gin_files: Sequence[str],
    bindings: Sequence[str],
    search_paths: Sequence[str],
    source: "ModelConfig",
) -> tuple[Any, "ModelConfig"]:
    """The growth and the target that gin files and bindings describe, for a model on disk.

    Args:
        gin_files: as for `configured_run`; they bind `GROWTH`.
        bindings: as for `configured_run`; `target.FIELD=VALUE` changes the source's field.
        search_paths: as for `configured_run`.
        source: the configuration of the model to grow.

    Returns:
        A `ScaleUp` or `ScaleOut`, and the configuration to grow to.

    Raises:
        UserError: as `configured_run`.
    """
    _register_growth()
    _parse(gin_files or [_DEFAULT_GROWTH], bindings, search_paths)
    with _one_line_errors():
        gin.parse_config("growth_of.growth = %GROWTH")
        gin.finalize()
        growth = gin.get_configurable("growth_of")()
        return growth, gin.get_configurable("target")(source)


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


# What gin says of a value that it cannot read.
_UNPARSED = re.compile(r"Failed to parse token '(.*)'")

# A statement of gin's that would run a module's code; none of ours needs one.
_IMPORT = re.compile(r"^[ \t]*(import|from)[ \t]+\S", flags=re.MULTILINE)


def _open(path: str, *, allow_imports: bool) -> IO[str]:
    """A gin file, to be read.

    Raises:
        UserError: it imports something, where that is not allowed, or is no text.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is no gin file: it is not UTF-8 ({error})") from error
    if allow_imports:
        return io.StringIO(text)
    if found := _IMPORT.search(text):
        line = text[: found.start()].count("\n") + 1
        raise UserError(
            f"{path}, line {line}, imports Python code, which would run: "
            f"{text.splitlines()[line - 1].strip()!r}; remove it, or give --allow_imports if you "
            "trust the file"
        )
    return io.StringIO(text)


def _parse(
    gin_files: Sequence[str],
    bindings: Sequence[str],
    search_paths: Sequence[str],
    unread: Mapping[str, str] = types.MappingProxyType({}),
    *,
    allow_imports: bool = False,
) -> None:
    """Read files and bindings into gin's configuration, and check what it would not."""
    gin.clear_config()
    # gin would also take a file's folder for a Python package, import it, and fail where it has no
    # __init__.py. Its search path and readers have no public way to be set rather than added to.
    reader: Any = functools.partial(_open, allow_imports=allow_imports)
    gin_config._FILE_READERS[:] = [(reader, os.path.isfile)]
    folders = ["", *search_paths, *map(str, _ROOTS)]
    gin_config._LOCATION_PREFIXES[:] = folders
    _check_files(gin_files, folders)
    with _one_line_errors():
        gin.parse_config_files_and_bindings(list(gin_files), None, finalize_config=False)
        _check_macros(bindings)
        gin.parse_config(list(bindings))
        gin.parse_config([f"{name} = {unread[name]!r}" for name in _missing() if name in unread])
        _check_required()


def _check_files(gin_files: Sequence[str], folders: Sequence[str]) -> None:
    """Every file is somewhere; those it includes are looked for when it is read.

    Raises:
        UserError: one is not; where another has nearly its name, the message says so.
    """
    for name in gin_files:
        places = [Path(folder, name) for folder in folders]
        if any(place.is_file() for place in places):
            continue
        beside = {other.name for place in places for other in place.parent.glob("*.gin")}
        near = difflib.get_close_matches(Path(name).name, sorted(beside), n=1)
        hint = f"; did you mean {Path(name).with_name(near[0])}?" if near else ""
        raise UserError(f"there is no gin file {name}{hint}")


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
    from aquila_jax import config, data, nn, sharding, training

    _register_growth()
    for configurable in (
        config.ModelConfig,
        config.preset,
        data.ChatData,
        data.TextData,
        data.TextFiles,
        data.TokenCache,
        sharding.MeshShape,
        training.AdamW,
        training.Cosine,
        training.Guard,
        training.RouterLosses,
        nn.Dispatch,
        training.TrainRun,
        training.WarmupStableDecay,
        training.model_of,
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


def _missing() -> list[str]:
    """The macros that a file marks as required, and nobody has given."""
    return [name for name, value in _macros().items() if value.strip() == "%gin.REQUIRED"]


def _check_required() -> None:
    """Every macro that a file marks as required has been given."""
    if missing := _missing():
        flags = " ".join(f"--gin.{name}=\"'...'\"" for name in missing)
        raise UserError(f"{', '.join(missing)} must be set: add {flags}")


def _one_line(error: BaseException) -> str:
    """What gin says, without its traceback-like tail."""
    text = str(error).strip() or type(error).__name__
    if found := _UNPARSED.search(text):
        text = found[1]
        return f"{text!r} is no value: quote a text twice, as in --gin.NAME=\"'{text}'\""
    kept = [line.strip() for line in text.splitlines() if line.strip()]
    return " ".join(kept[:2])
