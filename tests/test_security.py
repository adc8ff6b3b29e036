"""Checkpoints, configurations and tokenizers are data: nothing that is read is run."""

import ast
from pathlib import Path

import pytest

import aquila_jax
from aquila_jax.cli.gin_files import configured_run
from aquila_jax.data import TokenCache, write_cache
from aquila_jax.data.cache import INDEX_FILE
from aquila_jax.errors import UserError

ROOT = Path(__file__).parents[1]
PACKAGE = Path(aquila_jax.__file__).parent
# A compiled step is a program, by JAX's own pickle; it is loaded where TrainRun.compiled_step asks.
# HumanEval's answers are programs, run where --run_code asks, in a process that has limits.
# A seqio task is registered by a program, which runs where --seqio_module names it.
PROGRAMS = {
    PACKAGE / "data" / "task_texts.py",
    PACKAGE / "training" / "saved_step.py",
    PACKAGE / "evaluation" / "limited.py",
}
FILES = sorted(set(PACKAGE.rglob("*.py")) - PROGRAMS)
# Modules that run what they read, or read what they run.
FORBIDDEN_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}
FORBIDDEN_NAMES = {"eval", "exec", "compile", "__import__"}
FORBIDDEN_ATTRIBUTES = {
    ("torch", "load"), ("yaml", "load"), ("os", "system"), ("os", "popen"),
    ("importlib", "import_module"), ("runpy", "run_path"), ("pd", "read_pickle"),
}  # fmt: skip
FORBIDDEN_ARGUMENTS = {"allow_pickle", "shell", "trust_remote_code"}
PROGRAM = "open('ran', 'w').write('')\n"


def _dotted(called):
    """The two names of `a.b`, where that is what is called."""
    if isinstance(called, ast.Attribute) and isinstance(called.value, ast.Name):
        return called.value.id, called.attr
    return None


def findings(tree):
    """Whatever in a source could run what was read."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (a.name for a in node.names if a.name.split(".")[0] in FORBIDDEN_MODULES)
        elif isinstance(node, ast.ImportFrom):
            if (node.module or "").split(".")[0] in FORBIDDEN_MODULES:
                yield node.module
        elif isinstance(node, ast.Call):
            called = node.func
            if isinstance(called, ast.Name) and called.id in FORBIDDEN_NAMES:
                yield called.id
            # A module named in the source is as one imported there.
            is_named = bool(node.args) and isinstance(node.args[0], ast.Constant)
            if not is_named and _dotted(called) in FORBIDDEN_ATTRIBUTES:
                yield ".".join(_dotted(called) or ())
            for argument in node.keywords:
                is_off = isinstance(argument.value, ast.Constant) and not argument.value.value
                if argument.arg in FORBIDDEN_ARGUMENTS and not is_off:
                    yield f"{argument.arg}="


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_nothing_that_is_read_is_run(file):
    assert list(findings(ast.parse(file.read_text(encoding="utf-8")))) == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle", "from dill import loads", "eval(text)", "exec(text)", "torch.load(path)",
        "np.load(path, allow_pickle=True)", "subprocess.run(words, shell=True)",
        "yaml.load(text)", "importlib.import_module(name)", "load(name, trust_remote_code=flag)",
    ],
)  # fmt: skip
def test_the_search_finds_what_it_looks_for(source):
    assert len(list(findings(ast.parse(source)))) == 1


@pytest.fixture
def where(tmp_path, monkeypatch):
    """A directory with a module that leaves a trace when it is run."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


@pytest.mark.parametrize(
    "statement",
    [
        "import evil_1",
        "  import evil_1",
        "from evil_1 import x",
        "import os",
        "from __gin__ import dynamic_registration",
    ],
)
def test_a_gin_file_imports_nothing(where, statement):
    (where / "evil_1.py").write_text(PROGRAM)
    (where / "bad.gin").write_text(f"# A config.\nMODEL_DIR = 'x'\n{statement}\n")
    (where / "good.gin").write_text("include 'bad.gin'\n")
    for name in ("bad.gin", "good.gin"):
        with pytest.raises(UserError, match=r"bad.gin, line 3, imports Python code, .*allow_imp"):
            configured_run([name], [])
    assert not (where / "ran").exists()


def test_a_gin_file_imports_where_it_is_trusted(where):
    (where / "evil_2.py").write_text(PROGRAM)
    (where / "run.gin").write_text("import evil_2\ninclude 'gin_configs/runs/demo/1_dense.gin'\n")
    configured_run(["run.gin"], ["MODEL_DIR='x'"], allow_imports=True)
    assert (where / "ran").exists()


@pytest.mark.parametrize("name", ["os.system.command", "subprocess.Popen.args", "print.x"])
def test_gin_binds_registered_names_alone(where, name):
    with pytest.raises(UserError):
        configured_run(["gin_configs/runs/demo/1_dense.gin"], [f"{name} = 'touch ran'"])
    assert not (where / "ran").exists()


@pytest.mark.parametrize("value", ["@os.system('touch ran')", "__import__('os').getcwd()"])
def test_gin_values_are_no_expressions(where, value):
    with pytest.raises(UserError):
        configured_run(["gin_configs/runs/demo/1_dense.gin"], [f"MODEL_DIR = {value}"])
    assert not (where / "ran").exists()


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd", "a/b", "..", ""])
def test_an_index_leads_nowhere_out_of_its_directory(where, name):
    write_cache(
        where / "cache",
        {("train", "a"): [[1, 2, 3]]},
        sequence_length=4,
        vocab_size=8,
        vocabulary="v",
    )
    index = where / "cache" / INDEX_FILE
    index.write_text(index.read_text().replace("00000.array_record", name))
    with pytest.raises(UserError, match="is no file of a cache"):
        TokenCache(str(where / "cache"))


def test_every_lock_pins_by_hashes():
    locks = [ROOT / "requirements.lock", *sorted((ROOT / "requirements").glob("*.lock"))]
    assert len(locks) >= 4
    for lock in locks:
        pinned = [
            line
            for line in lock.read_text().replace("\\\n", " ").splitlines()
            if line and not line.startswith((" ", "#"))
        ]
        assert pinned
        for line in pinned:
            assert "==" in line, (lock.name, line)
            assert "--hash=sha256:" in line, (lock.name, line)
