"""From an entry of the transitions stream to what a rollout counts. Pure.

Duty: the fields of a closed decision that guards look at. It knows no unit and no guard.
Strategy: a decision is a fault where the version that was assigned did not answer: its network failed, its breaker was
open, or nothing of what it does passed the check. It fell back where anything else than its own choice was executed,
also when the champion or the baseline stood in.
"""

from __future__ import annotations

from typing import Any, Final

import msgspec

from policies.deployment import RouteBy
from policies.route import unit_of
from shadow.units import Outcome

FAULTS: Final = frozenset(
    {"inference_failed", "inference_timeout", "session_reopening", "not_finite", "breaker_open", "check_failed"}
)
ENDED: Final = (b"terminated", b"truncated")


class Told(msgspec.Struct, frozen=True):
    """What is read of a record (`service.decision.Record`)."""

    assigned_version: str
    version: str
    generation: int
    weight: float = 1.0
    key: str | None = None
    overridden: bool = False
    fallback: str | None = None
    stand_in: str | None = None
    propensity_reason: str | None = None
    slow: bool = False
    pinned: int = 0


_told = msgspec.msgpack.Decoder(Told)


def outcome(fields: list[Any], route_by: RouteBy | None) -> Outcome:
    """Read an entry: decision, episode, event time, reward, join state, end, record."""
    decision, episode, at_ms, reward, join, end, raw = fields
    record = _told.decode(raw)
    name, lasting = decision.decode(), episode.decode()
    reason = (record.stand_in or record.fallback or record.propensity_reason or "").partition(":")[0]
    return Outcome(
        unit=unit_of(route_by, record.key, lasting or None, name),
        id=name,
        at_ms=int(at_ms),
        assigned=record.assigned_version,
        weight=record.weight,
        generation=record.pinned or record.generation,
        episode=lasting,
        reward=float(reward) if join == b"joined" else None,
        quarantined=join == b"quarantined",
        void=join == b"void",
        overridden=record.overridden,
        fallback=record.fallback is not None or record.stand_in is not None,
        error=reason in FAULTS,
        slow=record.slow,
        ended=end in ENDED,
    )
