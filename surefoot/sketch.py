"""Mean, spread and quantiles of a stream of numbers in bounded memory. Pure.

Strategy: Welford's method for the moments (Technometrics 4, 1962); for quantiles buckets that grow geometrically, as in
DDSketch (Masson, Rim and Lee, VLDB 2019), so that each is known within 1 % of itself, whatever the distribution.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

_ACCURACY = 0.01
_LOG_GAMMA = math.log((1 + _ACCURACY) / (1 - _ACCURACY))
_MIDDLE = 2 / (1 + math.exp(_LOG_GAMMA))  # of a bucket, over its upper end: no number in it is further off than 1 %


@dataclass(slots=True)
class Moments:
    """Count, mean, standard deviation, least and largest."""

    n: int = 0
    mean: float = 0.0
    _squares: float = 0.0
    least: float = math.inf
    largest: float = -math.inf

    def add(self, x: float) -> None:
        self.n += 1
        off = x - self.mean
        self.mean += off / self.n
        self._squares += off * (x - self.mean)
        self.least, self.largest = min(self.least, x), max(self.largest, x)

    @property
    def std(self) -> float | None:
        """Of the sample; None for fewer than two."""
        return math.sqrt(max(0.0, self._squares) / (self.n - 1)) if self.n > 1 else None

    def plain(self) -> dict[str, Any]:
        if not self.n:
            return {"count": 0, "mean": None, "std": None, "min": None, "max": None}
        return {"count": self.n, "mean": self.mean, "std": self.std, "min": self.least, "max": self.largest}


@dataclass(slots=True)
class Quantiles:
    """Numbers by bucket, negative ones mirrored."""

    n: int = 0
    _above: Counter[int] = field(default_factory=Counter)
    _below: Counter[int] = field(default_factory=Counter)
    _zeros: int = 0

    def add(self, x: float) -> None:
        self.n += 1
        if x == 0.0:
            self._zeros += 1
        else:
            (self._above if x > 0 else self._below)[math.ceil(math.log(abs(x)) / _LOG_GAMMA)] += 1

    def at(self, share: float) -> float | None:
        """The number that `share` of all are not above; None where there are none."""
        rank = share * (self.n - 1)
        seen = 0
        for bucket, count in self._ordered():
            seen += count
            if seen > rank:
                return bucket
        return None

    def plain(self, *shares: float) -> dict[str, float | None]:
        return {f"p{100 * share:g}": self.at(share) for share in shares}

    def _ordered(self) -> list[tuple[float, int]]:
        below = [(-_value(key), self._below[key]) for key in sorted(self._below, reverse=True)]
        zeros = [(0.0, self._zeros)] if self._zeros else []
        return [*below, *zeros, *((_value(key), self._above[key]) for key in sorted(self._above))]


def _value(key: int) -> float:
    return math.exp(key * _LOG_GAMMA) * _MIDDLE
