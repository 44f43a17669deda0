"""A portion of one limit over a whole policy, leased from Redis and used without asking. Pure: time is an argument.

Duty: what may be executed from the portion this moment, what to report, and how much to ask for.
Strategy: Redis counts a portion as held until its holder says otherwise, so a lease is a hold of `past.py` that lasts
longer and is reported piece by piece. What is held is told as it stands, what was used is told once, in order. The
lease is timed from before the request left, so it ends here before Redis counts the rest as executed.
Promise: what is used between two answers of Redis is within what it counts as held; what is reported is dated by Redis
when the report comes, hence no earlier than its draw. With the promise of `past.py`, no window passes the cap.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Final, NamedTuple

from safety.limits import Entry, Limit

# Between a reservation and its draw nothing may take longer; a lease that ends sooner is as good as over. Renewals come
# so often that this happens only when Redis is away.
MARGIN_S: Final = 0.25


class Ask(NamedTuple):
    """What a holder tells and wants of one limit."""

    held: int  # not used, and kept if Redis grants it again
    wanted: int  # beyond that


class Use(NamedTuple):
    """What was used since the last report. beyond: more than was held, where the rule does not mask it."""

    covered: int
    beyond: int


@dataclass(slots=True)
class Places:
    """One worker's portion. Invariant: reserved <= held, for it is part of it."""

    limit: Limit
    held: int = 0
    until_s: float = float("-inf")
    _rows: dict[str, tuple[float, int]] = field(default_factory=dict)  # by name: until when, how much
    _share: int | None = None  # what Redis would leave us, while others wait
    _covered: int = 0
    _beyond: int = 0
    _demand: int = 0  # used or refused since the last request

    @property
    def reserved(self) -> int:
        return sum(amount for _, amount in self._rows.values())

    @property
    def short(self) -> bool:
        """Whether an action would not fit now."""
        return self.held - self.reserved < self.limit.quantum

    def room(self, now_s: float) -> int:
        """What may be reserved now: nothing without a lease."""
        self._turn(now_s)
        return self.held - self.reserved if now_s < self.until_s - MARGIN_S else 0

    def reserve(self, name: str, entry: Entry, now_s: float, until_s: float) -> int:
        """Reserve the most that a row may come to, and give the room there was for it."""
        room = self.room(now_s)
        amount = max(self.limit.worst(room, replace(entry, least=0)), min(entry.least, max(0, room)))
        self._demand += self.limit.worst(self.limit.quantum, entry) - amount
        if amount:
            self._rows[name] = min(until_s, self.until_s), amount
        return room

    def settle(self, name: str, charge: int) -> None:
        """Replace what a row reserved by what it executed."""
        _, amount = self._rows.pop(name, (0.0, 0))
        self._use(min(amount, charge))
        self._beyond += max(0, charge - amount)

    def ask(self, now_s: float, closing: bool = False) -> tuple[Use, Ask]:
        """Say what to tell Redis; what was used is the caller's to deliver from here on. closing: all goes back."""
        self._turn(now_s)
        if now_s >= self.until_s:
            self.held = self.reserved
        use = Use(self._covered, self._beyond)
        target = 0 if closing else self.limit.quantum + 2 * self._demand
        self._covered = self._beyond = self._demand = 0
        kept = target if self._share is None else min(target, self._share)
        self.held = max(self.reserved, min(self.held, kept))
        return use, Ask(self.held, max(0, target - self.held))

    def granted(self, asked: Ask, total: int, share: int | None, sent_s: float, term_s: float) -> None:
        """Take the answer: `total` of what was asked is held from now on. share: None while nobody else waits."""
        self.held += total - asked.held
        self.until_s = sent_s + term_s
        self._share = share

    def _turn(self, now_s: float) -> None:
        """Count what no row has settled in time as used."""
        for name in [name for name, (until_s, _) in self._rows.items() if until_s <= now_s]:
            self._use(self._rows.pop(name)[1])

    def _use(self, amount: int) -> None:
        self.held -= amount
        self._covered += amount
        self._demand += amount
