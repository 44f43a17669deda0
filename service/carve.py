"""Find rows in the pages of a damaged SQLite log, without trusting anything that points from page to page.

Duty: read table leaves and overflow chains out of `-wal` frames, by the file format (sqlite.org/fileformat2.html,
sections 1.5, 1.6, 2.1 and 4). Knows nothing of what the columns mean: whoever calls checks each row.
Strategy: spool files only ever grow, so every version of a leaf that was written holds rows as good as the last one's;
all frames are read, the newest first, and a caller takes the first sound copy of each row.
Promise: any bytes at all give some rows or none; never an error.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

PAGE = 4096
HEADER = 32
FRAME = 24 + PAGE
_LEAF = 0x0D
_MAX_LOCAL = PAGE - 35
_MIN_LOCAL = (PAGE - 12) * 32 // 255 - 23
_INT_SIZES = {1: 1, 2: 2, 3: 3, 4: 4, 5: 6, 6: 8}

Column = int | bytes | None


def carve(log: Path, columns: int) -> Iterator[tuple[int, tuple[Column, ...]]]:
    """Yield (rowid, columns) of everything that looks like a row with that many columns, the newest copies first."""
    data = log.read_bytes()
    frames = [data[at + 24 : at + FRAME] for at in range(HEADER, len(data) - FRAME + 1, FRAME)]
    numbers = [int.from_bytes(data[at : at + 4], "big") for at in range(HEADER, len(data) - FRAME + 1, FRAME)]
    latest = dict(zip(numbers, frames, strict=True))
    for page in reversed(frames):
        if page[0] == _LEAF:
            for rowid, payload in _cells(page, latest):
                values = _values(payload)
                if values is not None and len(values) == columns:
                    yield rowid, values


def _cells(page: bytes, latest: dict[int, bytes]) -> Iterator[tuple[int, bytes]]:
    count = min(int.from_bytes(page[3:5], "big"), PAGE // 4)
    for k in range(count):
        at = int.from_bytes(page[8 + 2 * k : 10 + 2 * k], "big")
        size, at = _varint(page, at)
        rowid, at = _varint(page, at)
        local = _local(size)
        payload = page[at : at + local]
        if local < size:
            payload += _overflow(int.from_bytes(page[at + local : at + local + 4], "big"), size - local, latest)
        if len(payload) == size:
            yield rowid, payload


def _local(size: int) -> int:
    """How many bytes of a payload stand in the leaf itself."""
    if size <= _MAX_LOCAL:
        return size
    surplus = _MIN_LOCAL + (size - _MIN_LOCAL) % (PAGE - 4)
    return surplus if surplus <= _MAX_LOCAL else _MIN_LOCAL


def _overflow(number: int, size: int, latest: dict[int, bytes]) -> bytes:
    parts = []
    while size > 0 and (page := latest.get(number)) is not None:
        parts.append(page[4 : 4 + size])
        size -= PAGE - 4
        number = int.from_bytes(page[:4], "big")
    return b"".join(parts)


def _values(payload: bytes) -> tuple[Column, ...] | None:
    """Decode a record; None when its header makes no sense."""
    end, at = _varint(payload, 0)
    body = end
    values: list[Column] = []
    while at < end <= len(payload):
        kind, at = _varint(payload, at)
        if kind == 0:
            values.append(None)
        elif kind in (8, 9):
            values.append(kind - 8)
        elif kind in _INT_SIZES:
            values.append(int.from_bytes(payload[body : body + _INT_SIZES[kind]], "big", signed=True))
            body += _INT_SIZES[kind]
        elif kind >= 12:
            values.append(payload[body : body + (kind - 12) // 2])
            body += (kind - 12) // 2
        else:
            return None
    return tuple(values) if body == len(payload) else None


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """Read SQLite's variable-length integer: seven bits a byte, the ninth byte whole."""
    value = 0
    for byte in data[at : at + 8]:
        at += 1
        value = value << 7 | byte & 0x7F
        if byte < 0x80:
            return value, at
    return value << 8 | (data[at] if at < len(data) else 0), at + 1
