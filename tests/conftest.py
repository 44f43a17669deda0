"""A real service for tests: `surefoot serve` as a user starts it, with an embedded Valkey, on a free port."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest
from hypothesis import HealthCheck, settings

# How long an example takes is the machine's affair.
settings.register_profile("surefoot", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("surefoot")

READY_S = 60.0
EXIT_S = 40.0


@dataclass
class Server:
    """A running service. `start` again after `kill` or `stop`: the data directory stays."""

    data_dir: Path
    settings: dict[str, str] = field(default_factory=dict)
    port: int = 0
    process: subprocess.Popen[str] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def redis_url(self) -> str:
        from service.valkey import socket_url

        return socket_url(self.data_dir)

    @property
    def log(self) -> str:
        return (self.data_dir.parent / "server.log").read_text()

    def start(self) -> None:
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("SUREFOOT_", "OTEL_"))}
        environment |= {
            "SUREFOOT_DATA_DIR": str(self.data_dir),
            "SUREFOOT_PORT": str(self.port),
            "SUREFOOT_SPOOL_MIN_FREE_BYTES": "0",
            **self.settings,
        }
        path = self.data_dir.parent / "server.log"
        path.touch()
        before = self.log.count('"event": "listening"')
        with path.open("a") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "service.cli", "serve"], env=environment, stderr=log, stdout=log, text=True
            )
        try:
            self._wait(lambda: self.log.count('"event": "listening"') > before and self._read_port(), "listening")
            self._wait(self._ready, "readiness")
        except BaseException:
            if self.process.poll() is None:
                self.stop()
            raise

    def kill(self) -> None:
        """SIGKILL the service: the parent and whatever workers it has."""
        assert self.process is not None
        workers = children(self.process.pid)
        self.process.kill()
        for worker in workers:
            try:
                if b"service.worker" in Path(f"/proc/{worker}/cmdline").read_bytes():
                    os.kill(worker, signal.SIGKILL)
            except (FileNotFoundError, ProcessLookupError):
                continue
        self.process.wait(EXIT_S)

    def stop(self) -> int:
        """SIGTERM, and wait until it has left. Gives the exit code."""
        assert self.process is not None
        self.process.terminate()
        return self.process.wait(EXIT_S)

    def _read_port(self) -> bool:
        found = re.findall(r'"url": "http://[^"]*:(\d+)"', self.log)
        self.port = int(found[-1]) if found else 0
        return bool(found)

    def _ready(self) -> bool:
        try:
            return httpx.get(f"{self.url}/health/ready", timeout=1.0).status_code == 200
        except httpx.HTTPError:
            return False

    def _wait(self, condition: object, what: str) -> None:
        assert callable(condition)
        assert self.process is not None
        deadline = time.monotonic() + READY_S
        while not condition():
            assert self.process.poll() is None, f"the service has left:\n{self.log}"
            assert time.monotonic() < deadline, f"the service has not reached {what}:\n{self.log}"
            time.sleep(0.02)


def children(pid: int) -> list[int]:
    """Processes that `pid` has started and that still run."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def new_server(folder: Path, **settings: str) -> Server:
    """Describe a service with a data directory of its own; `settings` are SUREFOOT_ names in lower case."""
    data_dir = folder / "data"
    data_dir.mkdir(parents=True)
    return Server(data_dir, {f"SUREFOOT_{name.upper()}": value for name, value in settings.items()})


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The service with its defaults and the bundled CartPole policy, shared by all tests that only talk to it."""
    shared = new_server(tmp_path_factory.mktemp("server"))
    shared.start()
    yield shared
    assert shared.stop() == 0, shared.log
