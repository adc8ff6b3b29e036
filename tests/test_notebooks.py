"""The notebooks as they are kept; `make notebooks` runs them."""

import json
import re
from pathlib import Path

import pytest

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))
_LOCAL = re.compile(r"(?<![\w.:/])/(?:home|root|tmp|work|Users|usr|opt|content)/")


def text_of(output):
    return "".join(output.get("text", [])) + str(output.get("data", {}).get("text/plain", ""))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_kept_whole_with_pictures_and_without_local_paths(path):
    notebook = json.loads(path.read_text(encoding="utf-8"))
    assert notebook["metadata"]["kernelspec"]["name"] == "python3"
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    # As one run leaves them: each cell once, in order.
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert "error" not in {output["output_type"] for output in outputs}
    shown = "\n".join(map(text_of, outputs)) + "\n".join("".join(cell["source"]) for cell in cells)
    assert not _LOCAL.search(shown)
    assert path.stat().st_size < 200_000


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_opens_where_the_library_is_not_installed(path):
    notebook = json.loads(path.read_text(encoding="utf-8"))
    first = next(cell for cell in notebook["cells"] if cell["cell_type"] == "code")
    assert 'find_spec("aquila_jax") is None' in "".join(first["source"])
