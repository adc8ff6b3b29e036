"""What the site needs beside `docs/`: measured results, which pages link to as the repository does.

Pages are read in the repository as well, so they link to `../benchmarks/...`. On the site those
files lie under `benchmarks/`.
"""

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

_ROOT = Path(__file__).parent.parent
_SUFFIXES = {".md", ".png", ".csv", ".json"}
# From the root of `docs/` and from its folders.
_OUTSIDE = re.compile(r"\]\((?P<up>(?:\.\./)+)benchmarks/")


def on_files(files: Files, config: Any) -> Files:
    """Adds the committed results of `benchmarks/`."""
    for path in sorted((_ROOT / "benchmarks").rglob("*")):
        if path.suffix in _SUFFIXES:
            uri = path.relative_to(_ROOT).as_posix()
            files.append(File.generated(config, uri, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links to results lose the step out of `docs/`."""
    depth = page.file.src_uri.count("/")
    if page.file.src_uri.startswith("benchmarks/"):
        return markdown
    return _OUTSIDE.sub("](" + "../" * depth + "benchmarks/", markdown)
