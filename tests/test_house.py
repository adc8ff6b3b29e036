"""The rules of the house, read from the source: sizes, names, docstrings, and where tests are."""

import ast
import re
import statistics
from collections.abc import Iterator
from pathlib import Path

import aquila_jax
from aquila_jax import axes

PACKAGE = Path(aquila_jax.__file__).parent
TESTS = Path(__file__).parent
FILES = {file.relative_to(PACKAGE): file for file in sorted(PACKAGE.rglob("*.py"))}
TEXTS = {name: file.read_text(encoding="utf-8") for name, file in FILES.items()}
TREES = {name: ast.parse(text) for name, text in TEXTS.items()}
Function = ast.FunctionDef | ast.AsyncFunctionDef

# Modules that are tested where their work is done, and why.
TESTED_ELSEWHERE = {
    # lm_eval and transformers are installed for the comparison with them alone.
    "cli/harness.py": "parity/test_harness.py",
    "evaluation/harness.py": "parity/test_harness.py",
    "interop/transformers_model.py": "parity/test_verify.py",
    # Reached by a function that also has a reference: its tests run both.
    "kernels/megablox.py": "kernels/test_grouped_matmul.py",
    "kernels/route_backward_tpu.py": "kernels/test_route_tpu.py",
    "kernels/rows_tpu.py": "kernels/test_permute_tpu.py",
    # Types alone, which `route` takes and gives.
    "kernels/spec.py": "kernels/test_route.py",
    # Settings that must be made before a process imports TensorFlow, once.
    "data/tensorflow_setup.py": "data/test_vocabulary.py",
}

# Letters for what only a part of the library knows, beyond the alphabet of `axes.py`; the module
# says what they are.
LOCAL_LETTERS = {
    "kernels": "MPRkr",  # rows in expert order, pairs, rows of queries, choices, any number of rows
    "nn/moe": "AMPXk",  # devices, rows, pairs or devices, shards of experts, choices
    "evaluation": "n",  # how many were generated
}


def functions() -> Iterator[tuple[Path, Function]]:
    for name, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, Function):
                yield name, node


def length(node: Function) -> int:
    return (node.end_lineno or 0) - node.lineno + 1


def public(body: list[ast.stmt], prefix: str = "") -> Iterator[tuple[str, ast.AST]]:
    """Functions, classes and methods without a leading underscore, by their dotted names."""
    for node in body:
        if isinstance(node, Function | ast.ClassDef) and not node.name.startswith("_"):
            yield f"{prefix}{node.name}", node
            if isinstance(node, ast.ClassDef):
                yield from public(node.body, f"{prefix}{node.name}.")


PUBLIC = [
    (f"{name}: {dotted}", node)
    for name, tree in TREES.items()
    for dotted, node in public(tree.body)
]


def docstring(node: ast.AST) -> str:
    assert isinstance(node, Function | ast.ClassDef)
    return ast.get_docstring(node) or ""


def test_half_of_the_files_are_read_on_two_screens_and_most_functions_on_one():
    assert statistics.median(len(text.splitlines()) for text in TEXTS.values()) <= 150
    lengths = sorted(length(node) for _, node in functions())
    assert lengths[int(0.9 * len(lengths))] <= 45


def test_files_and_functions_are_short():
    assert {
        name: len(text.splitlines()) for name, text in TEXTS.items() if text.count("\n") > 500
    } == {}
    long = {f"{name}: {node.name}": length(node) for name, node in functions()}
    assert {name: count for name, count in long.items() if count > 60} == {}


def test_there_is_no_utils():
    assert not [name for name in FILES if name.stem in ("utils", "util", "helpers", "common")]


def test_every_module_has_its_tests_where_its_name_says():
    modules = [name for name in FILES if not name.name.startswith("__")]
    missing = {
        name.as_posix()
        for name in modules
        if not (TESTS / name.parent / f"test_{name.name}").is_file()
    }
    assert missing == set(TESTED_ELSEWHERE)
    assert all((TESTS / file).is_file() for file in TESTED_ELSEWHERE.values())


def test_every_public_name_is_told_with_the_errors_it_raises():
    assert [name for name, node in PUBLIC if not docstring(node)] == []
    silent = [
        f"{name}: {error}"
        for name, node in PUBLIC
        if isinstance(node, Function)
        for error in raised(node)
        if not re.search(rf"Raises:.*\b{error}\b", docstring(node), flags=re.DOTALL)
    ]
    assert silent == []


