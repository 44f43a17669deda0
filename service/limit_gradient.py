"""How much may be decided at once, from how long decisions take: the gradient of latency. Pure: durations are given.

    gradient = max(1/2, min(1, tolerance · long / short))
    limit    = (1 - s) · limit + s · (gradient · limit + sqrt(limit))

Duty: arithmetic. `short` is the mean of the last window of durations, `long` an average over many windows. While
decisions take what they have taken all along the limit grows, by what may queue; when they take longer it falls, to a
half at most. It stays as it is while less than half of it is made use of.
Strategy: Netflix's `Gradient2Limit` (concurrency-limits), with its smoothing of 0.2, and sqrt(limit) allowed to queue
as in its `GradientLimit`. Its tolerance is 1.5, ours 2: rows are decided together, so a decision takes longer in a
fuller batch, and no worse. After a lull `long` would be that of lone decisions: it follows a lower `short` at once.
Promise: least <= limit <= most, whatever it is told.
"""

from __future__ import annotations

import math
from typing import Final

WINDOW: Final = 64  # durations
LONG_WINDOW: Final = 600  # windows
TOLERANCE: Final = 2.0
SMOOTHING: Final = 0.2
# A batch of so many rows costs each little more than a larger one: below, throughput is given away for nothing.
LEAST: Final = 64


class GradientLimit:
    """The limit of one worker."""

    def __init__(self, most: int, least: int = LEAST, first: int | None = None) -> None:
        """most, least, first: of the limit."""
        self._least = min(least, most)
        self._most = most
        self._limit = float(most if first is None else first)
        self._long_s = 0.0
        self._sum_s = 0.0
        self._count = 0
        self._inside = 0

    @property
    def limit(self) -> int:
        return int(self._limit)

    @property
    def long_s(self) -> float:
        """What a decision takes, on average over many windows."""
        return self._long_s

    def note(self, took_s: float, inside: int) -> bool:
        """Take a duration, and how much was being decided. Says whether the limit may have moved."""
        self._sum_s += took_s
        self._count += 1
        if inside > self._inside:
            self._inside = inside
        if self._count < WINDOW:
            return False
        self._move(self._sum_s / self._count, self._inside)
        self._sum_s, self._count, self._inside = 0.0, 0, 0
        return True

    def _move(self, short_s: float, inside: int) -> None:
        if not 0.0 < short_s < math.inf:
            return
        weight = 2.0 / (LONG_WINDOW + 1)
        self._long_s = short_s if self._long_s == 0.0 else (1.0 - weight) * self._long_s + weight * short_s
        if self._long_s > 2.0 * short_s:  # what was slow is over
            self._long_s *= 0.95
        if 2 * inside < self._limit:
            return
        gradient = max(0.5, min(1.0, TOLERANCE * self._long_s / short_s))
        wanted = gradient * self._limit + math.sqrt(self._limit)
        moved = (1.0 - SMOOTHING) * self._limit + SMOOTHING * wanted
        self._limit = max(float(self._least), min(float(self._most), moved))
