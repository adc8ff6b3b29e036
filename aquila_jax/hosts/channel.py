"""Connections between the processes of a run: all to the first one, apart from JAX's own.

JAX ends a process whose peers are lost, but says neither which one was, nor what it had to say.
Here the operating system tells of a process that ends, at once, and a beat that stops coming of a
host that is cut off. Messages are JSON, one a line.
"""

import contextlib
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from aquila_jax.errors import HostsLostError, UserError
from aquila_jax.hosts.cluster import Cluster
from aquila_jax.hosts.group import encoded, lost, own_name

# Without a beat for so long, a process is lost.
SILENCE_SECONDS = 30.0
_BEAT_SECONDS = 2.0
_LINGER_SECONDS = 5.0
# Until the last words of the first process are read; its end would cut them off.
_FAREWELL_SECONDS = 0.5
# From the coordinator's port to ours, and back where there is none above.
_PORTS_AWAY = 5000


class Connection:
    """Messages to and from one other process."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket, self._lock = sock, threading.Lock()
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.wait_at_most(SILENCE_SECONDS)
        self._lines = sock.makefile("rb")

    def wait_at_most(self, seconds: float) -> None:
        """Give up on a message after so long."""
        self._socket.settimeout(seconds)

    def send(self, message: dict[str, Any]) -> None:
        """Send; whoever is gone is heard of by its reader."""
        with contextlib.suppress(OSError), self._lock:
            self._socket.sendall(encoded(message))

    def receive(self) -> Iterator[dict[str, Any]]:
        """Every message but beats, until the other side ends or is silent for too long."""
        with contextlib.suppress(OSError, ValueError):
            for line in self._lines:
                message = json.loads(line)
                if message and isinstance(message, dict):
                    yield message

    def close(self) -> None:
        """End it."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()


def own_port(cluster: Cluster) -> tuple[str, int]:
    """Host and port of the first process's side of all connections."""
    host, _, port = cluster.coordinator.rpartition(":")
    number = int(port)
    away = _PORTS_AWAY if number + _PORTS_AWAY < 1 << 16 else -_PORTS_AWAY
    return host.strip("[]"), number + away


def connect(cluster: Cluster, timeout: float) -> "First | Other":
    """Wait until every process is there.

    Raises:
        HostsLostError: some are not, within `timeout` seconds; names them.
        UserError: two processes have the same number, or say different counts.
    """
    if cluster.index == 0:
        return First(cluster, timeout)
    return Other(cluster, timeout)


