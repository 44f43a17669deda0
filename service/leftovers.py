"""What a slot keeps for a person to look at: damaged spool files and rows that Redis refused. Old ones are deleted.

Duty: find such files in one slot's folder, and delete what is too old or too much. The caller holds the slot. Knows
nothing of what is in them.
Strategy: by the time a file was last written, oldest first. Deleted files are counted and logged one by one.
Promise: a file of the spool itself is never touched.
"""

from __future__ import annotations

from pathlib import Path

import structlog

# As long as design section 10 keeps a stream that nobody reads: whoever has not looked by then will not.
KEEP_S = 7 * 86_400.0
# As much as the spool keeps of shipped rows, so that a slot takes twice that at most, its unshipped rows left out.
KEEP_BYTES = 256 << 20
# `*.db.rebuilt` is a draft that a worker was killed over; the next rebuilding writes it anew.
PATTERNS = ("*.corrupt", "rejected*.db", "*.db.rebuilt")

log = structlog.get_logger(__name__)


def discard(folder: Path, now_ms: int, *, keep_s: float = KEEP_S, keep_bytes: int = KEEP_BYTES) -> int:
    """Delete leftovers that are older than `keep_s`, and the oldest beyond `keep_bytes`. Return how many."""
    found = [(path.stat(), path) for pattern in PATTERNS for path in folder.glob(pattern)]
    size = sum(stat.st_size for stat, _ in found)
    deleted = 0
    for stat, path in sorted(found, key=lambda each: (each[0].st_mtime_ns, each[1])):
        age_s = now_ms / 1000 - stat.st_mtime
        if age_s <= keep_s and size <= keep_bytes:
            continue
        path.unlink(missing_ok=True)
        size -= stat.st_size
        deleted += 1
        log.warning("leftover_deleted", file=path.name, slot=folder.name, bytes=stat.st_size, age_s=round(age_s))
    return deleted
