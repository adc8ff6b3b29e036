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
# A link that leaves `docs/`; from the pages in its folders it climbs once more.
_OUTSIDE = re.compile(r"(?<!!)\[(?P<text>[^\]]*)\]\((?P<up>(?:\.\./)+)(?P<path>[^)]+)\)")
_RESULTS = re.compile(r"\]\((?:\.\./)+benchmarks/(?P<path>[^)]+)\)")


def on_files(files: Files, config: Any) -> Files:
    """Adds the committed results of `benchmarks/`."""
    for path in sorted((_ROOT / "benchmarks").rglob("*")):
        if path.suffix in _SUFFIXES:
            uri = path.relative_to(_ROOT).as_posix()
            files.append(File.generated(config, uri, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links to results lose the step out of `docs/`; what else lies outside is named instead."""
    if page.file.src_uri.startswith("benchmarks/"):
        return markdown
    depth = page.file.src_uri.count("/")

    def result(link: re.Match[str]) -> str:
        known = Path(link["path"].partition("#")[0]).suffix in _SUFFIXES
        return f"]({'../' * depth}benchmarks/{link['path']})" if known else link[0]

    def named(link: re.Match[str]) -> str:
        leaves = link["up"].count("../") > depth
        return f"{link['text']} (`{link['path']}`)" if leaves else link[0]

    return _OUTSIDE.sub(named, _RESULTS.sub(result, markdown))
