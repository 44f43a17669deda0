"""One file of the spool: rows in SQLite, WAL mode, one row per append, read back in order of (policy, seq).

Duty: commit rows and give them back. Knows nothing of other files, shipping, Redis or event loops; `write` belongs to
one thread, reading to one other.
Strategy: one table keyed by lane number (upper bits) and first seq, so that a lane reads back as one range; never
checkpointed (a checkpoint stalls commits). `synchronous=OFF` writes to the page cache, which survives SIGKILL;
surviving power loss is another tier's promise.
Promise: what `write` returned from is read back byte for byte, or its key is in `damaged`; damage found while reading
never raises, and costs the rows it hit.
"""

from __future__ import annotations

import contextlib
import sqlite3
import struct
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote
from zlib import crc32

from service.salvage import PAGE

_LANE = 40  # bits of seq below the lane number
_PROBES = 1 << 16  # how far behind an unreadable page the next readable row is looked for
_SUFFIXES = ("", "-wal", "-shm")
_KEY = struct.Struct(">qqq")


class Row(NamedTuple):
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
    def create(cls, path: Path) -> SpoolFile:
        file = cls(path)
        try:
            file._writer = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
            for pragma in ("synchronous=OFF", f"page_size={PAGE}", "journal_mode=WAL", "wal_autocheckpoint=0"):
                file._writer.execute(f"PRAGMA {pragma}").fetchall()
            file._writer.execute(
                "CREATE TABLE row (key INTEGER PRIMARY KEY, policy BLOB, count INTEGER, at_ms INTEGER, "
                "crc32 INTEGER, blob BLOB)"
            )
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
        writer.execute("BEGIN")
        try:
            writer.executemany("INSERT INTO row VALUES (?, ?, ?, ?, ?, ?)", [_pack(lane, row) for lane, row in rows])
            writer.execute("COMMIT")
        except sqlite3.Error:
            with contextlib.suppress(sqlite3.Error):
                writer.execute("ROLLBACK")
            raise
        spans = dict(self.spans)
        for lane, row in rows:
            old = spans.get(row.policy)
            spans[row.policy] = Span(
                lane, *((old.first, row.end, old.at_ms) if old else (*row[1:2], row.end, row.at_ms))
            )
        self.spans = spans

    def rows(self, policy: str, seq: int, stop: int) -> Generator[Row, None, None]:
        """Yield the intact rows that hold seqs from `seq` up to, not including, `stop`."""
        span = self.spans.get(policy)
        if span is None or seq >= span.end or stop <= span.first:
            return
        base = span.lane << _LANE
        start = base + max(seq, span.first)
        with contextlib.suppress(sqlite3.DatabaseError):  # then a row that begins earlier is not looked for
            found = self._query("SELECT max(key) FROM row WHERE key BETWEEN ? AND ?", base, start)
            start = found[0] if found and isinstance(found[0], int) else start
        for _, row in self._scan(start, base + min(stop, span.end)):
            if row.end > seq:
                yield row

    def _scan(self, key: int, stop: int) -> Generator[tuple[int, Row], None, None]:
        """Yield the intact rows with keys in [key, stop), stepping over what is damaged."""
        while key < stop:
            try:
                for raw in self._cursor(key, stop):
                    row = _unpack(raw) if raw[0] >= key else None
                    if row is None:
                        self.damaged.add(raw[0])
                        key = max(key, raw[0] + 1)
                    else:
                        key = raw[0] + row.count
                        yield raw[0] >> _LANE, row
                return
            except sqlite3.DatabaseError:
                self.damaged.add(key)
                key = self._beyond(key, stop)

    def _beyond(self, key: int, stop: int) -> int:
        """Find the next key from which a row can be read, behind an unreadable page or row."""
        for probe in range(key + 1, min(stop, key + _PROBES)):
            with contextlib.suppress(sqlite3.DatabaseError):
                found = self._query("SELECT key FROM row WHERE key >= ? LIMIT 1", probe)
                return max(probe, found[0]) if found else stop
        return min(stop, ((key >> _LANE) + 1) << _LANE)

    def _find_spans(self) -> dict[str, Span]:
        spans: dict[str, Span] = {}
        last = self._query("SELECT max(key) FROM row")
        stop = last[0] + 1 if last and last[0] is not None else 0
        lane = 0
        while (first := next(self._scan(lane << _LANE, stop), None)) is not None:
            lane, row = first
            spans[row.policy] = Span(lane, row.first_seq, max(row.end, self._end(lane)), row.at_ms)
            lane += 1
        return spans

    def _end(self, lane: int) -> int:
        """Find the seq after a lane's last row, intact or not."""
        base = lane << _LANE
        with contextlib.suppress(sqlite3.DatabaseError):
            found = self._query(
                "SELECT key, count FROM row WHERE key BETWEEN ? AND ? ORDER BY key DESC LIMIT 1",
                base,
                base + (1 << _LANE) - 1,
            )
            if found:
                count = found[1] if isinstance(found[1], int) and 0 < found[1] < _PROBES else 1
                return int(found[0]) - base + count
        return max((row.end for _, row in self._scan(base, base + (1 << _LANE))), default=0)

    def _query(self, sql: str, *values: int) -> tuple[int, ...] | None:
        assert self._reader is not None, "the file is open"
        found: tuple[int, ...] | None = self._reader.execute(sql, values).fetchone()
        return found

    def _cursor(self, key: int, stop: int) -> Iterator[tuple[int, object, object, object, object, object]]:
        assert self._reader is not None, "the file is open"
        return self._reader.execute("SELECT * FROM row WHERE key >= ? AND key < ? ORDER BY key", (key, stop))

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


def _crc(policy: bytes, key: int, count: int, at_ms: int, blob: bytes) -> int:
    return crc32(blob, crc32(policy, crc32(_KEY.pack(key, count, at_ms))))


def _pack(lane: int, row: Row) -> tuple[int, bytes, int, int, int, bytes]:
    key, policy = (lane << _LANE) + row.first_seq, row.policy.encode()
    return key, policy, row.count, row.at_ms, _crc(policy, key, row.count, row.at_ms, row.blob), row.blob


def _unpack(raw: tuple[int, object, object, object, object, object]) -> Row | None:
    """Give the row, or None when anything in it is not what was written."""
    key, policy, count, at_ms, crc, blob = raw
    if not (
        isinstance(policy, bytes) and isinstance(blob, bytes) and isinstance(count, int) and isinstance(at_ms, int)
    ):
        return None
    if crc != _crc(policy, key, count, at_ms, blob):
        return None
    return Row(policy.decode(), key & ((1 << _LANE) - 1), count, at_ms, blob)
