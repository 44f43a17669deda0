"""Tell whether a spool file is as it was written, by the checksums of its SQLite write-ahead log.

Duty: check every whole frame of a `-wal` file, quickly. Knows nothing of rows.
Strategy: SQLite's frame checksums are a running sum, and SQLite silently drops everything behind the first that does
not fit: one bad byte would cost all that follows. Spool files are never checkpointed, so a log holds one generation
of frames, all of which must fit. Format: sqlite.org/fileformat2.html section 4.
Promise: only reads; damage in the log or in the database's own header is found, a torn tail is told from damage.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from service.carve import FRAME, HEADER, PAGE

DATABASE_MAGIC = b"SQLite format 3\0"
_MAGIC = 0x377F0682  # checksums over little-endian words
_CHUNK = 1024  # frames summed at once: 4 MiB
_M32 = 0xFFFFFFFF

_Words = npt.NDArray[np.uint32]
_Frames = npt.NDArray[np.uint8]
_Sum = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Health:
    """`empty`: nothing was ever committed. `torn_tail`: bytes lie behind the last commit. Neither is damage."""

    damaged: bool
    empty: bool = False
    torn_tail: bool = False


def log_of(database: Path) -> Path:
    return database.with_name(database.name + "-wal")


def examine(database: Path) -> Health:
    """Check a database file and its log. Nobody may be writing to it."""
    with database.open("rb") as file:
        page = file.read(PAGE)
    log = log_of(database)
    size = log.stat().st_size if log.exists() else 0
    if size <= HEADER:
        whole = database.stat().st_size
        return Health(damaged=page[:16] != DATABASE_MAGIC[: len(page)], empty=whole <= PAGE)
    count = (size - HEADER) // FRAME
    if not count:
        return Health(damaged=False, empty=True, torn_tail=True)
    frames = np.memmap(log, np.uint8, "r", HEADER, (count, FRAME))
    try:
        damaged = not (len(page) == PAGE and page.startswith(DATABASE_MAGIC) and _fits(log, frames))
        commits = np.flatnonzero(frames[:, 4:8].any(axis=1))
        last = int(commits[-1]) + 1 if len(commits) else 0
        return Health(damaged, not last and not damaged, HEADER + last * FRAME < size)
    finally:
        del frames


def _fits(log: Path, frames: _Frames) -> bool:
    """Whether header, salts and checksums of all frames belong together."""
    with log.open("rb") as file:
        header = file.read(HEADER)
    total = (0, 0)
    for low, high in struct.iter_unpack("<II", header[:24]):
        total = _step(total, low, high)
    if int.from_bytes(header[:4], "big") != _MAGIC or struct.unpack(">II", header[24:]) != total:
        return False
    salts = frames[:, 8:16] == np.frombuffer(header[16:24], np.uint8)
    return bool(salts.all()) and bool((frames[:, 16:24] == _running_sums(frames, total)).all())


def _step(total: _Sum, low: int, high: int) -> _Sum:
    first = (total[0] + low + total[1]) & _M32
    return first, (total[1] + high + first) & _M32


def _running_sums(frames: _Frames, start: _Sum) -> _Frames:
    """Compute the checksum that each frame should carry, big-endian, shape (frames, 8).

    A step of the sum is linear, so each frame's own share is computed from zero for many frames at once, and the
    shares are chained by the matrix of one frame's steps: M = [[1, 1], [1, 2]] to the power of its word pairs.
    """
    (a, b), (c, d) = _power(1 + PAGE // 8)
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
