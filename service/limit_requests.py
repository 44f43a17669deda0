"""Rows that ask Redis for room, and its answers, as `limit_calls.py` carries them."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

from safety.limits import Limit, LimitSet


@dataclass(frozen=True, slots=True)
class Room:
    """Redis's answer for one row. rooms: of each keyed limit, then of each strict one."""

    order: int
    previous: str
    rooms: list[int]


@dataclass(frozen=True, slots=True)
class Asked:
    """What came of a request. rooms: None: no answer in time. sent: Redis may have reserved all the same."""

    rooms: list[Room] | None
    sent: bool
    sent_s: float


@dataclass(slots=True, eq=False)
class Request:
    limits: LimitSet
    rows: list[list[object]]
    keys: list[str]
    future: asyncio.Future[list[Room] | None]
    sent_s: float = float("-inf")
    sent: bool = False


def together(requests: Sequence[Request]) -> list[Request]:
    """Requests that one call can carry: by one set of limits, and no key twice."""
    chosen: list[Request] = []
    keys: set[str] = set()
    for each in requests:
        own = {key for key in each.keys if key}
        if each.limits is requests[0].limits and keys.isdisjoint(own):
            chosen.append(each)
            keys |= own
    return chosen


def described(limit: Limit) -> list[object]:
    """A limit as `limits.lua` reads it."""
    return [limit.field, limit.window_ms, limit.cap, [number for level in limit.levels for number in level]]
