"""What the shipper and the join say to each other: one call, and its possible answers. Values only.

Duty: the words that `service/shipper.py` and `service/redis_streams.py` share, so that neither imports the other.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Confirm:
    """Who must have a call's events on disk before they count as recorded, and how long to wait for that."""

    replicas: int
    wait_s: float


@dataclass(frozen=True, slots=True)
class Acks:
    """Who has everything up to a call. `by`: on disk (`waitaof`), in memory (`wait`), or nobody could be asked."""

    enough: bool
    local: int
    replicas: int
    by: Literal["waitaof", "wait", "none"]
    detail: str = ""


@dataclass(frozen=True, slots=True)
class ShipCall:
    """One call of the join: `count` events of one lane from `first_seq` on, or a heartbeat with none."""

    policy: str
    producer: str
    epoch: int
    first_seq: int
    count: int
    through_ms: int
    now_ms: int
    force: bool = False  # first_seq is right although it lies beyond what Redis has: the hole is known
    bye: bool = False  # nothing more comes from this lane
    blobs: tuple[bytes, ...] = ()
    confirm: Confirm | None = None  # None: nobody waits for replicas


@dataclass(frozen=True, slots=True)
class Shipped:
    """Everything up to `last` is applied; verdicts are those on the rewards of this call, by seq.

    `acks` answers `ShipCall.confirm`: when they are enough, everything up to `last` is confirmed, whichever call
    brought it.
    """

    last: int
    verdicts: tuple[tuple[int, str], ...] = ()
    acks: Acks | None = None
    more: bool = False  # the join has deadlines left to work off: call again soon


@dataclass(frozen=True, slots=True)
class Gap:
    """Nothing was applied: Redis has only what is up to `last`."""

    last: int


class Refused(Exception):
    """Redis will not take just these events, now or later."""
