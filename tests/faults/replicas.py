"""`surefoot serve` processes for fault scenarios: started as a user does, killed by part, with a launcher between.

Duty: one replica with its data directory, its log and its port, over any number of restarts. What it answers is read
from outside: health, metrics.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from tests.conftest import children
from tests.waiting import gone, until

SERVE = (sys.executable, "-m", "service.cli", "serve")
READY_S, EXIT_S = 120.0, 60.0
ROOT = Path(__file__).parents[2]


@dataclass
class Replica:
    """One service. `settings` are SUREFOOT_ names in lower case; `environment` is set besides."""

    folder: Path
    settings: dict[str, str]
    environment: Mapping[str, str] = field(default_factory=dict)
    command: Sequence[str] = SERVE
    port: int = 0
    process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def data_dir(self) -> Path:
        return self.folder / "data"

    @property
    def log(self) -> str:
        path = self.folder / "server.log"
        return path.read_text() if path.exists() else ""

    def start(self, wait: bool = True) -> None:
        """Start it on what lies in its data directory; wait until it is ready."""
        self.data_dir.mkdir(parents=True, exist_ok=True)
        named = {f"SUREFOOT_{name.upper()}": value for name, value in self.settings.items()}
        outer = {k: v for k, v in os.environ.items() if not k.startswith(("SUREFOOT_", "OTEL_"))}
        own = {"SUREFOOT_DATA_DIR": str(self.data_dir), "SUREFOOT_PORT": str(self.port)}
        before = self.log.count('"event": "listening"')
        with (self.folder / "server.log").open("a") as log:
            self.process = subprocess.Popen(
                list(self.command), env=outer | own | named | dict(self.environment), stdout=log, stderr=log, cwd=ROOT
            )
        self._wait(lambda: self.log.count('"event": "listening"') > before and self._read_port(), "listening")
        if wait:
            self.wait_ready()

    def wait_ready(self) -> None:
        self._wait(self.ready, "readiness")

    @property
    def workers(self) -> list[int]:
        """Pids of its worker processes; empty between a death and the next start."""
        assert self.process is not None
        with suppress(FileNotFoundError):
            return children(self.process.pid)
        return []

    def kill_worker(self) -> int:
        """SIGKILL a worker; the parent starts another. Gives its pid, 0 when there is none just now."""
        for pid in self.workers[:1]:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
                return pid
        return 0

    def kill(self) -> None:
        """SIGKILL parent and workers."""
        assert self.process is not None
        workers = self.workers
        self.process.kill()
        for pid in workers:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait(EXIT_S)
        for pid in workers:
            until(lambda pid=pid: gone(pid), "the end of a worker")  # type: ignore[misc]

    def stop(self) -> int:
        """SIGTERM, and wait until it has left. Gives the exit code."""
        assert self.process is not None
        self.process.terminate()
        return self.process.wait(EXIT_S)

    @property
    def runs(self) -> bool:
        return self.process is not None and self.process.poll() is None

    # What it says

    def health(self) -> dict[str, Any] | None:
        """What readiness answers; None where nobody answers."""
        try:
            found: dict[str, Any] = httpx.get(f"{self.url}/health/ready", timeout=5.0).json()
        except (httpx.HTTPError, ValueError):
            return None
        return found

    def ready(self) -> bool:
        found = self.health()
        return found is not None and found["status"] == "ready"

    def metric(self, name: str, **labels: str) -> float:
        """The sum of the series of a metric that have these labels; 0 without one. Raises httpx.HTTPError."""
        text = httpx.get(f"{self.url}/metrics", timeout=10.0).text
        total = 0.0
        for series, value in re.findall(rf"^{name}(?:{{(.*)}})? (\S+)$", text, re.MULTILINE):
            if all(f'{label}="{wanted}"' in series for label, wanted in labels.items()):
                total += float(value)
        return total

    def rss_bytes(self) -> int:
        """Resident memory of its worker."""
        for pid in self.workers[:1]:
            with suppress(FileNotFoundError):
                (kib,) = re.findall(r"^VmRSS:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
                return int(kib) << 10
        return 0

    def _read_port(self) -> bool:
        found = re.findall(r'"url": "http://[^"]*:(\d+)"', self.log)
        self.port = int(found[-1]) if found else 0
        return bool(found)

    def _wait(self, condition: Any, what: str) -> None:
        process = self.process
        assert process is not None

        def reached() -> bool:
            assert process.poll() is None, f"the service has left:\n{self.log[-4000:]}"
            return bool(condition())

        try:
            until(reached, what, READY_S)
        except AssertionError:
            raise AssertionError(f"no {what}:\n{self.log[-4000:]}") from None
