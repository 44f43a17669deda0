"""One file of the spool: rows in SQLite, WAL mode, one row per append, read back in order of (policy, seq).

Duty: commit rows and give them back. Knows nothing of other files, shipping, Redis or event loops; `write` belongs to
one thread, reading to one other.
Strategy: one table keyed by lane number (upper bits) and first seq, so that a lane reads back as one range; never
checkpointed (a checkpoint stalls commits). `synchronous=OFF` writes to the page cache, which survives SIGKILL; with
`fsync` each commit is on disk before it returns (`synchronous=FULL`: in WAL mode, one fsync of the log), and so is the
name of the file, which survives power loss.
Promise: what `write` returned from is read back byte for byte, or its key is in `damaged`; damage found while reading
never raises, and costs the rows it hit.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import struct
from collections.abc import Generator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote
from zlib import crc32

import msgspec

from service.carve import PAGE, carve
from service.salvage import log_of

_LANE = 40  # bits of seq below the lane number
_SEQ = (1 << _LANE) - 1
_NO_KEY = (1 << 63) - 1
_COUNTS = 1 << 16  # more events than any row has
_SUFFIXES = ("", "-wal", "-shm")
_KEY = struct.Struct(">qqq")
# Without spilling, frames are written by commits alone, one after the other.
_PRAGMAS = (f"page_size={PAGE}", "journal_mode=WAL", "wal_autocheckpoint=0", "cache_spill=OFF")
_TABLE = (
    "CREATE TABLE row (key INTEGER PRIMARY KEY, policy BLOB, count INTEGER, at_ms INTEGER, crc32 INTEGER, blob BLOB)"
)
_INSERT = "INSERT INTO row VALUES (?, ?, ?, ?, ?, ?)"

_Raw = tuple[int, object, object, object, object, object]


class Row(msgspec.Struct, frozen=True, gc=False):
    """One append: `count` events of one policy, encoded as one blob."""

    policy: str
    first_seq: int
    count: int
    at_ms: int
    blob: bytes

    @property
    def end(self) -> int:
        """The seq after the row's last."""
        return self.first_seq + self.count


@dataclass(frozen=True, slots=True)
class Span:
    """Which seqs of one policy a file holds: from `first` up to, not including, `end`."""

    lane: int
    first: int
    end: int
    at_ms: int  # of the first row


class SpoolFile:
    """One database file. `spans` is replaced, never changed, so that both threads may look at it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.spans: dict[str, Span] = {}
        self.damaged: set[int] = set()  # keys at which a row could not be read
        self.shipped_since_s: float | None = None
        self._writer: sqlite3.Connection | None = None
        self._reader: sqlite3.Connection | None = None

    @classmethod
    def create(cls, path: Path, *, fsync: bool = False) -> SpoolFile:
        """Make a new file. Raises sqlite3.Error or OSError; then nothing is left of it."""
        file = cls(path)
        try:
            file._writer = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
            for pragma in (f"synchronous={'FULL' if fsync else 'OFF'}", *_PRAGMAS):
                file._writer.execute(f"PRAGMA {pragma}").fetchall()
            file._writer.execute(_TABLE)
            if fsync:
                sync_folder(path.parent)
            file._connect()
        except (sqlite3.Error, OSError):
            file.delete()
            raise
        return file

    @classmethod
    def reopen(cls, path: Path) -> SpoolFile:
        """Open what an earlier process left, for reading. Raises sqlite3.DatabaseError when it is no database."""
        file = cls(path)
        try:
            file._connect()
            file.spans = file._find_spans()
        except sqlite3.Error:
            file.close()
            raise
        return file

    def _connect(self) -> None:
        uri = f"file:{quote(str(self.path))}?mode=ro"  # a read-only connection closes without a checkpoint
        self._reader = sqlite3.connect(uri, uri=True, isolation_level=None, check_same_thread=False)
        self._reader.execute("SELECT key FROM row LIMIT 1").fetchall()

    def write(self, rows: list[tuple[int, Row]]) -> None:
        """Commit rows, each with its lane number, all or none. Raises sqlite3.Error."""
        writer = self._writer
        assert writer is not None, "a reopened file is not written"
        if len(rows) == 1:  # a statement by itself is a transaction
            writer.execute(_INSERT, _pack(*rows[0]))
        else:
            self._write_together(writer, rows)
        spans = dict(self.spans)
        for lane, row in rows:
            old = spans.get(row.policy)
            first, at_ms = (old.first, old.at_ms) if old else (row.first_seq, row.at_ms)
            spans[row.policy] = Span(lane, first, row.end, at_ms)
        self.spans = spans

    def _write_together(self, writer: sqlite3.Connection, rows: list[tuple[int, Row]]) -> None:
        writer.execute("BEGIN")
        try:
            writer.executemany(_INSERT, [_pack(lane, row) for lane, row in rows])
            writer.execute("COMMIT")
        except sqlite3.Error:
            with contextlib.suppress(sqlite3.Error):
                writer.execute("ROLLBACK")
            raise

    def rows(self, policy: str, seq: int, stop: int) -> Generator[Row, None, None]:
        """Yield the intact rows that hold seqs from `seq` up to, not including, `stop`. Raises sqlite3.Error."""
        span = self.spans.get(policy)
        if span is None or seq >= span.end or stop <= span.first:
            return
        base = span.lane << _LANE
        start = base + max(seq, span.first)
        (before,) = self._query("SELECT max(key) FROM row WHERE key BETWEEN ? AND ?", base, start) or (None,)
        for _, row in self._scan(start if before is None else before, base + min(stop, span.end)):
            if row.end > seq:
                yield row

    def _scan(self, key: int, stop: int) -> Generator[tuple[int, Row], None, None]:
        """Yield the intact rows with keys in [key, stop), each with its lane."""
        assert self._reader is not None, "the file is open"
        for raw in self._reader.execute("SELECT * FROM row WHERE key >= ? AND key < ? ORDER BY key", (key, stop)):
            row = _unpack(raw)
            if row is None:
                self.damaged.add(raw[0])
            else:
                yield raw[0] >> _LANE, row

    def _find_spans(self) -> dict[str, Span]:
        spans: dict[str, Span] = {}
        lane = 0
        while (first := next(self._scan(lane << _LANE, _NO_KEY), None)) is not None:
            lane, row = first
            last = self._query("SELECT max(key), count FROM row WHERE key < ?", (lane + 1) << _LANE)
            assert last is not None, "there is a row"
            end = (last[0] & _SEQ) + max(1, last[1])  # intact or not: what is missing before it is known to be lost
            spans[row.policy] = Span(lane, row.first_seq, end, row.at_ms)
            lane += 1
        return spans

    def _query(self, sql: str, *values: int) -> tuple[int, ...] | None:
        assert self._reader is not None, "the file is open"
        found: tuple[int, ...] | None = self._reader.execute(sql, values).fetchone()
        return found

    def size(self) -> int:
        return sum(path.stat().st_size for path in self._paths()[:2] if path.exists())

    def finish(self) -> None:
        """Stop writing; reading goes on. The reader's lock keeps this from starting a checkpoint."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def close(self) -> None:
        self.finish()
        if self._reader is not None:
            self._reader.close()
            self._reader = None

    def delete(self) -> None:
        self.close()
        for path in self._paths():
            path.unlink(missing_ok=True)

    def set_aside(self) -> None:
        """Keep a file that is no database, under a name that nobody opens."""
        self.close()
        for path in self._paths():
            if path.exists():
                path.rename(path.with_name(path.name + ".corrupt"))

    def _paths(self) -> list[Path]:
        return [self.path.with_name(self.path.name + suffix) for suffix in _SUFFIXES]


