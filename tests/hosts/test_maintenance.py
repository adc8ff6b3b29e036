import http.server
import signal
import threading

import pytest
from jax._src import cloud_tpu_init

from aquila_jax.hosts import maintenance
from aquila_jax.hosts.maintenance import heed_maintenance, read_notice


@pytest.fixture
def server():
    """A metadata server whose answers a test sets."""
    answers = {"maintenance-event": "NONE", "preempted": "FALSE"}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            is_known = self.headers["Metadata-Flavor"] == "Google"
            name = self.path.removeprefix("/computeMetadata/v1/instance/")
            self.send_response(200 if is_known and name in answers else 404)
            self.end_headers()
            self.wfile.write(answers.get(name, "").encode())

        def log_message(self, format, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as found:
        threading.Thread(target=found.serve_forever, daemon=True).start()
        yield f"127.0.0.1:{found.server_address[1]}", answers
        found.shutdown()


@pytest.mark.parametrize(
    ("name", "notice"),
    [("maintenance-event", "TERMINATE_ON_HOST_MAINTENANCE"), ("preempted", "TRUE")],
)
def test_a_notice_stops_as_sigterm_does(server, monkeypatch, capsys, name, notice):
    address, answers = server
    monkeypatch.setattr(cloud_tpu_init, "running_in_cloud_tpu_vm", True)
    monkeypatch.setattr(maintenance, "_SECONDS", 0.05)
    heard = threading.Event()
    previous = signal.signal(signal.SIGTERM, lambda *_: heard.set())
    try:
        with heed_maintenance({"GCE_METADATA_IP": address}):
            assert not heard.wait(0.3)
            answers[name] = notice
            assert heard.wait(10)
    finally:
        signal.signal(signal.SIGTERM, previous)
    assert f"{name} of this host is {notice}: stopping" in capsys.readouterr().err


def test_no_answer_is_no_notice():
    assert read_notice("127.0.0.1:9", "preempted") == ""


def test_elsewhere_nothing_is_asked():
    with heed_maintenance({}):
        assert "aquila-maintenance" not in {thread.name for thread in threading.enumerate()}
