"""What the connected Redis is, as far as it tells, and what of that is too little for the durability asked for. Pure.

Duty: read the answer to INFO, and hold it against a tier. It knows nothing of connections, metrics or HTTP.
Promise: `weaknesses` names everything known to be too little, each by a word of a fixed set, with the value found where
there is one; what a server does not tell is no weakness.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

# From this version on there is WAITAOF; Valkey tells the Redis version that it is compatible with.
WAITAOF_SINCE = (7, 2)
NEARLY_FULL = 0.9
# An everysec server syncs once a second, its replica another second later, and says so within the next.
EVERYSEC_S = 2.0
REASONS = (
    "loading", "role", "maxmemory_policy", "memory_nearly_full", "aof_write_failing", "rdb_save_failing",
    "appendonly_off", "appendfsync", "too_few_replicas", "no_waitaof",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class StoreFacts:
    """None: the server does not tell."""

    version: str
    role: str
    loading: bool
    appendonly: bool | None
    appendfsync: str | None
    aof_last_write_ok: bool | None
    rdb_last_save_ok: bool | None
    maxmemory_policy: str | None
    maxmemory_bytes: int | None  # 0: no limit
    used_memory_bytes: int | None
    connected_replicas: int | None
    waitaof: bool | None  # whether it can say what is on disk; else replicas confirm from memory (WAIT)


class Weakness(NamedTuple):
    """`reason` is one of REASONS; `found` the value that is too little, "" where there is none to name."""

    reason: str
    found: str
    detail: str

    def __str__(self) -> str:
        return f"{self.reason}:{self.found}" if self.found else self.reason


def read_facts(info: Mapping[str, Any], appendfsync: str | None) -> StoreFacts:
    """Read the answer to INFO; appendfsync is a setting, which many servers do not tell."""
    compatible = _version(str(info.get("redis_version", "")))
    return StoreFacts(
        version=str(info.get("valkey_version") or info.get("redis_version") or "unknown"),
        role=str(info.get("role", "unknown")),
        loading=bool(info.get("loading")),
        appendonly=_flag(info.get("aof_enabled")),
        appendfsync=appendfsync,
        aof_last_write_ok=_ok(info.get("aof_last_write_status")),
        rdb_last_save_ok=_ok(info.get("rdb_last_bgsave_status")),
        maxmemory_policy=info.get("maxmemory_policy"),
        maxmemory_bytes=_number(info.get("maxmemory")),
        used_memory_bytes=_number(info.get("used_memory")),
        connected_replicas=_number(info.get("connected_slaves")),
        waitaof=None if compatible is None else compatible >= WAITAOF_SINCE,
    )


def weaknesses(facts: StoreFacts, tier: str, replicas: int = 1, timeout_s: float = 1.0) -> list[Weakness]:
    """Name what this server gives too little of. replicas, timeout_s: what tier `replicated` asks for."""
    found = _of_any(facts)
    if tier != "memory" and facts.appendonly is False:
        detail = "no append-only file: what its memory loses is sent again only while the spool keeps it"
        found.append(Weakness("appendonly_off", "", detail))
    if tier == "replicated":
        found += _of_replicated(facts, replicas, timeout_s)
    return found


def _of_any(facts: StoreFacts) -> list[Weakness]:
    policy, used, most = facts.maxmemory_policy, facts.used_memory_bytes or 0, facts.maxmemory_bytes or 0
    checks = (
        (facts.loading, Weakness("loading", "", "it is reading its file and takes no commands")),
        (facts.role not in ("master", "unknown"), Weakness("role", facts.role, "it is no primary and takes no writes")),
        (
            policy not in (None, "noeviction"),
            Weakness("maxmemory_policy", str(policy), "when full it deletes pending decisions: set it to noeviction"),
        ),
        (
            0 < most * NEARLY_FULL < used,
            Weakness("memory_nearly_full", "", f"{used >> 20} of {most >> 20} MiB are used; full, it takes nothing"),
        ),
        (
            facts.aof_last_write_ok is False,
            Weakness("aof_write_failing", "", "it cannot write its append-only file, and refuses writes"),
        ),
        (
            facts.rdb_last_save_ok is False,
            Weakness("rdb_save_failing", "", "its last snapshot failed; it may refuse writes until one succeeds"),
        ),
    )
    return [weakness for wrong, weakness in checks if wrong]


def _of_replicated(facts: StoreFacts, replicas: int, timeout_s: float) -> list[Weakness]:
    found = []
    connected = facts.connected_replicas
    if facts.waitaof is False:
        found.append(Weakness("no_waitaof", facts.version, "replicas confirm what is in their memory, not on disk"))
    if connected is not None and connected < replicas:
        detail = f"{connected} of {replicas} replicas are connected: nothing is confirmed"
        found.append(Weakness("too_few_replicas", str(connected), detail))
    if facts.appendfsync not in (None, "always") and timeout_s < EVERYSEC_S:
        detail = f"a confirmation takes longer than {timeout_s:g} s at times: set it to always"
        found.append(Weakness("appendfsync", str(facts.appendfsync), detail))
    return found


def _version(text: str) -> tuple[int, ...] | None:
    found = re.match(r"(\d+)\.(\d+)", text)
    return (int(found[1]), int(found[2])) if found else None


def _flag(value: object) -> bool | None:
    return None if value is None else bool(int(str(value)))


def _ok(value: object) -> bool | None:
    return None if value is None else str(value) == "ok"


def _number(value: object) -> int | None:
    return None if value is None else int(str(value))