class _Side:
    """What both sides do: exchange values, leave, and end with the others."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self.name = own_name(cluster.index, cluster.count)
        self._arrived = threading.Condition()
        self._values: dict[str, list[Any]] = {}
        self._is_leaving = False

    def exchange(self, name: str, value: Any) -> list[Any]:
        """`value` of every process, in their order."""
        self._give(name, value)
        with self._arrived:
            self._arrived.wait_for(lambda: name in self._values)
            return self._values.pop(name)

    def _give(self, name: str, value: Any) -> None:
        raise NotImplementedError

    def _everyone(self) -> list[Connection]:
        raise NotImplementedError

    def _has_arrived(self, name: str, values: list[Any]) -> None:
        with self._arrived:
            self._values[name] = values
            self._arrived.notify_all()

    def _in_background(self, work: Callable[..., None], *arguments: Any) -> None:
        threading.Thread(target=work, args=arguments, name="aquila-hosts", daemon=True).start()

    def _beat(self) -> None:
        while True:
            for connection in self._everyone():
                connection.send({})
            time.sleep(_BEAT_SECONDS)

    def _end(self, code: int, words: str) -> None:
        """End this process, from whatever thread hears that another one has."""
        if self._is_leaving:
            return
        self._is_leaving = True
        with contextlib.suppress(OSError, ValueError, AttributeError):
            os.write(sys.stderr.fileno(), f"\nerror: {words}\n".encode())
        os._exit(code)


class First(_Side):
    """The first process, which all others are connected to."""

    def __init__(self, cluster: Cluster, timeout: float) -> None:
        super().__init__(cluster)
        self._others: dict[int, Connection] = {}
        self._names: dict[int, str] = {0: self.name}
        self._given: dict[str, dict[int, Any]] = {}
        self._left: set[int] = set()
        self._call_roll(timeout)
        names = [self._names[i] for i in range(cluster.count)]
        for index, connection in self._others.items():
            connection.send({"names": names})
            self._in_background(self._listen, index)
        self._in_background(self._beat)

    def _call_roll(self, timeout: float) -> None:
        end = time.monotonic() + timeout
        host, port = own_port(self.cluster)
        try:
            listener = socket.create_server(("", port), backlog=1024)
        except OSError as error:
            raise UserError(
                f"port {port} of {host}, where the other processes are to be met, cannot be "
                f"listened on ({error.strerror}): choose another coordinator port"
            ) from error
        with listener:
            while len(self._names) < self.cluster.count:
                listener.settimeout(max(0.01, end - time.monotonic()))
                try:
                    sock, _ = listener.accept()
                except TimeoutError:
                    raise self._absent(timeout) from None
                self._admit(Connection(sock))

    def _admit(self, connection: Connection) -> None:
        # Whatever knocks and says nothing keeps the others waiting.
        connection.wait_at_most(_LINGER_SECONDS)
        hello = next(connection.receive(), {})
        connection.wait_at_most(SILENCE_SECONDS)
        index, count = hello.get("join"), hello.get("count")
        if not isinstance(index, int):
            connection.close()
            return
        problem = ""
        if count != self.cluster.count:
            problem = f"{hello['name']} and {self.name} do not count the same processes"
        elif index in self._names:
            problem = f"{hello['name']} and {self._names[index]} are both to be process {index}"
        if problem:
            problem += ": start each process with a number of its own, and all with one count"
            connection.send({"stop": UserError.exit_code, "words": problem})
            self._dismiss(UserError.exit_code, problem)
            raise UserError(problem)
        self._names[index], self._others[index] = hello["name"], connection

    def _absent(self, timeout: float) -> HostsLostError:
        absent = [str(i) for i in range(self.cluster.count) if i not in self._names]
        words = (
            f"process {', '.join(absent)} of {self.cluster.count} did not join within "
            f"{timeout:.0f} s: look at what it says on its host, then start the same command "
            "again on every host"
        )
        self._dismiss(HostsLostError.exit_code, words)
        return HostsLostError(words)

    def _everyone(self) -> list[Connection]:
        return list(self._others.values())

    def _dismiss(self, code: int, words: str, *, but: int = 0) -> None:
        for index, connection in self._others.items():
            if index != but:
                connection.send({"stop": code, "words": words})

    def _listen(self, index: int) -> None:
        for message in self._others[index].receive():
            if "put" in message:
                self._take(index, message["put"], message["value"])
            elif "leave" in message:
                self._left.add(index)
                if message["leave"]:
                    words = f"{self._names[index]} stopped: {message['words']}"
                    self._stop_all(message["leave"], words, but=index)
                return
        self._stop_all(
            HostsLostError.exit_code, str(lost(f"{self._names[index]} is gone")), but=index
        )

    def _stop_all(self, code: int, words: str, *, but: int) -> None:
        if not self._is_leaving:
            self._dismiss(code, words, but=but)
            time.sleep(_FAREWELL_SECONDS)
            self._end(code, words)

    def _give(self, name: str, value: Any) -> None:
        self._take(0, name, value)

    def _take(self, index: int, name: str, value: Any) -> None:
        with self._arrived:
            given = self._given.setdefault(name, {})
            given[index] = value
            if len(given) < self.cluster.count:
                return
            values = [given[i] for i in range(self.cluster.count)]
            del self._given[name]
        for connection in self._everyone():
            connection.send({"got": name, "values": values})
        self._has_arrived(name, values)

    def leave(self, code: int, words: str) -> None:
        """End as agreed (0), or with everyone else."""
        self._is_leaving = True
        for connection in self._everyone():
            connection.send({"leave": 0} if code == 0 else {})
        if code:
            self._dismiss(code, f"{self.name} stopped: {words}")
            time.sleep(_FAREWELL_SECONDS)


class Other(_Side):
    """A process that is connected to the first."""

    def __init__(self, cluster: Cluster, timeout: float) -> None:
        super().__init__(cluster)
        self._first = _reach(cluster, timeout)
        hello = {"join": cluster.index, "count": cluster.count, "name": self.name}
        self._first.send(hello)
        # Not the beat's limit: all are waited for.
        self._first.wait_at_most(timeout + _LINGER_SECONDS)
        self._messages = self._first.receive()
        answer = next(self._messages, {})
        self._first.wait_at_most(SILENCE_SECONDS)
        if "stop" in answer:
            kind = HostsLostError if answer["stop"] == HostsLostError.exit_code else UserError
            raise kind(answer["words"])
        if "names" not in answer:
            raise lost(f"process 0 of {cluster.count} at {cluster.coordinator} is gone")
        self._first_name = answer["names"][0]
        self._in_background(self._listen)
        self._in_background(self._beat)

    def _everyone(self) -> list[Connection]:
        return [self._first]

    def _give(self, name: str, value: Any) -> None:
        self._first.send({"put": name, "value": value})

    def _listen(self) -> None:
        for message in self._messages:
            if "got" in message:
                self._has_arrived(message["got"], message["values"])
            elif "stop" in message:
                self._end(message["stop"], message["words"])
            elif "leave" in message:
                return
        self._end(HostsLostError.exit_code, str(lost(f"{self._first_name} is gone")))

    def leave(self, code: int, words: str) -> None:
        """End as agreed (0), or with everyone else."""
        self._is_leaving = True
        self._first.send({"leave": code, "words": words})


def _reach(cluster: Cluster, timeout: float) -> Connection:
    """A connection to the first process, which may not listen yet.

    Raises:
        HostsLostError: it does not within `timeout` seconds.
    """
    host, port = own_port(cluster)
    end = time.monotonic() + timeout
    while True:
        try:
            return Connection(socket.create_connection((host, port), timeout=_LINGER_SECONDS))
        except OSError as error:
            if time.monotonic() > end:
                raise HostsLostError(
                    f"process 0 of {cluster.count} does not answer at {host}:{port} within "
                    f"{timeout:.0f} s ({error.strerror or error}): is it started there, and may "
                    "this host reach that port? Then start the same command again on every host"
                ) from error
            time.sleep(0.2)
