"""What Redis is to be told of executions, and the queue in which it waits. Pure.

Duty: the messages of `limits.lua` that say what became of rows, a bounded queue of them by key.
Strategy: while Redis is away, of messages that only say which action came last under a key, the newest is enough.
Promise: at most `limit` wait; what finds no room is refused and counted.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from safety.limits import Limit

Charge = tuple[str, int, int, int]  # field, window, cap, amount


@dataclass(frozen=True, slots=True)
class Tell:
    """What became of one row. policy: what a strict count takes, None: nothing of it was held or taken.

    sent: its reservation was. answered: Redis has it. order: its place among the key's, 0: not known.
    """

    name: str
    key: str
    charges: Sequence[Charge]
    policy: Sequence[Charge] | None
    action: str
    order: int
    drawn_s: float
    sent: bool
    answered: bool

    @property
    def loose(self) -> bool:
        """Whether all it says is which action came last, so that a later one makes it needless."""
        return not (self.sent or self.charges or self.policy)

    def wire(self, now_s: float) -> list[object]:
        age_ms = max(0, round(1000 * (now_s - self.drawn_s)))
        policy = False if self.policy is None else _flat(self.policy)
        return [1, self.name, self.key, _flat(self.charges), policy, self.action, self.order, age_ms]


@dataclass(frozen=True, slots=True)
class Used:
    """What was executed from a portion."""

    limit: Limit
    covered: int
    beyond: int

    def wire(self, now_s: float) -> list[object]:
        limit = self.limit
        return [2, limit.field, limit.window_ms, limit.cap, self.covered, self.beyond]


class Tells:
    """Tells that wait, by key, those about one key in their order."""

    def __init__(self, limit: int) -> None:
        self.dropped = 0
        self._limit = limit
        self._count = 0
        self._waiting: dict[str, list[Tell]] = {}

    def __len__(self) -> int:
        return self._count

    def put_nowait(self, tell: Tell) -> bool:
        """Queue a tell, or drop it and say no."""
        queued = self._waiting.pop(tell.key, [])
        self._count -= len(queued)
        if tell.loose:
            queued = [each for each in queued if not each.loose]
        fits = self._count + len(queued) < self._limit
        if fits:
            queued.append(tell)
        self.dropped += not fits
        if queued:
            self._waiting[tell.key] = queued
            self._count += len(queued)
        return fits

    def take(self, keys: Iterable[str], limit: int) -> list[Tell]:
        """Take all about these keys, and others while there are fewer than `limit`; those of a key together."""
        taken: list[Tell] = []
        for key in keys:
            taken += self._waiting.pop(key, [])
        while self._waiting and len(taken) < limit:
            taken += self._waiting.pop(next(iter(self._waiting)))
        self._count -= len(taken)
        return taken


def charges_of(limits: Iterable[Limit], action: Sequence[float] | None) -> list[Charge]:
    """What an executed action takes of limits."""
    taken = [(limit, limit.charge(action)) for limit in limits]
    return [(limit.field, limit.window_ms, limit.cap, amount) for limit, amount in taken if amount]


def _flat(charges: Sequence[Charge]) -> list[object]:
    return [part for charge in charges for part in charge]