def raised(node: ast.AST) -> set[str]:
    """Exceptions that a function raises itself, by name."""
    return {
        raising.exc.func.id
        for raising in ast.walk(node)
        if isinstance(raising, ast.Raise)
        and isinstance(raising.exc, ast.Call)
        and isinstance(raising.exc.func, ast.Name)
        and raising.exc.func.id.endswith("Error")
    }


# Not within a jaxtyping annotation, which has the shape in it.
ARRAY = re.compile(r"(?<!\[)\b(jax\.Array|np\.ndarray|ArrayLike)\b")
# A shape: in a suffix, in brackets, or by the words for one; or a pointer to who tells it.
SHAPED_NAME = re.compile(r"[a-z0-9]_[A-Za-z0-9]*[A-Z][A-Za-z0-9]*$")
SHAPED_TEXT = re.compile(
    r"\[[^\]]*\w[^\]]*\]|\bscalar|\bshape|dimension|\bany leaf|[Aa]rguments as|as `\w+|"
    r"\bkey\b|inverse of|elementwise"
)


def test_shapes_of_arrays_are_told_in_names_annotations_or_words():
    untold = []
    for name, node in PUBLIC:
        if isinstance(node, Function) and not SHAPED_TEXT.search(docstring(node)):
            arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            untold += [
                f"{name}: {argument.arg}"
                for argument in arguments
                if argument.annotation is not None
                and ARRAY.search(ast.unparse(argument.annotation))
                and not SHAPED_NAME.search(argument.arg)
            ]
    assert untold == []


def letters_of(name: Path) -> set[str]:
    local = (letters for part, letters in LOCAL_LETTERS.items() if str(name).startswith(part))
    return {*ALPHABET, *"".join(local), "1"}


ALPHABET = set(re.findall(r"^(\w)     |  (\w)     \w", axes.__doc__ or "", flags=re.MULTILINE))
ALPHABET = {letter for pair in ALPHABET for letter in pair if letter}
SUFFIX = re.compile(r"[a-z][a-z0-9_]*_([A-Za-z0-9]*[A-Z][A-Za-z0-9]*)")


def test_the_alphabet_is_that_of_the_vocabulary():
    assert set("BTDNKGHFSECVL") == ALPHABET


def test_dimensions_are_spelt_in_one_alphabet():
    foreign = [
        f"{name}: {spelt}"
        for name, tree in TREES.items()
        for node in ast.walk(tree)
        for spelt in dimensions(node)
        if not set(spelt) <= letters_of(name)
    ]
    assert foreign == []


def dimensions(node: ast.AST) -> Iterator[str]:
    """The letters of a suffix, or of an equation, which is written out where it is used."""
    if isinstance(node, ast.Name | ast.arg | ast.Attribute):
        identifier = getattr(node, "id", getattr(node, "arg", getattr(node, "attr", "")))
        if suffix := SUFFIX.fullmatch(identifier):
            yield suffix[1]
    elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("einsum"):
        assert isinstance(node.args[0], ast.Constant)
        yield re.sub(r"[^A-Za-z]", "", str(node.args[0].value))


def test_suppressions_are_few_and_say_why():
    pattern = re.compile(r"#\s*(?:type:|pyright:|noqa|ruff:)")
    found = [
        f"{name}: {line.strip()}"
        for name, text in TEXTS.items()
        for line in text.splitlines()
        if pattern.search(line)
    ]
    assert len(found) <= 5, found
    assert [line for line in found if not re.search(r" - \w+", line)] == []


def test_tests_and_scripts_that_the_documentation_names_are_there():
    root = TESTS.parent
    pages = [*root.glob("*.md"), *root.glob("docs/**/*.md"), *root.glob("benchmarks/**/*.md")]
    named = {
        path
        for page in pages
        for path in re.findall(
            r"\b(?:tests|benchmarks|gin_configs|tpu_setup)/[\w/]+\.(?:py|gin|sh|md)\b",
            page.read_text(encoding="utf-8"),
        )
    }
    assert len(named) > 50
    assert sorted(path for path in named if not (root / path).exists()) == []
