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


class Damaged(Exception):  # noqa: N818 - a finding about a directory
    """A directory is not what its manifest says; the message says in what."""


def write_manifest(directory: Path, facts: Mapping[str, Any]) -> None:
    """Make every file of `directory` durable, then say in a manifest what they are.

    Args:
        directory: a tree of plain files, complete.
        facts: kept in the manifest, as JSON.

    Raises:
        OSError: the file system refuses.
    """
    content = {"facts": dict(facts), "files": _describe(directory, is_durable=True)}
    write_json(directory / MANIFEST_FILE, {**content, "manifest": _digest_of(content)})


def read_facts(directory: Path) -> dict[str, Any]:
    """The facts of a manifest, whose files are not looked at.

    Raises:
        Damaged: there is no manifest, or it is not whole.
    """
    return _read(directory)["facts"]


def verify(directory: Path) -> dict[str, Any]:
    """Every file of `directory` is what the manifest says, and there is no other; its facts.

    Reads the directory whole.

    Raises:
        Damaged: a file is missing, has another size or content, or is one too many.
    """
    content = _read(directory)
    try:
        found = _describe(directory)
    except OSError as error:
        raise Damaged(f"a file cannot be read: {error}") from error
    wanted = content["files"]
    for words, names in (
        ("is missing", sorted(wanted.keys() - found.keys())),
        ("is not of the checkpoint", sorted(found.keys() - wanted.keys())),
        ("is damaged", [name for name in sorted(wanted) if wanted[name] != found.get(name)]),
    ):
        if names:
            more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
            raise Damaged(f"{names[0]} {words}{more}")
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


def _describe(directory: Path, *, is_durable: bool = False) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 of every file but the manifest; a link is described as one."""
    paths = sorted(path for path in directory.rglob("*") if path.is_symlink() or path.is_file())
    paths = [path for path in paths if path != directory / MANIFEST_FILE]

    def describe(path: Path) -> dict[str, Any]:
        if path.is_symlink():
            return {"link": os.readlink(path)}
        with path.open("rb") as file:
            if is_durable:
                os.fsync(file.fileno())
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            return {"bytes": os.fstat(file.fileno()).st_size, "sha256": digest}

    with ThreadPoolExecutor(_THREADS) as pool:
        described = pool.map(describe, paths)
        names = [path.relative_to(directory).as_posix() for path in paths]
        return dict(zip(names, described, strict=True))
