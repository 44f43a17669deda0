"""Writing to the spool: one thread drains a queue, one commit for all that it finds there.

Duty: group commits, notice a disk that is full or broken, and try again until it is not. Knows nothing of lanes,
futures or shipping; it reports through three callbacks, called in this thread.
Strategy: a row alone may be committed by whoever brings it (`write_now`), which spares two changes of threads; what
takes longer (files to begin and to close, disks that are slow) is left to the thread. After a failure every row in the
queue is dropped, because the ledger gives their seqs out again; only what is put behind `resume` is written. Low disk
is refused before SQLite meets it, so that the reserve is left for shipping; a little before that `scarce` says so, for
those who must not rely on the next commit.
Promise: `on_commit(n)` means that the n oldest rows are committed, in order; after `on_failure` none of the waiting
rows will be.
"""

from __future__ import annotations

import math
import os
import sqlite3
import threading
import time
from collections.abc import Callable
from enum import Enum
from queue import Empty, SimpleQueue

from service.spool import Spool
from service.spool_file import Row

# One commit holds at most this much, so that its first row does not wait for a flood behind it.
MAX_COMMIT_ROWS = 1024
MAX_COMMIT_BYTES = 4 << 20
# A commit takes microseconds. One that took so long has waited for the disk, and others behind it will.
SLOW_S = 0.005
ASIDE_S = 1.0
# Above the reserve: 16 of the largest commits, so that low disk is known before one is refused.
SCARCE_BYTES = 64 << 20


class _Signal(Enum):
    RESUME = 1
    STOP = 2
    FINISH = 3


class Writer:
    def __init__(
        self,
        spool: Spool,
        *,
        min_free_bytes: int,
        probe_s: float,
        on_commit: Callable[[int], None],
        on_failure: Callable[[str], None],
        on_recovery: Callable[[], None],
        monotonic_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self._spool = spool
        self._min_free_bytes = min_free_bytes
        self._probe_s = probe_s
        self._on_commit = on_commit
        self._on_failure = on_failure
        self._on_recovery = on_recovery
        self._queue: SimpleQueue[Row | _Signal] = SimpleQueue()
        self._failed = False  # rows are dropped until RESUME
        self._probing = False  # the spool has not been writable since the failure
        self._stopping = False
        self._monotonic_s = monotonic_s
        self._aside_until_s = -math.inf  # the disk has made a caller wait: until then only the thread writes
        self.commits = 0
        self.scarce = False  # little more than the reserve was free at the last commit
        self._thread = threading.Thread(target=self._run, name="spool-writer", daemon=True)
        self._thread.start()

    def put(self, row: Row) -> None:
        self._queue.put(row)

    def write_now(self, row: Row) -> bool:
        """Commit a row in the caller's thread, if that is sure to be quick. Gives whether it was committed.

        To be called only while nothing that was put waits for its commit: the thread is idle then.
        """
        now_s = self._monotonic_s()
        if self._failed or now_s < self._aside_until_s or not self._spool.ready:
            return False
        try:
            self._check_disk()
            self._spool.write([row])
        except Exception:  # nothing was kept: the thread meets it again, and knows what to do
            return False
        self.commits += 1
        if self._spool.full:
            self._queue.put(_Signal.FINISH)
        if self._monotonic_s() - now_s > SLOW_S:
            self._aside_until_s = now_s + ASIDE_S
        return True

    def resume(self) -> None:
        """Write what is put from now on. To be called once after each `on_recovery`."""
        self._queue.put(_Signal.RESUME)

    def stop(self) -> None:
        """Commit what was put before, then end the thread. Blocks until it has."""
        self._queue.put(_Signal.STOP)
        self._thread.join()

    def _run(self) -> None:
        while not self._stopping:
            rows = self._take()
            if rows:
                self._commit(rows)
            elif self._probing:
                self._probe()
        self._spool.finish_file()

    def _take(self) -> list[Row]:
        """Wait for rows and take what is there, up to one commit's worth or a signal."""
        rows: list[Row] = []
        size = 0
        try:
            item = self._queue.get(timeout=self._probe_s if self._probing else None)
            while True:
                if isinstance(item, _Signal):
                    self._obey(item)
                    return rows
                if not self._failed:
                    rows.append(item)
                    size += len(item.blob)
                if len(rows) >= MAX_COMMIT_ROWS or size >= MAX_COMMIT_BYTES:
                    return rows
                item = self._queue.get_nowait()
        except Empty:
            return rows

    def _obey(self, signal: _Signal) -> None:
        if signal is _Signal.RESUME:
            self._failed = False
        elif signal is _Signal.FINISH:
            self._finish_full()
        else:
            self._stopping = True

    def _commit(self, rows: list[Row]) -> None:
        try:
            self._check_disk()
            self._spool.write(rows)
        except Exception as error:  # whatever it is, these rows are not on disk
            self._failed = self._probing = True
            self._on_failure(f"{type(error).__name__}: {error}")
            return
        self.commits += 1
        self._on_commit(len(rows))
        self._finish_full()

    def _finish_full(self) -> None:
        """Close a file that is full; the next row makes another."""
        if self._spool.full:
            self._spool.finish_file()

    def _probe(self) -> None:
        """Write to a fresh file: the one that failed may hold half of something."""
        try:
            self._check_disk()
            self._spool.start_new_file()
        except (sqlite3.Error, OSError):
            return
        self._probing = False
        self._on_recovery()

    def _check_disk(self) -> None:
        disk = os.statvfs(self._spool.path)
        free = disk.f_bavail * disk.f_frsize
        self.scarce = self._min_free_bytes > 0 and free < self._min_free_bytes + SCARCE_BYTES
        if free < self._min_free_bytes:
            raise OSError(f"{free >> 20} MiB of disk are free, {self._min_free_bytes >> 20} MiB are kept in reserve")
