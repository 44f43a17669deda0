"""A directory of Parquet files, partitioned as `policy=…/day=…/version=…/`. EDGE: files, fsync, locks.

Duty: rows to files, each row in one file and once. It knows nothing of Redis.
Strategy: a file is written and fsynced under a temporary name, outside of everybody's sight; then, under a lock on the
directory, it is compared with the files that are there and renamed. Its name says which stream ids it spans, so only
files whose span overlaps need be looked into. That one comparison covers what was written but not acknowledged before a
kill, what a slow consumer writes after another has taken it over, and an export that is run again.
Promise: a transition, told by its stream id, is in exactly one file, whatever is killed and however many consumers
export into the directory at once. A file that can be seen is whole and on disk.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import uuid
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import quote

import pyarrow.parquet as pq

from surefoot.entries import Row, Spec
from surefoot.export import ExportError, Report, sync
from surefoot.export_schema import table
from surefoot.survey import StreamId, parse_id

_OWN = ".surefoot"  # locks and unfinished files; readers ignore names that begin with a dot
_NAME = re.compile(r"(\d+-\d+)_(\d+-\d+)\.parquet")
_FILES_KNOWN = 64  # whose ids are remembered: a few hundred kilobytes each


class ParquetDirectory:
    """The files of an export."""

    def __init__(self, root: Path, report: Report, *, append: bool) -> None:
        self._root, self._report = root, report
        if not append and root.exists() and any(each.name != _OWN for each in root.iterdir()):
            raise ExportError(f"{root} is not empty: add to it with append, or choose another directory")
        (root / _OWN).mkdir(parents=True, exist_ok=True)
        self._lock = os.open(root / _OWN / "lock", os.O_RDWR | os.O_CREAT, 0o666)
        self._ids: OrderedDict[Path, frozenset[str]] = OrderedDict()
        self._scratch = root / _OWN / uuid.uuid4().hex
        with self._locked():  # or another's cleaning would find the folder before its lock
            self._remove_what_the_dead_left()
            self._scratch.mkdir()
            self._alive = os.open(self._scratch, os.O_RDONLY)
            fcntl.flock(self._alive, fcntl.LOCK_EX)

    def start(self, from_: str | None) -> str | None:
        """Read from where it was asked: what is here already is found by its ids."""
        return from_

    def write(self, rows: Sequence[Row]) -> None:
        """Put rows into files, and return when they are on disk."""
        parts: dict[tuple[Path, Spec], list[Row]] = {}
        for row in rows:
            parts.setdefault((self._partition(row), row.spec), []).append(row)
        for (folder, _), part in parts.items():
            self._commit(folder, sorted(part, key=lambda row: parse_id(row.stream_id)))

    def finish(self) -> None:
        """Nothing is left to do: every `write` is complete."""

    def close(self) -> None:
        shutil.rmtree(self._scratch, ignore_errors=True)
        os.close(self._alive)
        os.close(self._lock)

    def _partition(self, row: Row) -> Path:
        day = datetime.fromtimestamp(row.at_ms / 1000, UTC).date()
        values = {"policy": self._report.policy, "day": day.isoformat(), "version": row.record.version}
        parts = [f"{name}={quote(value, safe='') or '__HIVE_DEFAULT_PARTITION__'}" for name, value in values.items()]
        return self._root.joinpath(*parts)

    def _commit(self, folder: Path, rows: Sequence[Row]) -> None:
        """Write rows of one partition and spec, except those that another file has."""
        written = self._written(rows)
        with self._locked():
            known = self._known(folder, rows)
            fresh = [row for row in rows if row.stream_id.decode() not in known]
            self._report.already_there += len(rows) - len(fresh)
            if not fresh:
                return
            if len(fresh) < len(rows):
                written = self._written(fresh)
            _make(folder, self._root)
            name = f"{fresh[0].stream_id.decode()}_{fresh[-1].stream_id.decode()}.parquet"
            os.rename(written, folder / name)
            sync(folder)
        self._report.written += len(fresh)
        self._report.files += 1

    def _written(self, rows: Sequence[Row]) -> Path:
        """Write a file where nobody looks, through to the disk."""
        path = self._scratch / "unfinished"
        metadata = {"surefoot.policy": self._report.policy, "surefoot.version": rows[0].record.version}
        with path.open("wb") as file:
            pq.write_table(table(rows, metadata), file, compression="zstd")
            file.flush()
            os.fsync(file.fileno())
        return path

    def _known(self, folder: Path, rows: Sequence[Row]) -> frozenset[str]:
        """Ids in files of the partition whose span overlaps that of the rows."""
        low, high = parse_id(rows[0].stream_id), parse_id(rows[-1].stream_id)
        found = [path for path, first, last in _spans(folder) if first <= high and low <= last]
        return frozenset().union(*map(self._ids_of, found))

    def _ids_of(self, path: Path) -> frozenset[str]:
        if path not in self._ids:
            column = pq.read_table(path, columns=["stream_id"], partitioning=None)["stream_id"]
            self._ids[path] = frozenset(column.to_pylist())
        self._ids.move_to_end(path)
        if len(self._ids) > _FILES_KNOWN:
            self._ids.popitem(last=False)
        return self._ids[path]

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(self._lock, fcntl.LOCK_UN)

    def _remove_what_the_dead_left(self) -> None:
        """Remove unfinished files whose writer is gone: the lock on their folder went with it."""
        for folder in (self._root / _OWN).iterdir():
            if folder.is_dir() and _is_abandoned(folder):
                shutil.rmtree(folder, ignore_errors=True)


def _spans(folder: Path) -> Iterator[tuple[Path, StreamId, StreamId]]:
    if not folder.exists():
        return
    for entry in os.scandir(folder):
        if match := _NAME.fullmatch(entry.name):
            yield Path(entry.path), parse_id(match[1].encode()), parse_id(match[2].encode())


def _is_abandoned(folder: Path) -> bool:
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    finally:
        os.close(handle)
    return True


def _make(folder: Path, root: Path) -> None:
    """Make a folder, and have it survive a power loss."""
    missing = [each for each in (folder, *folder.parents) if each.is_relative_to(root) and not each.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for each in missing:
        sync(each.parent)
