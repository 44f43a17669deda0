"""EDGE: the audit log on a replica's disk: statements before they have a place, the chain as it was read back.

    audit/chain-0.jsonl          the chain, entry for entry, as all replicas have it
    audit/open/<segment>.jsonl   what one life of a worker has stated; goes when all of it stands in the chain
    audit/fork-<seq>-<hash>.jsonl, broken-<seq>-<time>.jsonl     what was set aside; stays until a person removes it

Duty: append with fsync, read back, set aside. It decides nothing and knows no Redis. Synchronous: call it from a
thread.
Strategy: a statement is written twice, as an intent before the change and as done after it: one that was not done when
its process ended is `unknown`. A lock on each file says that its worker lives.
Promise: what `append` has returned from survives power loss; a line cut off by it is dropped, and was never answered.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path

import msgspec
import structlog

from policies.errors import ConfigError
from service.audit import Broken, Entry, Head, Statement, check, line_of

log = structlog.get_logger(__name__)

MAX_WORKERS = 1024
OPEN = "open"


class Line(msgspec.Struct, frozen=True, omit_defaults=True):
    """A line of a segment: one of both."""

    intent: Statement | None = None
    done: Statement | None = None


class Segment:
    """The statements of one life of a worker. There is no file before the first."""

    def __init__(self, folder: Path, name: str) -> None:
        self.name = name
        self.path = folder / OPEN / f"{name}.jsonl"
        self._file = -1
        self._torn = False

    def append(self, lines: Sequence[Line]) -> None:
        """Write lines and wait for the disk. Raises OSError; what was written then is not believed by readers."""
        if self._file < 0:
            self._file = _open_locked(self.path)
        raw = (b"\n" if self._torn else b"") + b"".join(line_of(line) + b"\n" for line in lines)
        self._torn = True
        _write(self._file, raw)
        self._torn = False

    def close(self, *, remove: bool) -> None:
        """Close the file; remove it when all of it stands in the chain."""
        if self._file >= 0:
            if remove:
                self.path.unlink(missing_ok=True)
            os.close(self._file)
            self._file = -1


def leftovers(folder: Path) -> dict[Path, list[Statement]]:
    """Read the segments whose workers are gone, and what was set aside at a fork."""
    found = {}
    for path in sorted((folder / OPEN).glob("*.jsonl")):
        if _is_free(path):
            found[path] = read_segment(path)
    for path in sorted(folder.glob("fork-*.jsonl")):
        found[path] = [statement_of(line) for line in _lines(path)]
    return found


def read_segment(path: Path) -> list[Statement]:
    """Read a segment's statements in their order; intents without an end have the outcome `unknown`."""
    found: dict[int, Statement] = {}
    for raw in path.read_bytes().split(b"\n"):
        if raw:
            try:
                line = msgspec.json.decode(raw, type=Line)
            except msgspec.DecodeError:
                log.warning("audit_line_torn", segment=path.stem)
                continue
            statement = line.done or line.intent
            if statement is not None:
                found[statement.number] = statement
    return [found[number] for number in sorted(found)]


def statement_of(line: bytes) -> Statement:
    """Read what an entry states, without its place."""
    return msgspec.json.decode(line, type=Statement)


def key_of(line: bytes) -> tuple[str, int]:
    """Read which statement an entry holds."""
    statement = statement_of(line)
    return statement.segment, statement.number