def sync_folder(folder: Path) -> None:
    """Put the names of a folder's files on disk: an fsync of a file does not cover its name."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _crc(policy: bytes, key: int, count: int, at_ms: int, blob: bytes) -> int:
    return crc32(blob, crc32(policy, crc32(_KEY.pack(key, count, at_ms))))


def _pack(lane: int, row: Row) -> tuple[int, bytes, int, int, int, bytes]:
    key, policy = (lane << _LANE) + row.first_seq, row.policy.encode()
    return key, policy, row.count, row.at_ms, _crc(policy, key, row.count, row.at_ms, row.blob), row.blob


def _unpack(raw: _Raw) -> Row | None:
    """Give the row, or None when anything in it is not what was written."""
    key, policy, count, at_ms, crc, blob = raw
    if not (
        isinstance(policy, bytes) and isinstance(blob, bytes) and isinstance(count, int) and isinstance(at_ms, int)
    ):
        return None
    if not 0 <= key < _NO_KEY or crc != _crc(policy, key, count, at_ms, blob):
        return None
    return Row(policy.decode(), key & _SEQ, count, at_ms, blob)


def rebuild(path: Path) -> bool:
    """Write a damaged file anew from the rows found in its pages. Return False, leaving it as it is, if there are none.

    Rows whose checksum fails are taken over as they are where they plainly belong to a lane, so that reading counts
    them. The damaged log stays beside it, as `-wal.corrupt`. May be killed at any point and run again.
    """
    rows = _found(path)
    if not rows:
        return False
    draft = path.with_name(path.name + ".rebuilt")
    draft.unlink(missing_ok=True)
    with closing(sqlite3.connect(draft, isolation_level=None)) as database:
        # On disk before it takes the log's place: a power loss in between must not cost both. It happens seldom.
        for statement in ("PRAGMA journal_mode=OFF", "PRAGMA synchronous=FULL", _TABLE, "BEGIN"):
            database.execute(statement).fetchall()
        database.executemany(_INSERT, rows)
        database.execute("COMMIT")
    draft.replace(path)
    sync_folder(path.parent)
    log_of(path).rename(path.with_name(path.name + "-wal.corrupt"))
    path.with_name(path.name + "-shm").unlink(missing_ok=True)
    return True


def _found(path: Path) -> list[_Raw]:
    good: dict[int, _Raw] = {}
    bad: dict[int, _Raw] = {}
    for key, columns in carve(log_of(path), 6):
        raw: _Raw = (key, *columns[1:])  # type: ignore[assignment]  # `carve` gives six columns
        if key not in good:
            (bad if _unpack(raw) is None else good)[key] = raw
    last: dict[int, int] = {}
    for key in good:
        last[key >> _LANE] = max(key, last.get(key >> _LANE, 0))
    for key, raw in bad.items():
        if key not in good and key < last.get(key >> _LANE, 0) + _COUNTS and _plausible(raw[2]):
            good[key] = raw
    return [good[key] for key in sorted(good)]


def _plausible(count: object) -> bool:
    return isinstance(count, int) and 0 < count < _COUNTS
