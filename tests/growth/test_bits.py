"""Tests compile without optimisation; this one does not, since optimising is what fuses."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_an_optimising_compiler_changes_no_bit_of_a_growth():
    environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    result = subprocess.run(
        [sys.executable, "-m", "tests.growth.same_bits"],
        cwd=Path(__file__).parents[2],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout == "compared\n"
