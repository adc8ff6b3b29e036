"""Run the notebooks top to bottom, as `make notebooks` does; the first error ends it.

    python notebooks/run.py              # runs them and changes nothing
    python notebooks/run.py --write      # keeps what they printed and drew
    python notebooks/run.py grow_smollm2 # one of them

Each may take three minutes (`--seconds`), without the time that a first download takes.
"""

import argparse
import re
import sys
import time
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).parent
ROOT = FOLDER.parent
# Progress bars and warnings say what one machine did at one time.
_KEPT_STREAM = "stdout"
_LOCAL = re.compile(r"(?<![\w.])/(?:home|root|tmp|work|Users|usr|opt)/[^\s'\"]*")


def main() -> int:
    """The exit code: 0, or 1 where a notebook took too long."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="without .ipynb; all by default")
    parser.add_argument("--write", action="store_true", help="keep outputs")
    parser.add_argument("--seconds", type=float, default=180, help="for one notebook")
    arguments = parser.parse_args()
    paths = [FOLDER / f"{name}.ipynb" for name in arguments.names] or sorted(FOLDER.glob("*.ipynb"))
    slow = []
    for path in paths:
        seconds = run(path, write=arguments.write)
        print(f"{path.relative_to(ROOT)}: {seconds:.0f} s", flush=True)
        if seconds > arguments.seconds:
            slow.append(path.name)
    if slow:
        print(f"error: over {arguments.seconds:.0f} s: {', '.join(slow)}", file=sys.stderr)
    return bool(slow)


def run(path: Path, *, write: bool) -> float:
    """Seconds that its cells took.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell fails.
    """
    notebook = nbformat.read(path, as_version=4)
    started = time.perf_counter()
    client = NotebookClient(
        notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(ROOT)}}
    )
    client.execute()
    seconds = time.perf_counter() - started
    if write:
        nbformat.write(cleaned(notebook), path)
    return seconds


def cleaned(notebook: Any) -> Any:
    """Without what says where and when it ran.

    Raises:
        ValueError: an output names a path of this machine.
    """
    notebook.metadata = {"kernelspec": {"name": "python3", "display_name": "Python 3"}}
    for cell in notebook.cells:
        cell.metadata = {}
        if cell.cell_type != "code":
            continue
        cell.outputs = [
            output
            for output in cell.outputs
            if output.output_type != "stream" or output.name == _KEPT_STREAM
        ]
        shown = [str(output.get("text", "")) for output in cell.outputs]
        shown += [str(output.get("data", {}).get("text/plain", "")) for output in cell.outputs]
        if found := _LOCAL.search("\n".join(shown)):
            raise ValueError(f"an output names a path of this machine: {found[0]}")
    return notebook


if __name__ == "__main__":
    sys.exit(main())
