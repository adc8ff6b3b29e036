"""Notices that a Cloud TPU host will be taken away, turned into the signal that stops a run.

Google Cloud tells a virtual machine of maintenance and of preemption through its metadata server.
Whoever hears of it stops as by SIGTERM: the step under way is finished and saved, on all hosts.
"""

import contextlib
import os
import signal
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping

_SECONDS = 5.0
_DEFAULT_SERVER = "metadata.google.internal"
# What each says while nothing is to happen.
_NOTICES = {"maintenance-event": "NONE", "preempted": "FALSE"}


@contextlib.contextmanager
def heed_maintenance(environ: Mapping[str, str] = os.environ) -> Iterator[None]:
    """On a Cloud TPU host, ask for notices every few seconds; SIGTERM to this process at one."""
    if not _is_cloud_tpu(environ):
        yield
        return
    ended = threading.Event()
    server = environ.get("GCE_METADATA_IP", _DEFAULT_SERVER)

    def watch() -> None:
        while not ended.wait(_SECONDS):
            for name, quiet in _NOTICES.items():
                notice = read_notice(server, name)
                if notice not in ("", quiet):
                    print(f"{name} of this host is {notice}: stopping", file=sys.stderr)
                    os.kill(os.getpid(), signal.SIGTERM)
                    return

    thread = threading.Thread(target=watch, name="aquila-maintenance", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join(_SECONDS)


def _is_cloud_tpu(environ: Mapping[str, str]) -> bool:
    """Whether JAX has found TPU chips in this machine, and a metadata server may be asked."""
    from jax._src import cloud_tpu_init  # no public name

    asked = environ.get("TPU_SKIP_MDS_QUERY") is None and environ.get("JAX_PLATFORMS") != "cpu"
    return cloud_tpu_init.running_in_cloud_tpu_vm and asked


def read_notice(server: str, name: str) -> str:
    """What the metadata server says of this machine; "" where it does not answer."""
    request = urllib.request.Request(
        f"http://{server}/computeMetadata/v1/instance/{name}",
        headers={"Metadata-Flavor": "Google"},
    )
    try:
        with urllib.request.urlopen(request, timeout=_SECONDS) as answer:
            return answer.read(100).decode().strip()
    except (OSError, ValueError):
        return ""
