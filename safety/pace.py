"""How fast a budget may be spent so that it lasts to the end of its window. Pure.

Duty: a meter of decisions per second, and the pace that follows from what is left.
Strategy: ε = min(ε, left / decisions still expected). What is left is the holder's own portion, over the decisions that
it expects itself, and its part of the pool that nobody has leased yet, over the decisions that all replicas expect:
summed over holders that is all there is, once. What a share earns with each decision comes on top.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Final

LEAST_S: Final = 10.0
MOST_S: Final = 120.0
FIRST_S: Final = 0.05  # a meter that has just begun looks back at least so far


class Meter:
    """Events per second, an exponentially weighted mean, unbiased from the first moment on."""

    def __init__(self, memory_s: float) -> None:
        self.memory_s = memory_s  # over how long it forgets
        self._rate = 0.0
        self._at_s: float | None = None
        self._began_s = 0.0

    def add(self, count: int, now_s: float) -> None:
        self._decay(now_s)
        self._rate += count / self.memory_s

    def rate(self, now_s: float) -> float:
        """Events per second, as far as the meter remembers; 0 before the first."""
        if self._at_s is None:
            return 0.0
        self._decay(now_s)
        seen_s = max(FIRST_S, now_s - self._began_s)
        return self._rate / -math.expm1(-seen_s / self.memory_s)

    def _decay(self, now_s: float) -> None:
        if self._at_s is None:
            self._at_s = self._began_s = now_s
        passed_s = now_s - self._at_s
        if passed_s < 0.0:  # a clock was set back: everything was that much earlier
            self._began_s += passed_s
        else:
            self._rate *= math.exp(-passed_s / self.memory_s)
        self._at_s = now_s


def memory_s(windows_ms: Iterable[int]) -> float:
    """Over how long to measure, for these windows: long enough for slow traffic, short enough to follow it."""
    return min(MOST_S, max([LEAST_S, *(window / 20_000 for window in windows_ms)]))


def pace(own: float, pool: float, own_rate: float, fleet_rate: float, remaining_s: float, earns: float = 0.0) -> float:
    """What one decision may take on average.

    own: left of the own portion. pool: not leased by anybody. own_rate, fleet_rate: decisions per second that want to
    explore, here and of all replicas. earns: what each decision adds.
    """
    remaining_s = max(0.0, remaining_s)
    here = max(1.0, own_rate * remaining_s)
    everywhere = max(here, fleet_rate * remaining_s)
    return own / here + pool / everywhere + earns
