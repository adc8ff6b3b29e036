"""The wheel: built, installed where nothing else is, and at work with the gin files it brings."""

import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
UV = Path(sys.executable).with_name("uv")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    dist = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", dist]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (built,) = dist.glob("*.whl")
    return built


def test_brings_the_package_all_gin_files_and_nothing_else(wheel):
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    package = {
        path.relative_to(ROOT).as_posix()
        for path in ROOT.glob("aquila_jax/**/*.*")
        if path.suffix != ".pyc"
    }
    configs = {
        f"aquila_jax/{path.relative_to(ROOT).as_posix()}"
        for path in ROOT.glob("gin_configs/**/*.gin")
    }
    assert names == package | configs


def test_brings_its_licence_and_asks_for_what_it_imports(wheel):
    archive = zipfile.ZipFile(wheel)
    (metadata,) = [name for name in archive.namelist() if name.endswith("/METADATA")]
    said = archive.read(metadata).decode()
    assert "License-Expression: Apache-2.0" in said
    assert any(name.endswith("/licenses/LICENSE") for name in archive.namelist())
    for needed in ("jax", "flax", "optax", "orbax-checkpoint", "gin-config"):
        assert f"Requires-Dist: {needed}>=" in said


def test_a_clean_environment_runs_the_command_with_its_own_gin_files(wheel, tmp_path):
    python = tmp_path / "venv" / "bin" / "python"
    subprocess.run(
        [UV, "venv", "--quiet", "--python", sys.executable, tmp_path / "venv"], check=True
    )
    install = [UV, "pip", "install", "--quiet", "--offline", "--no-deps", "--python", python, wheel]
    subprocess.run(install, check=True)
    # What it depends on is borrowed, behind what was installed; a checkout is not on the path.
    borrowed = sysconfig.get_path("purelib")
    code = (
        f"import sys; sys.path.append({borrowed!r}); import aquila_jax; "
        "from aquila_jax.cli import main; print(aquila_jax.__file__); sys.exit(main())"
    )
    flags = ["train", "--gin_file=gin_configs/runs/pretrain.gin", "--gin.MODEL_DIR='run'"]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [python, "-c", code, *flags, "--dry_run"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(str(tmp_path))
    assert "TrainRun.steps" in done.stdout
    assert (tmp_path / "venv" / "bin" / "aquila").exists()
