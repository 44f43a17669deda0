"""Rows that Redis refuses to take, kept aside so that they neither stop the others nor vanish.

Duty: one small SQLite file in the slot, `rejected.db`; nothing reads it but a person. Knows nothing of why.
Promise: a row is here before it is stepped over, once however often it is met.
"""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

from service.spool_file import Row


def set_aside(slot: Path, producer: str, epoch: int, row: Row, reason: str) -> None:
    """Keep a refused row. Raises sqlite3.Error when it cannot be kept."""
    with closing(sqlite3.connect(slot / "rejected.db", isolation_level=None)) as database:
        database.execute(
            "CREATE TABLE IF NOT EXISTS rejected (producer TEXT, epoch INTEGER, policy TEXT, first_seq INTEGER, "
            "count INTEGER, at_ms INTEGER, reason TEXT, blob BLOB, PRIMARY KEY (producer, epoch, policy, first_seq))"
        )
        database.execute(
            "INSERT OR IGNORE INTO rejected VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
            (producer, epoch, row.policy, row.first_seq, row.count, row.at_ms, reason, row.blob),
        )
