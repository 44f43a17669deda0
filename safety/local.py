"""Limits of scope `local`: kept in this replica's memory alone. Pure: time is an argument.

Duty: reserve for a row and settle it, without asking anybody. Each of R replicas counts for itself, so together they
may execute R times a limit; a replica that starts anew has forgotten everything. Within one, nothing is exceeded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from safety.limits import Entry, LimitSet
from safety.past import UNKNOWN, Past, Pasts

NO_ROOM: Final = -1


@dataclass(frozen=True, slots=True)
class LocalRoom:
    """What memory says about one row. rooms: by rule. previous: as `Past.previous` gives it. order: for `settle`."""

    rooms: Mapping[str, int]
    previous: str = UNKNOWN
    order: int = 0


class LocalLimits:
    """What one replica remembers of one policy."""

    def __init__(self, capacity: int, hold_ms: int) -> None:
        self._hold_ms = hold_ms
        self._pasts = Pasts(capacity)
        self._whole = Past()

    def __len__(self) -> int:
        return len(self._pasts)

    def configure(self, limits: LimitSet) -> None:
        """Expect other limits. Keys are kept for as long as any limit so far needs them."""
        longest = max((each.window_ms for each in limits.local), default=0)
        self._pasts.lasts_ms = max(self._pasts.lasts_ms, longest + self._hold_ms)

    def reserve(
        self, limits: LimitSet, name: str, key: str | None, entries: Mapping[str, Entry], now_ms: int
    ) -> LocalRoom:
        """Hold the most that a row may come to. entries: by rule."""
        past = self._past(limits, key, now_ms)
        if limits.local:
            self._whole.turn(now_ms)
        remembers = limits.remembers == "local"
        previous = UNKNOWN if past is None else past.previous()
        rooms = {each.name: NO_ROOM for each in limits.local}
        order = 0
        for owner, per in ((past, "key"), (self._whole, "policy")):
            if owner is not None:
                own = [each for each in limits.local if each.per == per]
                rooms |= {each.name: owner.room(each, now_ms) for each in own}
                amounts = {each.field: each.worst(rooms[each.name], entries[each.name]) for each in own}
                held = {field: amount for field, amount in amounts.items() if amount}
                order += owner.hold(name, now_ms + self._hold_ms, held, remembers and per == "key")
        return LocalRoom(rooms, previous, order)

    def settle(
        self,
        limits: LimitSet,
        name: str,
        key: str | None,
        order: int,
        action: Sequence[float] | None,
        text: str,
        now_ms: int,
    ) -> None:
        """Replace what a row held by what it executed. text: the action's, "" for none."""
        charged = {each: each.charge(action) for each in limits.local}
        by_policy = {limit: amount for limit, amount in charged.items() if amount and limit.per == "policy"}
        by_key = {limit: amount for limit, amount in charged.items() if amount and limit.per == "key"}
        self._whole.settle(name, now_ms, by_policy, 0, "")
        remembered = text if limits.remembers == "local" else ""
        past = self._past(limits, key, now_ms)
        if past is not None:
            past.settle(name, now_ms, by_key, order, remembered)
        elif key is not None and (by_key or remembered):
            self._pasts.missed(now_ms)

    def _past(self, limits: LimitSet, key: str | None, now_ms: int) -> Past | None:
        needed = limits.remembers == "local" or any(each.per == "key" for each in limits.local)
        return self._pasts.of(key, now_ms) if needed and key is not None else None
