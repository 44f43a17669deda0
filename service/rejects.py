"""Rows that Redis refuses to take, kept aside so that they neither stop the others nor vanish.

Duty: one small SQLite file in the slot, `rejected.db`; nothing reads it but a person. Knows nothing of why.
Strategy: a file that has grown is renamed and another begun, so that old ones can be deleted whole (`leftovers.py`).
Promise: a row is here before it is stepped over, once however often it is met in one file.
"""

from __future__ import annotations

import os
import sqlite3
from contextlib import closing
from pathlib import Path

from service.spool_file import Row

# Thousands of rows: more are not looked at one by one, and a sixteenth of what `leftovers.py` keeps.
ROTATE_BYTES = 16 << 20


def set_aside(
    slot: Path, producer: str, epoch: int, row: Row, reason: str, *, rotate_bytes: int = ROTATE_BYTES
) -> None:
    """Keep a refused row. Raises sqlite3.Error or OSError when it cannot be kept."""
    path = slot / "rejected.db"
    if path.exists() and (now := path.stat()).st_size >= rotate_bytes:
        os.replace(path, slot / f"rejected-{now.st_mtime_ns}.db")
    with closing(sqlite3.connect(path, isolation_level=None)) as database:
        database.execute(
            "CREATE TABLE IF NOT EXISTS rejected (producer TEXT, epoch INTEGER, policy TEXT, first_seq INTEGER, "
            "count INTEGER, at_ms INTEGER, reason TEXT, blob BLOB, PRIMARY KEY (producer, epoch, policy, first_seq))"
        )
        database.execute(
            "INSERT OR IGNORE INTO rejected VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
            (producer, epoch, row.policy, row.first_seq, row.count, row.at_ms, reason, row.blob),
        )
