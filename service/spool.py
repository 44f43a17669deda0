"""The spool of one (producer, epoch): its files in a row, from the first kept to the one being written.

Duty: rotate, read across files, and delete files that are shipped and old. Knows nothing of Redis, event loops or who
calls. `write` and what begins or ends a file are called by one thread at a time, which `writer.py` sees to; everything
else belongs to the reading thread.
Strategy: a file is deleted whole, once every row in it has been applied and it was kept long enough that a failover
to an older copy of Redis can still be healed from it.
Promise: an unshipped row is never deleted; a file that is no database is renamed aside and counted, never opened twice.
"""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

from service.salvage import examine, log_of
from service.slots import Slot
from service.spool_file import Row, Span, SpoolFile, rebuild

ROTATE_BYTES = 64 << 20  # design section 10; some 11,000 commits of one small decision each
LOOKS = 64  # how often a file's size is looked at until it is full
PAGES_OF_A_COMMIT = 8192  # about what SQLite writes besides the rows themselves
KEEP_BYTES = 256 << 20
KEEP_S = 120.0  # several times what a failover takes
_NO_DATABASE = (sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_ERROR)


class Damage(NamedTuple):
    """What could not be read so far."""

    rows: int = 0
    files: int = 0  # rebuilt from their pages, or set aside
    torn_tails: int = 0  # files that end in a transaction which was never finished, or was cut


class Spool:
    def __init__(
        self,
        path: Path,
        producer: str,
        epoch: int,
        *,
        rotate_bytes: int = ROTATE_BYTES,
        keep_bytes: int = KEEP_BYTES,
        keep_s: float = KEEP_S,
        fsync: bool = False,
    ) -> None:
        """`fsync`: what is written survives power loss, not only SIGKILL. The folder's own name must be on disk."""
        self.path = path
        self.producer = producer
        self.epoch = epoch
        self._rotate_bytes = rotate_bytes
        self._keep_bytes = keep_bytes
        self._keep_s = keep_s
        self._fsync = fsync
        self._lock = threading.Lock()  # held to replace `_files`, never during I/O
        self._files: tuple[SpoolFile, ...] = ()
        self._current: SpoolFile | None = None
        self.full = False  # the current file is to be followed by another
        self._unlooked = 0  # about how many bytes were written since somebody looked at its size
        self._next = 1
        self._lanes: dict[str, int] = {}
        self._gone = Damage()

    @classmethod
    def reopen(cls, slot: Slot, epoch: int, *, keep_bytes: int = KEEP_BYTES, keep_s: float = KEEP_S) -> Spool:
        """Open what an earlier epoch left in a slot that the caller holds."""
        spool = cls(slot.path, slot.producer, epoch, keep_bytes=keep_bytes, keep_s=keep_s)
        try:
            for path in slot.epochs().get(epoch, []):
                if (file := spool._reopen_file(path)) is not None:
                    spool._files += (file,)
        except BaseException:
            spool.close()
            raise
        return spool

    def _reopen_file(self, path: Path) -> SpoolFile | None:
        health = examine(path)
        self._count(Damage(files=health.damaged, torn_tails=health.torn_tail))
        if health.empty and not health.damaged:
            SpoolFile(path).delete()  # killed while it was made
            return None
        try:
            if not health.damaged or (log_of(path).exists() and rebuild(path)):
                return SpoolFile.reopen(path)
        except sqlite3.DatabaseError as error:
            if error.sqlite_errorcode & 0xFF not in _NO_DATABASE:
                raise  # the machine's trouble, not the file's: try again later
            self._count(Damage(files=not health.damaged))
        SpoolFile(path).set_aside()
        return None

    def write(self, rows: list[Row]) -> None:
        """Commit rows. Raises sqlite3.Error or OSError; then nothing of them is kept."""
        if not self.ready:
            self.start_new_file()
        assert self._current is not None, "just started"
        self._current.write([(self._lanes.setdefault(row.policy, len(self._lanes)), row) for row in rows])
        self._unlooked += PAGES_OF_A_COMMIT + sum(len(row.blob) for row in rows)
        if self._unlooked >= self._rotate_bytes // LOOKS:
            self._unlooked = 0
            self.full = self._current.size() >= self._rotate_bytes

    @property
    def ready(self) -> bool:
        """Whether the next write goes to the current file: no other has to be made first, which takes a while."""
        return self._current is not None and not self.full

    def start_new_file(self) -> None:
        """Write to a new file from now on. Raises sqlite3.Error or OSError when there is no room for one."""
        self.finish_file()
        file = SpoolFile.create(self.path / f"{self.epoch}-{self._next}.db", fsync=self._fsync)
        self._next += 1
        self._unlooked, self.full = 0, False
        with self._lock:
            self._current = file
            self._files += (file,)

    def finish_file(self) -> None:
        """Write no more to the current file; the next write starts another."""
        if self._current is not None:
            self._current.finish()
            with self._lock:
                self._current = None

    def read(self, policy: str, seq: int, stop: int, max_events: int, max_bytes: int) -> list[Row]:
        """Read intact rows that hold seqs in [seq, stop), oldest first: one if there is one, then more up to a limit.

        Rows may be missing between them: compare `first_seq` with the `end` before.
        """
        rows: list[Row] = []
        events = size = 0
        files = self._files
        for position, file in enumerate(files):
            # A commit that failed may have left rows whose seqs were given out again: the later file is right.
            later = [span.first for after in files[position + 1 :] if (span := after.spans.get(policy))]
            with closing(file.rows(policy, seq, min([stop, *later]))) as found:
                for row in found:
                    if rows and (events + row.count > max_events or size + len(row.blob) > max_bytes):
                        return rows
                    rows.append(row)
                    events, size, seq = events + row.count, size + len(row.blob), row.end
        return rows

    def spans(self) -> dict[str, Span]:
        """Tell by policy what is kept, over all files."""
        merged: dict[str, Span] = {}
        for file in self._files:
            for policy, span in file.spans.items():
                old = merged.get(policy, span)
                merged[policy] = Span(span.lane, old.first, max(old.end, span.end), old.at_ms)
        return merged

    def expire(self, applied: Mapping[str, int], now_s: float) -> int:
        """Delete files that are wholly applied (by policy: the seq up to which, exclusive) and old. Return how many."""
        with self._lock:
            candidates = [file for file in self._files if file is not self._current]
        shipped = []
        for file in candidates:
            if all(span.end <= applied.get(policy, 0) for policy, span in file.spans.items()):
                file.shipped_since_s = now_s if file.shipped_since_s is None else file.shipped_since_s
                shipped.append(file)
            else:
                file.shipped_since_s = None
        size = sum(file.size() for file in shipped)
        deleted = 0
        for file in shipped:
            since = file.shipped_since_s or 0.0
            if file.spans and now_s - since < self._keep_s and size <= self._keep_bytes:
                continue
            size -= file.size()
            self._delete(file)
            deleted += 1
        return deleted

    def _delete(self, file: SpoolFile) -> None:
        with self._lock:
            self._files = tuple(other for other in self._files if other is not file)
        self._count(Damage(rows=len(file.damaged)))
        file.delete()

    def _count(self, more: Damage) -> None:
        self._gone = Damage(*(a + b for a, b in zip(self._gone, more, strict=True)))

    @property
    def damage(self) -> Damage:
        rows = sum(len(file.damaged) for file in self._files)
        return self._gone._replace(rows=self._gone.rows + rows)

    @property
    def files(self) -> int:
        return len(self._files)

    def close(self) -> None:
        """Close all files and leave them. Both threads must have ended."""
        for file in self._files:
            file.close()
        self._files, self._current = (), None
