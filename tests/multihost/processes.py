"""Several processes on one machine, as if each were a host."""

import contextlib
import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]
# Of a process that is alone. Of several each has one device and one of XLA's threads: with more,
# collectives start in an order that differs from process to process, and Gloo can wait for ever.
NUM_DEVICES = 4
PATIENCE = 600.0


def free_port() -> int:
    """A port for the coordinator, from which the library's own follows; both free now."""
    for _ in range(50):
        with socket.create_server(("", 0)) as first:
            port = first.getsockname()[1]
            away = 5000 if port + 5000 < 1 << 16 else -5000
            with contextlib.suppress(OSError), socket.create_server(("", port + away)):
                return port
    raise OSError("no two ports are free")


class Process:
    """One process of a group, and what it says."""

    def __init__(
        self, directory: Path, index: int, count: int, port: int, arguments: Sequence[str],
        environ: dict[str, str],
    ) -> None:  # fmt: skip
        devices, threads = (1, 1) if count > 1 else (NUM_DEVICES, 16)
        environment = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "JAX_PLATFORMS": "cpu",
            "NPROC": str(threads),
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices} "
            "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true",
            "JAX_COMPILATION_CACHE_DIR": str(directory.parent / "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        }
        if count > 1:
            environment |= {
                "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
                "JAX_NUM_PROCESSES": str(count),
                "JAX_PROCESS_ID": str(index),
            }
        self._output = directory / f"process-{index}-of-{count}-{port}.out"
        command = [sys.executable, "-m", "tests.multihost.worker", str(directory), *arguments]
        with self._output.open("wb") as output:
            self.popen = subprocess.Popen(
                command, cwd=ROOT, env=environment | environ, stdout=output,
                stderr=subprocess.STDOUT,
            )  # fmt: skip

    @property
    def said(self) -> str:
        """All output so far."""
        return self._output.read_text(errors="replace")

    def end(self) -> int:
        """The exit code, once there is one."""
        return self.popen.wait(PATIENCE)


@contextlib.contextmanager
def together(
    directory: Path,
    count: int,
    *arguments: str,
    own: dict[int, Sequence[str]] | None = None,
    absent: Sequence[int] = (),
    **environ: str,
) -> Iterator[list[Process]]:
    """Processes that run one command; `own` adds to that of some, `absent` ones do not start."""
    port = free_port()
    processes = [
        Process(directory, index, count, port, [*arguments, *(own or {}).get(index, ())], environ)
        for index in range(count)
        if index not in absent
    ]
    try:
        yield processes
    finally:
        for process in processes:
            process.popen.kill()
            process.popen.wait()


def run_together(directory: Path, count: int, *arguments: str) -> str:
    """Run to the end, all well; what the first process said."""
    with together(directory, count, *arguments) as processes:
        codes = [process.end() for process in processes]
        if any(codes):
            raise AssertionError("\n".join(f"{codes}\n{p.said}" for p in processes))
        return processes[0].said
