"""When each request of a constant arrival rate is meant to leave. Pure.

Duty: arithmetic between numbers of requests and points in time. It knows no socket, and asks no clock.
Strategy: the schedule is a formula, not a list: at ten times a server's peak nothing is kept for a request that nobody
has sent yet.
Promise: a slow server changes nothing about when a request was meant to leave, so no waiting is left out of a latency
measured from there (Tene's "coordinated omission").
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Schedule:
    """`count` requests, `rate` a second, the first at `start_s`."""

    start_s: float
    rate: float  # Invariant: > 0
    count: int

    @classmethod
    def lasting(cls, start_s: float, rate: float, seconds: float) -> Schedule:
        """As many as fit into so many seconds, one at least."""
        return cls(start_s, rate, max(1, round(rate * seconds)))

    def intended_s(self, index: int) -> float:
        """When a request is meant to leave."""
        return self.start_s + index / self.rate

    def due(self, now_s: float) -> int:
        """How many were meant to leave by now: those with intended_s(index) <= now_s, and no others."""
        number = math.floor((now_s - self.start_s) * self.rate) + 1
        # The product above and the quotient of intended_s round differently; the promise is about the latter.
        while self.intended_s(number) <= now_s:
            number += 1
        while number > 0 and self.intended_s(number - 1) > now_s:
            number -= 1
        return min(max(number, 0), self.count)

    def given_up(self, now_s: float, patience_s: float) -> int:
        """How many would have waited longer than their caller's patience, had they not left yet."""
        return self.due(now_s - patience_s)
