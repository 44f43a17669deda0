"""What was executed under one key, or under a whole policy, and what may yet be: the state machine of limits. Pure.

    hold --> settle: what was executed is charged, the rest goes back
         '-> nobody settles by `until`: all that was held is charged, as executed at the latest moment it could be

Duty: keep charges by time, hold room for rows before their draw, remember the last executed action. Time is an
argument, in whole milliseconds, rounded down. `service/limits.lua` is the same machine in Redis, verb by verb; a test
runs them side by side.
Strategy: a charge is dated when it is told, never before it happened, and leaves `window_ms` later.
Promise (sliding window): if every draw happens between `hold` and `until`, the charges of all draws in any
`window_ms` sum to at most `cap`. For let k be the draw among them whose hold came last: every other one's charge was
held, or dated no earlier than its draw and so within the window, when k asked for room.
Memory: beyond 64, charges of one 1,024th of a window share an entry dated by the latest (a window seems longer by at
most that); charges that change no verdict are dropped, oldest first.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from safety.limits import Limit

EXACT: Final = 64
BINS: Final = 1_024
UNKNOWN: Final = "?"  # something was executed last, and nobody has told what


@dataclass(slots=True)
class Charges:
    """Charges of one limit, by time. Invariant: total == sum(amounts), times ascend."""

    window_ms: int
    cap: int
    times: list[int] = field(default_factory=list)
    amounts: list[int] = field(default_factory=list)
    total: int = 0

    def forget(self, now_ms: int) -> None:
        """Drop what has left the window: more than a window ago, for a time rounded down may be a millisecond late."""
        while self.times and self.times[0] + self.window_ms < now_ms:
            self._drop()

    def add(self, at_ms: int, amount: int) -> None:
        """Add a charge, and drop the oldest that no longer matter: those after them fill the cap by themselves."""
        index = bisect_right(self.times, at_ms)
        self.total += amount
        if index and len(self.times) >= EXACT and self._bin(at_ms) == self._bin(self.times[index - 1]):
            self.times[index - 1] = at_ms
            self.amounts[index - 1] += amount
        else:
            self.times.insert(index, at_ms)
            self.amounts.insert(index, amount)
        while len(self.times) > 1 and self.total - self.amounts[0] >= self.cap:
            self._drop()

    def _bin(self, at_ms: int) -> int:
        return at_ms * BINS // self.window_ms

    def _drop(self) -> None:
        self.total -= self.amounts[0]
        del self.times[0], self.amounts[0]


@dataclass(slots=True)
class Hold:
    """Room that a row holds between its reservation and its settlement, by field. order: 0: no last action is kept."""

    until_ms: int
    order: int
    amounts: Mapping[str, int]


@dataclass(slots=True)
class Past:
    """The past of one key. last: the action executed last as `action_text` writes it, "" for none, or UNKNOWN."""

    holds: dict[str, Hold] = field(default_factory=dict)
    charges: dict[str, Charges] = field(default_factory=dict)
    orders: int = 0  # given to holds so far: executions of a key are ordered by their reservations
    last: str = ""
    last_order: int = 0
    last_ms: int = 0

    def turn(self, now_ms: int) -> None:
        """Move to a later time: what nobody has settled counts as executed, what left its window is forgotten."""
        for name in [name for name, hold in self.holds.items() if hold.until_ms <= now_ms]:
            hold = self.holds.pop(name)
            for each, amount in hold.amounts.items():
                self.charges[each].add(hold.until_ms, amount)
            if hold.order > self.last_order:
                self.last, self.last_order, self.last_ms = UNKNOWN, hold.order, hold.until_ms
        for charges in self.charges.values():
            charges.forget(now_ms)

    def room(self, limit: Limit, now_ms: int) -> int:
        """What is left of a limit; it may be negative, where something was executed that the rule does not mask."""
        charges = self.charges.setdefault(limit.field, Charges(limit.window_ms, limit.cap))
        if (charges.window_ms, charges.cap) != (limit.window_ms, limit.cap):  # the rule was changed
            charges.window_ms, charges.cap = limit.window_ms, limit.cap
            charges.forget(now_ms)
        return limit.cap - charges.total - sum(hold.amounts.get(limit.field, 0) for hold in self.holds.values())

    def previous(self) -> str:
        """The last executed action, UNKNOWN also while somebody may be executing another."""
        return UNKNOWN if any(hold.order for hold in self.holds.values()) else self.last

    def hold(self, name: str, until_ms: int, amounts: Mapping[str, int], remembers: bool) -> int:
        """Hold room, whose limits have been asked for theirs, and give the row's order."""
        order = 0
        if remembers:
            self.orders += 1
            order = self.orders
        if amounts or order:
            self.holds[name] = Hold(until_ms, order, amounts)
        return order

    def settle(self, name: str, now_ms: int, charged: Mapping[Limit, int], order: int, action: str) -> None:
        """Replace what was held by what was executed. action: "" where nothing was, or no last action is kept.

        order: the row's, as `hold` gave it. One whose hold is gone has been charged already; it is charged once more.
        """
        self.holds.pop(name, None)
        for limit, amount in charged.items():
            self.room(limit, now_ms)
            self.charges[limit.field].add(now_ms, amount)
        if action and order >= self.last_order:
            self.last, self.last_order, self.last_ms = action, order, now_ms


@dataclass(slots=True)
class Pasts:
    """Pasts of keys in this replica's memory, least recently used first. Invariant: len <= capacity.

    lasts_ms: no charge or hold lasts longer. A key for which there is no room is not known, and gets None: it must be
    denied. One is forgotten only when its charges have left their windows; its last action is then unknown.
    """

    capacity: int
    lasts_ms: int = 0
    _pasts: OrderedDict[str, tuple[int, Past]] = field(default_factory=OrderedDict)
    _forgot: bool = False
    _closed_ms: int = 0  # until then new keys are denied: something was executed under a key without room

    def __len__(self) -> int:
        return len(self._pasts)

    def of(self, key: str, now_ms: int) -> Past | None:
        """Give a key's past, as of now; a new one if there is room."""
        found = self._pasts.pop(key, None)
        if found is None and not self._room(now_ms):
            return None
        past = Past(last=UNKNOWN if self._forgot else "") if found is None else found[1]
        self._pasts[key] = now_ms, past
        past.turn(now_ms)
        return past

    def missed(self, now_ms: int) -> None:
        """Something was executed under a key that had no room."""
        self._forgot, self._closed_ms = True, now_ms + self.lasts_ms

    def _room(self, now_ms: int) -> bool:
        if now_ms < self._closed_ms:
            return False
        if len(self._pasts) >= self.capacity:
            key, (used_ms, past) = next(iter(self._pasts.items()))
            if now_ms < used_ms + self.lasts_ms:
                return False
            del self._pasts[key]
            self._forgot = self._forgot or past.last != ""
        return True
