"""Repair a damaged SQLite write-ahead log, so that one bad byte costs one row and not all that follow.

Duty: make every whole frame of a `-wal` file readable again. Knows nothing of rows: what a frame holds is judged later
by the row's own checksum.
Strategy: SQLite's frame checksums are a running sum, and recovery stops at the first that does not fit; every frame
behind it would be dropped although it is intact. Spool files are never checkpointed, so a log holds one generation of
frames in order, and recomputing header and checksums is all it takes. Format: sqlite.org/fileformat2.html section 4.
Promise: an intact log is only read; a log is rewritten in place, never shortened; a commit that never finished stays
unfinished.
"""

from __future__ import annotations

import os
import struct
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

PAGE = 4096
_HEADER = 32
_FRAME = 24 + PAGE
_MAGIC = 0x377F0682  # checksums over little-endian words
_VERSION = 3_007_000
_DATABASE_MAGIC = b"SQLite format 3\0"
_CHUNK = 1024  # frames summed at once: 4 MiB
_M32 = 0xFFFFFFFF

_Words = npt.NDArray[np.uint32]
_Sum = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Salvage:
    """What was found: whole frames, commits, whether there was damage, whether bytes lie behind the last commit."""

    frames: int
    commits: int
    repaired: bool
    torn_tail: bool


def salvage(database: Path) -> Salvage:
    """Check the log of `database`, and repair it where it is damaged. Nobody may have the database open."""
    log = database.with_name(database.name + "-wal")
    size = log.stat().st_size if log.exists() else 0
    count = max(0, size - _HEADER) // _FRAME
    if not count:
        return Salvage(0, 0, False, size > _HEADER)
    frames = np.memmap(log, np.uint8, "r+", _HEADER, (count, _FRAME))
    try:
        commits = np.flatnonzero(frames[:, 4:8].any(axis=1))
        salt = Counter(bytes(row) for row in frames[:, 8:16]).most_common(1)[0][0]
        header = _header(salt)
        sums = _running_sums(frames, struct.unpack_from(">II", header, 24))
        intact = bool((frames[:, 16:24] == sums).all()) and log.open("rb").read(_HEADER) == header
        if not intact:
            frames[~frames[:, :4].any(axis=1), :4] = 0x7F  # page 0 would end SQLite's recovery; no one reads this one
            frames[:, 8:16] = np.frombuffer(salt, np.uint8)
            frames[:, 16:24] = _running_sums(frames, struct.unpack_from(">II", header, 24))
            frames.flush()
            _overwrite(log, header)
        _restore_first_page(database, frames)
        last = int(commits[-1]) + 1 if len(commits) else 0
        return Salvage(count, len(commits), not intact, _HEADER + last * _FRAME < size)
    finally:
        del frames


def _header(salt: bytes) -> bytes:
    """Build the log's header: all but the salt is the same for every spool file."""
    start = struct.pack(">IIII", _MAGIC, _VERSION, PAGE, 0) + salt
    total = (0, 0)
    for low, high in struct.iter_unpack("<II", start):
        total = _step(total, low, high)
    return start + struct.pack(">II", *total)


def _step(total: _Sum, low: int, high: int) -> _Sum:
    first = (total[0] + low + total[1]) & _M32
    return first, (total[1] + high + first) & _M32


def _running_sums(frames: npt.NDArray[np.uint8], start: _Sum) -> npt.NDArray[np.uint8]:
    """Compute the checksum that each frame should carry, big-endian, shape (frames, 8).

    A step of the sum is linear, so each frame's own share is computed from zero for many frames at once, and the
    shares are chained by the matrix of one frame's steps: M = [[1, 1], [1, 2]] to the power of its word pairs.
    """
    pairs = 1 + PAGE // 8
    (a, b), (c, d) = _power(pairs)
    out = np.empty((len(frames), 2), np.uint32)
    first, second = start
    for begin in range(0, len(frames), _CHUNK):
        block = frames[begin : begin + _CHUNK]
        words = np.concatenate([block[:, :8], block[:, 24:]], axis=1).view("<u4").T.copy()
        low, high = _shares(words)
        for k in range(len(block)):
            first, second = (
                (a * first + b * second + int(low[k])) & _M32,
                (c * first + d * second + int(high[k])) & _M32,
            )
            out[begin + k] = first, second
    return out.astype(">u4").view(np.uint8).reshape(len(frames), 8)


def _shares(words: _Words) -> tuple[_Words, _Words]:
    low = np.zeros(words.shape[1], np.uint32)
    high = np.zeros(words.shape[1], np.uint32)
    for k in range(0, len(words), 2):  # uint32 arithmetic wraps, as the format wants
        low += words[k] + high
        high += words[k + 1] + low
    return low, high


def _power(exponent: int) -> tuple[_Sum, _Sum]:
    a, b, c, d = 1, 0, 0, 1
    for _ in range(exponent):
        a, b, c, d = (a + c) & _M32, (b + d) & _M32, (a + 2 * c) & _M32, (b + 2 * d) & _M32
    return (a, b), (c, d)


def _restore_first_page(database: Path, frames: npt.NDArray[np.uint8]) -> None:
    """Give a database whose own first page is damaged the one from the log; without it SQLite discards the log."""
    with database.open("rb") as file:
        sound = file.read(PAGE)
    if len(sound) == PAGE and sound.startswith(_DATABASE_MAGIC):
        return
    for frame in frames:
        if bytes(frame[:4]) == b"\0\0\0\1" and bytes(frame[24:40]) == _DATABASE_MAGIC:
            _overwrite(database, bytes(frame[24:]))
            return


def _overwrite(path: Path, start: bytes) -> None:
    descriptor = os.open(path, os.O_WRONLY)
    try:
        os.pwrite(descriptor, start, 0)
    finally:
        os.close(descriptor)