class Mirror:
    """A replica's copy of the chain. Use from one thread at a time."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path, self._file = _take(folder)
        self.head = Head()
        self.broken: Broken | None = None  # what was found at the start

    def load(self) -> None:
        """Verify the file and find its head. What is wrong is set aside, from the first bad entry on."""
        _cut_torn_end(self._file, self.path)
        size = 0
        try:
            for line in _lines(self.path):
                self.head = check(line, self.head)
                size += len(line) + 1
        except Broken as broken:
            self.broken = broken
            whole = self.folder / f"broken-{broken.seq}-{time.time_ns() // 1_000_000}.jsonl"
            whole.write_bytes(self.path.read_bytes())
            os.ftruncate(self._file, size)
            log.error("audit_file_broken", seq=broken.seq, reason=broken.reason, kept=whole.name)

    def append(self, lines: Sequence[bytes], head: Head) -> None:
        """Add entries that were checked, but not twice: who asked before may have been cancelled. Raises OSError."""
        if self.head.seq != head.seq - len(lines):
            return
        size = os.fstat(self._file).st_size
        try:
            _write(self._file, b"".join(line + b"\n" for line in lines))
        except OSError:
            os.ftruncate(self._file, size)
            raise
        self.head = head

    def lines(self, after: int = 0, limit: int | None = None) -> Iterator[bytes]:
        """Give entries in their order, from the one after `after` on."""
        return islice(_lines(self.path), after, None if limit is None else after + limit)

    def hash_at(self, seq: int) -> str:
        """Give the hash of an entry that is there."""
        if seq == 0:
            return Head().hash
        (line,) = self.lines(seq - 1, 1)
        return msgspec.json.decode(line, type=Entry).hash

    def set_aside(self, common: int) -> list[Statement]:
        """Take the entries after `common` out of the chain, into a file of their own. Gives what they state."""
        tail, head = list(self.lines(common)), self.head
        aside = self.folder / f"fork-{common + 1}-{head.hash[:8]}.jsonl"
        file = _open(aside)
        _write(file, b"".join(line + b"\n" for line in tail))
        os.close(file)
        size = sum(len(line) + 1 for line in self.lines(0, common))
        self.head = Head(common, self.hash_at(common))
        os.ftruncate(self._file, size)
        os.fsync(self._file)
        return [statement_of(line) for line in tail]

    def close(self) -> None:
        os.close(self._file)


def read_lines(path: Path) -> Iterator[bytes]:
    """Give the lines of a file with a chain. Raises ConfigError when it cannot be read."""
    try:
        yield from _lines(path)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None


def keys_in(lines: Iterable[bytes]) -> Iterator[tuple[str, int]]:
    """Say which statements stand in a chain."""
    return map(key_of, lines)


def _take(folder: Path) -> tuple[Path, int]:
    """Open the first chain file that no living worker has."""
    for number in range(MAX_WORKERS):
        path = folder / f"chain-{number}.jsonl"
        file = _open(path)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(file)
            continue
        return path, file
    raise ConfigError(f"all {MAX_WORKERS} audit files of {folder} are taken", "SUREFOOT_DATA_DIR")


def _open(path: Path) -> int:
    path.parent.mkdir(parents=True, exist_ok=True)
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
    _sync(path.parent)  # the name must survive, too
    return file


def _open_locked(path: Path) -> int:
    """Make a file that is locked before others can find it: a worker that starts takes an unlocked one for left."""
    draft = path.with_suffix(".new")
    file = _open(draft)
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    draft.rename(path)
    _sync(path.parent)
    return file


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def _write(file: int, raw: bytes) -> None:
    while raw:
        raw = raw[os.write(file, raw) :]
    os.fsync(file)


def _lines(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        for line in file:
            yield line.rstrip(b"\n")


def _is_free(path: Path) -> bool:
    try:
        file = os.open(path, os.O_RDWR)
    except FileNotFoundError:  # its worker has ended it
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return os.fstat(file).st_nlink > 0  # else its worker has ended it, in between
    except OSError:
        return False
    finally:
        os.close(file)


def _cut_torn_end(file: int, path: Path) -> None:
    """Drop a last line without its end: the power went while it was written. Redis, or a segment, still has it."""
    raw = path.read_bytes()
    whole = raw.rfind(b"\n") + 1
    if whole < len(raw):
        log.warning("audit_line_torn", file=path.name, bytes=len(raw) - whole)
        os.ftruncate(file, whole)
