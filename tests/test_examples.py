"""What docstrings and the README show is true."""

import dataclasses
import doctest
import importlib
import inspect
import re
from pathlib import Path

import pytest

import aquila_jax

from .pretrained import MODEL

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "aquila_jax"
WITH_EXAMPLES = [
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for path in sorted(PACKAGE.rglob("*.py"))
    # Not those alone that need what is not here.
    if re.search(r">>> (?!.*# doctest: \+SKIP)", path.read_text(encoding="utf-8"))
]


@pytest.mark.parametrize("name", WITH_EXAMPLES)
def test_the_examples_of_a_module_are_true(name):
    results = doctest.testmod(importlib.import_module(name))
    assert (results.failed, results.attempted > 0) == (0, True)


@pytest.mark.parametrize("name", aquila_jax.__all__)
def test_every_public_name_is_told_and_functions_show_an_example(name):
    value = getattr(aquila_jax, name)
    if not callable(value):
        return
    told = inspect.getdoc(value)
    assert told, name
    if inspect.isfunction(value):
        # Of its own, or of its module, which may show several at once.
        shown = told + (inspect.getdoc(inspect.getmodule(value)) or "")
        assert re.search(rf"(>>>|\.\.\.).*\b{name}\b", shown), name
    fields = dataclasses.fields(value) if dataclasses.is_dataclass(value) else ()
    # Linen adds two of its own.
    names = [field.name for field in fields if field.name not in ("parent", "name")]
    missing = [field for field in names if f"{field}:" not in told and f"{field}," not in told]
    assert not missing, f"{name} does not tell of {', '.join(missing)}"


def test_the_example_of_the_readme_runs_on_a_real_checkpoint(capsys, monkeypatch):
    if not MODEL.exists():
        pytest.skip("no pretrained model: run `make data/models/installed`")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    example = re.search(r"```python\n(.*?)```", readme, flags=re.DOTALL)
    assert example is not None
    lines = [line for line in example[1].splitlines() if line.strip()]
    assert len(lines) <= 12
    monkeypatch.chdir(ROOT)
    exec(compile(example[1], "README.md", "exec"), {})
    said = capsys.readouterr().out
    assert "function kept" in said
    pattern = r"loss (\d\.\d+) before, (\d\.\d+) after"
    (claimed,), (measured,) = re.findall(pattern, readme), re.findall(pattern, said)
    assert [float(loss) for loss in measured] == pytest.approx(
        [float(x) for x in claimed], abs=1e-3
    )
