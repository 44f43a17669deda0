"""Who may be decided now, who waits, and who has waited in vain. Pure: times and the limit are given.

    arrives -> admitted -> leaves            below the limit, while nobody waits
            -> waits -> admitted -> leaves   when somebody has left
                     -> sent away            `expired` at its deadline; `full`, when too many bytes wait; `outranked`
                     -> withdrawn            its client has gone

Duty: the order. It knows no requests, only guests with a deadline and a size.
Strategy: first come, first served, as long as everybody can be served in time. Once the oldest has waited for
`PATIENCE` of its time that is no longer so, and the newest goes first: it is the one that can still be answered in
time, while oldest first would answer each just before, and soon just after, its deadline ("adaptive LIFO": Maurer,
Fail at Scale, ACM Queue 13(8), 2015). Guests of low rank are admitted only when no other waits, and sent away at half
of their time while others wait.
Promise: each guest is admitted, sent away or withdrawn exactly once, and none is admitted at or after its deadline.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from heapq import heappop, heappush
from itertools import count
from typing import Final, Generic, Literal, TypeVar

# Half: until then whoever came first can still be served, however much came with it. From then on the newest go first.
PATIENCE: Final = 0.5
# A quarter: more is to be done than can be, and what nobody waits for is to be left.
CALM: Final = 0.25
# 64 bodies of the largest size that is taken by default.
MOST_BYTES: Final = 64 << 20

# As early as the newest of others go first: no time is left for those who may wait.
YIELD: Final = 0.5

G = TypeVar("G")
Reason = Literal["expired", "full", "outranked"]


@dataclass(slots=True)
class _Seat(Generic[G]):
    guest: G
    came_s: float
    deadline_s: float
    size: int
    taken: bool = True

    def has_waited(self, now_s: float, share: float) -> bool:
        """Whether so much of its time has passed."""
        return now_s - self.came_s >= share * (self.deadline_s - self.came_s)


Queue = OrderedDict[int, _Seat[G]]  # by a guest's identity, in the order in which they came


class WaitingRoom(Generic[G]):
    """Admits up to `limit` units of work at once."""

    def __init__(self, limit: int, most_bytes: int = MOST_BYTES) -> None:
        self.limit = limit  # may change at any time
        self.inside = 0  # units of work that were admitted and have not left
        self._most_bytes = most_bytes
        self._bytes = 0
        self._waiting: tuple[Queue[G], Queue[G]] = OrderedDict(), OrderedDict()  # the second: of low rank
        self._due: list[tuple[float, int, _Seat[G]]] = []  # a heap; seats that are no longer taken stay until then
        self._away: list[tuple[G, Reason]] = []  # sent away, and not named yet
        self._numbers = count()

    def __len__(self) -> int:
        return len(self._waiting[0]) + len(self._waiting[1])

    @property
    def open(self) -> bool:
        """Whether somebody who comes now is admitted."""
        return self.inside < self.limit and not (self._waiting[0] or self._waiting[1])

    def enter(self, guest: G, now_s: float, deadline_s: float, *, size: int = 0, low: bool = False) -> bool:
        """Let a guest in: True when it is admitted, with one unit of work; otherwise it waits."""
        if self.open and now_s < deadline_s:
            self.inside += 1
            return True
        seat = _Seat(guest, now_s, deadline_s, size)
        self._waiting[low][id(guest)] = seat
        heappush(self._due, (deadline_s, next(self._numbers), seat))
        self._bytes += size
        while self._bytes > self._most_bytes:  # low rank first, then the oldest
            self._away.append((self._release(next(iter(self._waiting[1] or self._waiting[0]))), "full"))
        return False

    def leave(self, units: int = 1) -> None:
        """Say that work that was admitted is done."""
        self.inside -= units

    def grow(self, units: int) -> None:
        """Say that somebody who was admitted brings more work than was known."""
        self.inside += units

    def admit(self, now_s: float) -> G | None:
        """Admit whose turn it is; None: nobody's. To be called until then."""
        while self.inside < self.limit and len(self):
            waiting = self._waiting[0] or self._waiting[1]
            name = next(reversed(waiting)) if _waits(waiting, now_s, PATIENCE) else next(iter(waiting))
            seat = waiting[name]
            guest = self._release(name)
            if now_s < seat.deadline_s:
                self.inside += 1
                return guest
            self._away.append((guest, "expired"))
        return None

    def send_away(self, now_s: float) -> list[tuple[G, Reason]]:
        """Give up those for whom there is no time any more, and say why. Each is named once."""
        found, self._away = self._away, []
        while self._due and (self._due[0][0] <= now_s or not self._due[0][2].taken):
            seat = heappop(self._due)[2]
            if seat.taken:
                found.append((self._release(id(seat.guest)), "expired"))
        others, low = self._waiting
        if others:
            found += [(self._release(name), "outranked") for name in [*low] if low[name].has_waited(now_s, YIELD)]
        return found

    def withdraw(self, guest: G) -> bool:
        """Forget somebody who waits; False: it does not."""
        if not any(id(guest) in waiting for waiting in self._waiting):
            return False
        self._release(id(guest))
        return True

    def pressed(self, now_s: float) -> bool:
        """Whether there is more to be done than can be: the oldest has waited for `CALM` of its time."""
        return any(_waits(waiting, now_s, CALM) for waiting in self._waiting)

    @property
    def next_deadline_s(self) -> float | None:
        """When somebody is to be sent away at the latest; None: nobody waits."""
        if self._away:
            return 0.0
        while self._due and not self._due[0][2].taken:
            heappop(self._due)
        return self._due[0][0] if self._due else None

    def statistics(self) -> dict[str, int]:
        return {"limit": self.limit, "inside": self.inside, "waiting": len(self), "bytes": self._bytes}

    def _release(self, name: int) -> G:
        seat = self._waiting[name not in self._waiting[0]].pop(name)
        seat.taken = False
        self._bytes -= seat.size
        return seat.guest


def _waits(waiting: Queue[G], now_s: float, share: float) -> bool:
    """Whether the oldest has waited for so much of its time."""
    return bool(waiting) and next(iter(waiting.values())).has_waited(now_s, share)
