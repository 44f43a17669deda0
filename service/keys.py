"""Where the signing keys come from: the setting, else one made once in Redis and kept in a snapshot on disk.

Strategy: Redis decides between replicas that start together (SET NX); the snapshot lets a replica start while Redis is
away. When both exist, Redis wins, and its key is the one that signs.
"""

from __future__ import annotations

import os
import secrets
from pathlib import Path
from typing import Protocol

import structlog

from policies.errors import StoreAway
from service.ids import KEY_BYTES, Keyring

log = structlog.get_logger(__name__)
SNAPSHOT = "keyring"


class KeyStore(Protocol):
    async def keyring(self, candidate: str) -> str:
        """Store the candidate if there is no keyring yet; give the one that stands."""


async def obtain_keyring(setting: str | None, store: KeyStore, data_dir: Path) -> Keyring | None:
    """Get the keyring, or None while neither Redis nor a snapshot has one. Raises ConfigError for a bad setting."""
    if setting:
        return Keyring.parse(setting)
    snapshot = data_dir / SNAPSHOT
    kept = snapshot.read_text().strip() if snapshot.exists() else None
    try:
        stands = await store.keyring(kept or f"0:{secrets.token_hex(KEY_BYTES)}")
    except StoreAway:
        if kept is None:
            return None
        log.warning("keyring_from_snapshot", file=str(snapshot))
        return Keyring.parse(kept)
    if stands != kept:
        _write_private(snapshot, stands)
    return Keyring.parse(stands)


def _write_private(path: Path, text: str) -> None:
    """Replace a file in one step, readable by its owner alone."""
    fresh = path.with_name(f"{path.name}.{os.getpid()}.new")  # workers that start together write the same
    with os.fdopen(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    fresh.replace(path)
