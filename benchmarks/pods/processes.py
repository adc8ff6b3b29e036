"""Compilations each in a process of its own, whose results are kept."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def kept(command: Sequence[str], path: Path) -> dict[str, Any]:
    """What `command` prints last, a line of JSON; read from `path` where it ran before.

    Args:
        command: a Python and its arguments. One of another environment does not see this one.
        path: where the line stays.

    Raises:
        RuntimeError: the command failed; says how.
    """
    if not path.exists():
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "JAX_PLATFORMS": "cpu"}
        environment |= {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
        if command[0] != sys.executable:
            # JAX leaves in the second which libtpu it took: this environment's.
            for name in ("PYTHONPATH", "TPU_LIBRARY_PATH"):
                environment.pop(name, None)
        environment.pop("JAX_COMPILATION_CACHE_DIR", None)
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(done.stdout.strip().splitlines()[-1])
    return json.loads(path.read_text())
