"""The `surefoot` command in a terminal of its own, for tests: what it writes, and how it ends."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tests.service.admins import TOKEN


def watching(policy: str = "cartpole") -> list[str]:
    """The command of a live view, which draws ten frames a second."""
    return ["rollout", "watch", policy, "--every", "0.1"]


class Shown:
    """A command in a terminal (or a pipe), and all that it has written so far."""

    def __init__(self, url: str, arguments: list[str], fd: int, out: int, **environment: str) -> None:
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("SUREFOOT_", "COLUMNS"))}
        # What runs in the background of a shell ignores Ctrl-C, and so do its children unless somebody says otherwise.
        listens = ["env", "--default-signal=INT"]
        command = [*listens, sys.executable, "-m", "service.cli", *arguments, "--url", url]
        told = {"SUREFOOT_ADMIN_TOKEN": TOKEN, "TERM": "xterm", **environment}
        self.process = subprocess.Popen(
            command, env=kept | told, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.PIPE
        )
        os.close(out)
        self._fd = fd
        self.text = ""

    def until(self, condition: Callable[[str], bool], what: str) -> str:
        """Read until what was written meets a condition. Gives what was written since the last call."""
        before, deadline = len(self.text), time.monotonic() + 60.0
        while not condition(self.text[before:]):
            assert time.monotonic() < deadline, f"waited in vain for {what}:\n{self.text}"
            if not self._read(0.1) and self.process.poll() is not None:
                raise AssertionError(f"it ended before {what}:\n{self.text}\n{self.errors}")
        return self.text[before:]

    def end(self, number: int) -> int:
        """Send a signal, and read the rest. Gives the exit code."""
        self.process.send_signal(number)
        return self.ended()

    def ended(self) -> int:
        deadline = time.monotonic() + 60.0
        while self.process.poll() is None:
            assert time.monotonic() < deadline, f"it has not ended:\n{self.text}"
            self._read(0.1)
        while self._read(0.0):
            pass
        return self.process.returncode

    @property
    def errors(self) -> str:
        assert self.process.stderr is not None
        return self.process.stderr.read().decode()

    def _read(self, seconds: float) -> bool:
        if not select.select([self._fd], [], [], seconds)[0]:
            return False
        try:
            found = os.read(self._fd, 65_536)
        except OSError:  # a terminal whose other side has closed
            return False
        self.text += found.decode()
        return bool(found)

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        assert self.process.stderr is not None
        self.process.stderr.close()
        os.close(self._fd)


@contextmanager
def terminal(url: str, arguments: list[str], columns: int = 80, lines: int = 50, **environment: str) -> Iterator[Shown]:
    """Run a command in a terminal of so many columns and lines."""
    mine, its = pty.openpty()
    fcntl.ioctl(its, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))
    shown = Shown(url, arguments, mine, its, **environment)
    try:
        yield shown
    finally:
        shown.close()
