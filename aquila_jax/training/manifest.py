"""What a checkpoint consists of: every file with its size and digest, so that damage is seen.

The manifest is the last file written, and holds a digest of itself. Only files that are found by
walking the directory are ever opened, never a path that a manifest names.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from aquila_jax.files import write_json

MANIFEST_FILE = "manifest.json"
# Hashing lets go of Python's lock, so threads share the work; more wait for the disk.
_THREADS = 8


class Damaged(Exception):
    """A directory is not what its manifest says; the message says in what."""


# Which part of all files, of how many equal ones.
Part = tuple[int, int]
_ALL: Part = (0, 1)


def make_durable(directory: Path, part: Part = _ALL) -> dict[str, dict[str, Any]]:
    """Make a part of the files of `directory` durable; what they are, by their names.

    Raises:
        OSError: the file system refuses.
    """
    return _describe(directory, part, is_durable=True)


def write_manifest(
    directory: Path, facts: Mapping[str, Any], files: Mapping[str, Mapping[str, Any]]
) -> None:
    """Say in a manifest what the files of `directory` are.

    Args:
        directory: a tree of plain files, complete.
        facts: kept in the manifest, as JSON.
        files: what `make_durable` gave for all of them.

    Raises:
        OSError: the file system refuses.
    """
    content = {"facts": dict(facts), "files": dict(files)}
    write_json(directory / MANIFEST_FILE, {**content, "manifest": _digest_of(content)})


def read_facts(directory: Path) -> dict[str, Any]:
    """The facts of a manifest, whose files are not looked at.

    Raises:
        Damaged: there is no manifest, or it is not whole.
    """
    return _read(directory)["facts"]


def verify(directory: Path, part: Part = _ALL) -> dict[str, Any]:
    """Every file of `directory` is what the manifest says, and there is no other; its facts.

    Reads the directory whole, or a part of its files.

    Raises:
        Damaged: a file is missing, has another size or content, or is one too many.
    """
    content = _read(directory)
    try:
        found, names = _describe(directory, part), _names(directory)
    except OSError as error:
        raise Damaged(f"a file cannot be read: {error}") from error
    wanted = content["files"]
    for words, faulty in (
        ("is missing", sorted(wanted.keys() - set(names))),
        ("is not of the checkpoint", sorted(set(names) - wanted.keys())),
        ("is damaged", [name for name in sorted(found) if found[name] != wanted.get(name)]),
    ):
        if faulty:
            more = f" (and {len(faulty) - 1} more)" if len(faulty) > 1 else ""
            raise Damaged(f"{faulty[0]} {words}{more}")
    return content["facts"]


def _read(directory: Path) -> dict[str, Any]:
    try:
        content = json.loads((directory / MANIFEST_FILE).read_bytes())
        claimed = content.pop("manifest")
        if claimed == _digest_of(content):
            return content
    except FileNotFoundError:
        raise Damaged(f"{MANIFEST_FILE} is missing") from None
    except (OSError, ValueError, AttributeError, KeyError, TypeError):
        pass  # the same as a wrong digest
    raise Damaged(f"{MANIFEST_FILE} is damaged")


def _digest_of(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _names(directory: Path) -> list[str]:
    """Every file but the manifest, in order."""
    paths = (path for path in directory.rglob("*") if path.is_symlink() or path.is_file())
    return sorted(
        path.relative_to(directory).as_posix()
        for path in paths
        if path != directory / MANIFEST_FILE
    )


def _describe(
    directory: Path, part: Part = _ALL, *, is_durable: bool = False
) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 of a part of the files; a link is described as one."""
    names = _names(directory)[part[0] :: part[1]]

    def describe(path: Path) -> dict[str, Any]:
        if path.is_symlink():
            return {"link": os.readlink(path)}
        with path.open("rb") as file:
            if is_durable:
                os.fsync(file.fileno())
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            return {"bytes": os.fstat(file.fileno()).st_size, "sha256": digest}

    with ThreadPoolExecutor(_THREADS) as pool:
        described = pool.map(describe, (directory / name for name in names))
        return dict(zip(names, described, strict=True))
