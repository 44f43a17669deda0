"""EDGE: several trials in a row, of which only the first waits for the libraries.

Duty: `Template.run`, to be used where `trial.run_alone` would be. It knows nothing of what is tried.
Strategy: one process loads what a trial needs, reads no bundle, and forks a trial for each; a trial confines itself as
one that was started alone does, and ends with its bundle. Where there is no such process (not on Linux: the libraries
of other systems do not survive a fork; or it has ended), each trial is started alone.
Promise: as `run_alone`: a trial ends with all that it started, in time, and none has read another's bundle. `close`
leaves no process behind.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from contextlib import suppress
from types import TracebackType
from typing import IO, Self

from policies.trial import run_alone, start_child

# How long a process may take that has only to end.
EXIT_S = 5.0


class Template:
    """A process for the trials of one thread. Starts with the first of them."""

    def __init__(self) -> None:
        self._link: socket.socket | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._usable = sys.platform == "linux"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.close()

    def run(self, given: IO[bytes], answers: IO[bytes], said: IO[bytes], wall_s: float) -> int | None:
        """Give the trial's exit status, None when its time was over; in any case nothing of it runs on."""
        pid = self._fork([given.fileno(), answers.fileno(), said.fileno()], wall_s) if self._usable else 0
        if not pid:
            self._usable = False
            return run_alone(given, answers, said, wall_s)
        assert self._link is not None
        in_time = True
        try:
            self._link.settimeout(wall_s)
            self._link.recv(1)
        except TimeoutError:
            in_time = False
        except OSError:
            pass  # the template has ended: `_status` notices
        finally:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(pid, signal.SIGKILL)
        status = self._status(waited=in_time)
        return status if in_time else None

    def close(self) -> None:
        """End the process."""
        if self._link is not None:
            self._link.close()
        if self._process is not None:
            try:
                self._process.wait(EXIT_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        self._link = self._process = None

    def _fork(self, files: list[int], wall_s: float) -> int:
        """Give the pid of a new trial; 0 when there is no process that could give one."""
        if self._link is None:
            self._start()
        assert self._link is not None
        try:
            self._link.settimeout(wall_s)  # the first one loads
            socket.send_fds(self._link, [b"t"], files)
            return int(self._link.recv(32) or b"0")
        except OSError:
            return 0

    def _start(self) -> None:
        self._link, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            nothing = subprocess.DEVNULL
            self._process = start_child(nothing, nothing, nothing, theirs.fileno())

    def _status(self, waited: bool) -> int:
        """Have the ended trial taken down, and give its exit status."""
        assert self._link is not None
        self._link.settimeout(EXIT_S)
        try:
            if not waited:
                self._link.recv(1)
            self._link.send(b"r")
            return int(self._link.recv(32) or b"1")
        except OSError:
            self._usable = False
            return 1
