"""What may know what, read from the source: imports go down."""

import ast
import graphlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import aquila_jax

PACKAGE = Path(aquila_jax.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
TREES = {file.relative_to(PACKAGE): ast.parse(file.read_text(encoding="utf-8")) for file in FILES}

# A part imports from parts of a lower layer, and of its own as long as there is no cycle.
LAYERS = {
    "errors": 0,
    "files": 0,
    "hosts": 0.5,
    "config": 0,
    "axes": 0,
    "accounting": 0.5,
    "sharding": 1,
    "kernels": 1,
    "growth": 1,
    "data": 1,
    "nn": 2,
    "training": 3,
    "evaluation": 3,
    "interop": 3,
    "planning": 3,
    "reports": 3,
    "cli": 4,
    "": 4,
}


def module_name(file: Path) -> str:
    parts = file.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(file): tree for file, tree in TREES.items()}


def part(module: str) -> str:
    return module.split(".")[0]


def imported_names(tree: ast.AST) -> Iterator[str]:
    """Every module a source imports anywhere, also inside functions, as absolute names."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "the library imports by absolute names"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def own_imports(tree: ast.AST) -> set[str]:
    """The library's modules among them; "" is the library's own top."""
    found = set()
    for name in imported_names(tree):
        root, _, rest = name.partition(".")
        if root == "aquila_jax":
            while rest not in MODULES:
                rest = rest.rpartition(".")[0]
            found.add(rest)
    return found


def importers_of(*roots: str) -> set[str]:
    return {
        file.as_posix()
        for file, tree in TREES.items()
        if any(name.split(".")[0] in roots for name in imported_names(tree))
    }


def test_every_part_has_a_layer():
    assert {part(module) for module in MODULES} <= set(LAYERS)


def test_imports_go_down():
    upward = [
        f"{module} imports {imported}"
        for module, tree in MODULES.items()
        for imported in own_imports(tree)
        if LAYERS[part(imported)] > LAYERS[part(module)]
    ]
    assert upward == []


def test_parts_and_modules_import_without_cycles():
    modules = {module: own_imports(tree) - {module} for module, tree in MODULES.items()}
    parts: dict[str, set[str]] = {}
    for module, imported in modules.items():
        parts.setdefault(part(module), set()).update(map(part, imported))
    for name, imported in parts.items():
        imported.discard(name)
    assert "growth" in parts[""]
    graphlib.TopologicalSorter(parts).prepare()
    graphlib.TopologicalSorter(modules).prepare()


def test_only_the_command_line_imports_gin():
    assert importers_of("gin") == {"cli/gin_files.py"}


def test_only_data_imports_text_libraries():
    importers = importers_of("seqio", "tensorflow", "sentencepiece")
    assert importers
    assert {Path(file).parts[0] for file in importers} == {"data"}


def test_growth_knows_neither_flax_nor_files():
    forbidden = {"flax", "os", "io", "pathlib", "shutil", "tempfile", "json", "orbax", "random"}
    growth = [tree for module, tree in MODULES.items() if part(module) == "growth"]
    assert len(growth) > 5
    for tree in growth:
        assert not {name.split(".")[0] for name in imported_names(tree)} & forbidden
        calls = [node.func for node in ast.walk(tree) if isinstance(node, ast.Call)]
        assert not [call for call in calls if isinstance(call, ast.Name) and call.id == "open"]


def test_only_sharding_names_mesh_axes():
    named = {
        file.as_posix()
        for file, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and node.value in ("fsdp", "expert")
    }
    assert named == {"sharding.py"}
    users = {
        file.as_posix()
        for file, tree in TREES.items()
        if any(name.endswith((".PartitionSpec", ".Mesh")) for name in imported_names(tree))
    }
    assert users == {"sharding.py"}


def test_importing_the_library_loads_nothing_heavy():
    heavy = (
        "tensorflow", "seqio", "torch", "gin", "gguf", "matplotlib", "orbax", "sentencepiece"
    )  # fmt: skip
    code = f"import sys, aquila_jax; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    assert done.stdout.strip() == "[]"
