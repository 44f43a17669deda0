"""Which producer this worker is: slots in the data directory, one per running worker.

Duty: give each worker the first free slot (`flock`, so that a dead worker's slot is free at once), its producer name
and its epoch, and tell which other slots lie free. Knows nothing of rows, SQLite or Redis.
Promise: no two running workers hold one slot; a slot's epoch grows at every taking, so that (producer, epoch, seq)
never names two events.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import secrets
import time
from pathlib import Path

from policies.errors import ConfigError

MAX_SLOTS = 1024
SPOOL_FILE = re.compile(r"^(\d+)-(\d+)\.db$")
_HOST = re.compile(r"^[0-9a-f]{8}$")


class Slot:
    """One locked slot. `producer` and `epoch` name whoever took it; a slot held for adoption has epoch 0."""

    def __init__(self, path: Path, number: int, producer: str, epoch: int, lock: int) -> None:
        self.path = path
        self.number = number
        self.producer = producer
        self.epoch = epoch
        self._lock = lock

    def release(self) -> None:
        """Let another worker have the slot. Safe to call twice."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def epochs(self) -> dict[int, list[Path]]:
        """List the spool files here by the epoch that wrote them, each epoch's in writing order."""
        found: dict[int, list[tuple[int, Path]]] = {}
        for path in self.path.iterdir():
            if match := SPOOL_FILE.match(path.name):
                found.setdefault(int(match[1]), []).append((int(match[2]), path))
        return {epoch: [path for _, path in sorted(files)] for epoch, files in sorted(found.items())}


def take_slot(data_dir: Path) -> Slot:
    """Take the first free slot for a new worker, and begin its next epoch. Raises ConfigError when all are taken."""
    host = host_id(data_dir)
    for number in range(MAX_SLOTS):
        path = _slot_path(data_dir, number)
        fresh = not path.exists()
        path.mkdir(parents=True, exist_ok=True)
        lock = _try_lock(path)
        if lock is not None:
            return Slot(path, number, f"{host}.{number}", _next_epoch(path, fresh), lock)
    raise ConfigError(f"all {MAX_SLOTS} slots of {data_dir} are taken", "SUREFOOT_DATA_DIR")


def hold_free_slot(data_dir: Path, number: int) -> Slot | None:
    """Lock a slot that nobody runs in, to ship what lies there. None: somebody runs in it, or it does not exist."""
    path = _slot_path(data_dir, number)
    lock = _try_lock(path) if path.is_dir() else None
    return None if lock is None else Slot(path, number, f"{host_id(data_dir)}.{number}", 0, lock)


def abandoned_slots(data_dir: Path) -> set[int]:
    """Name the slots that hold spool files and that nobody runs in, at this moment."""
    found = set()
    for path in (data_dir / "spool").glob("slot-*"):
        number = path.name.removeprefix("slot-")
        if number.isdigit() and (slot := hold_free_slot(data_dir, int(number))):
            if slot.epochs():
                found.add(slot.number)
            slot.release()
    return found


def _slot_path(data_dir: Path, number: int) -> Path:
    return data_dir / "spool" / f"slot-{number}"


def _try_lock(path: Path) -> int | None:
    lock = os.open(path / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(lock)
        return None
    return lock


def host_id(data_dir: Path) -> str:
    """Read this data directory's id, or make it. A link never overwrites, so racing workers agree on one."""
    path = data_dir / "producer"
    if not path.exists():
        data_dir.mkdir(parents=True, exist_ok=True)
        draft = path.with_name(f"producer.{os.getpid()}.{secrets.token_hex(4)}")
        _write_durably(draft, secrets.token_hex(4))
        with contextlib.suppress(FileExistsError):
            os.link(draft, path)
        draft.unlink()
    host = path.read_text(errors="replace").strip()
    if not _HOST.match(host):
        raise ConfigError(f"{path} is damaged: it should hold 8 hex digits; deleting it starts a new producer")
    return host


def _next_epoch(path: Path, fresh: bool) -> int:
    """Persist and return the epoch after the last one.

    When the number is gone from a slot that was used before, the seconds since 1970 stand in: far above any count of
    restarts. An epoch used twice would make the join take new events for old ones and skip them.
    """
    file = path / "epoch"
    try:
        epoch = int(file.read_text()) + 1
    except FileNotFoundError:
        epoch = 1 if fresh else int(time.time())
    except ValueError:
        epoch = int(time.time())
    draft = file.with_suffix(".new")
    _write_durably(draft, str(epoch))
    draft.replace(file)
    return epoch


def _write_durably(path: Path, text: str) -> None:
    # A power loss that took the epoch back would make the join skip events: these two small files are worth an fsync.
    with path.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
