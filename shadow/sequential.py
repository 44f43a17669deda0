"""Challenger minus champion within one step of a rollout, under continuous peeking. Pure.

Duty: take units in the order in which they started, say at any time between which bounds the mean difference lies. It
knows no verdict, no guard and no policy; `units.py` says what a unit is, `capital.py` has the mathematics.
Strategy: a state of bounded size, one table of sums for each side, and running predictions of both versions' values.
A prediction forgets (so that a drift that both versions share is taken out), and the challenger's is the champion's
plus a shrunken difference: at a weight of 1 % its own mean would be late.
Promise: `lower(α)` is above the true difference at any time ever with probability α at most, and `upper(α)` below it,
each by itself; the true difference being the average, over the units so far, of what each would have had under the
challenger less what it would have had under the champion. Nothing need be stationary or independent but the routing.
What lies outside the range: docs/sequential-tests.md, "Clipping".
"""

from __future__ import annotations

import math

import msgspec
import numpy as np

from policies.types import Bools, Floats
from shadow.capital import bound, gains, tilts, wealth

MEMORY = 500  # units of a version that its prediction looks back on, about
DOUBT = 10  # units of the challenger that the assumption "no difference" weighs as much as


class Predictions(msgspec.Struct, frozen=True):
    """What the next unit is expected to be worth, as fractions of the range."""

    champion: float = 0.5
    difference: float = 0.0
    champions: int = 0
    challengers: int = 0

    def after(self, assigned: bool, value: float) -> Predictions:
        """Learn from one unit."""
        if assigned:
            pace = max(1.0 / (DOUBT + self.challengers + 1), 1.0 / MEMORY)
            learned = self.difference + pace * (value - self.champion - self.difference)
            return Predictions(self.champion, learned, self.champions, self.challengers + 1)
        pace = max(1.0 / (self.champions + 2), 1.0 / MEMORY)
        learned = self.champion + pace * (value - self.champion)
        return Predictions(learned, self.difference, self.champions + 1, self.challengers)


class Outside(msgspec.Struct, frozen=True):
    """Units whose value lay outside the range, by version.

    cut: better than the good end, counted as the good end. lost: worse than the bad end, or no number; counted as the
    bad end, which is milder than the truth, so that bounds on the version's mean do not hold for what was measured.
    """

    cut_champion: int = 0
    cut_challenger: int = 0
    lost_champion: int = 0
    lost_challenger: int = 0


class Difference(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that is known of one measure in one step. Higher values are better.

    over, under: float64 [K], the wealth of bets that the difference is larger, and smaller. total: Σ X, fractions.
    """

    low: float
    high: float
    weight: float  # probability with which a unit is assigned to the challenger; constant
    over: bytes
    under: bytes
    total: float = 0.0
    predictions: Predictions = Predictions()
    outside: Outside = Outside()

    @classmethod
    def fresh(cls, low: float, high: float, weight: float) -> Difference:
        """At the beginning of a step. Raises ValueError for an empty or endless range, or a weight not in (0, 1)."""
        if not (math.isfinite(low) and math.isfinite(high) and low < high):
            raise ValueError("a range needs a low end below its high end, both finite")
        if not 0.0 < weight < 1.0:
            raise ValueError("two versions can be compared only if both get units: the weight lies between 0 and 1")
        nothing = np.zeros(len(tilts(weight))).tobytes()
        return cls(low=low, high=high, weight=weight, over=nothing, under=nothing)

    @property
    def units(self) -> int:
        return self.predictions.champions + self.predictions.challengers

    @property
    def estimate(self) -> float:
        """Unbiased estimate of the mean difference, in the values' unit; 0 without units."""
        return self.total / max(self.units, 1) * (self.high - self.low)

    def add(self, assigned: bool, value: float) -> Difference:
        """Add the next unit, assigned to the challenger or not."""
        return self.add_many(np.array([assigned]), np.array([value]))

    def add_many(self, assigned: Bools, values: Floats) -> Difference:
        """Add units in the order in which they started: bool [N], float64 [N]. As many `add`s would, up to rounding."""
        return self._grown(assigned, values)[0]

    def watch(self, assigned: Bools, values: Floats, delta: float) -> tuple[Difference, Floats, Floats]:
        """Add units, and say what the evidence against `delta` was after each: see `evidence`, float64 [N] each."""
        grown, over, under = self._grown(assigned, values)
        counts = self.units + np.arange(1.0, len(values) + 1.0)
        share = delta / (self.high - self.low)
        above = wealth(np.frombuffer(self.over) + np.cumsum(over, axis=0), counts, share, self.weight)
        below = wealth(np.frombuffer(self.under) + np.cumsum(under, axis=0), counts, -share, self.weight)
        return grown, above, below

    def evidence(self, delta: float) -> tuple[float, float]:
        """How strongly units speak for a difference above `delta`, and for one below it, in nats.

        log(1/α) is enough at level α: exactly then the lower bound is above `delta`, or the upper one below it.
        """
        share = delta / (self.high - self.low)
        above = wealth(np.frombuffer(self.over), self.units, share, self.weight)
        below = wealth(np.frombuffer(self.under), self.units, -share, self.weight)
        return float(above), float(below)

    def lower(self, alpha: float) -> float:
        """Lower bound of the mean difference, in the values' unit."""
        return bound(np.frombuffer(self.over), self.units, alpha, self.weight) * (self.high - self.low)

    def upper(self, alpha: float) -> float:
        """Upper bound of the mean difference, in the values' unit."""
        return -bound(np.frombuffer(self.under), self.units, alpha, self.weight) * (self.high - self.low)

    def _grown(self, assigned: Bools, values: Floats) -> tuple[Difference, Floats, Floats]:
        """The state after the units, and what each of them gained the bets: float64 [N, K] twice."""
        known = np.where(np.isnan(values), -np.inf, values)
        fractions = np.clip((np.clip(known, self.low, self.high) - self.low) / (self.high - self.low), 0.0, 1.0)
        ones, zeros, learned = _predicted(self.predictions, assigned, fractions)
        over = gains(assigned, fractions, ones, zeros, self.weight)
        under = gains(assigned, 1.0 - fractions, 1.0 - ones, 1.0 - zeros, self.weight)
        residuals = np.where(assigned, (fractions - ones) / self.weight, (zeros - fractions) / (1.0 - self.weight))
        grown = msgspec.structs.replace(
            self,
            over=(np.frombuffer(self.over) + over.sum(axis=0)).tobytes(),
            under=(np.frombuffer(self.under) + under.sum(axis=0)).tobytes(),
            total=self.total + float((ones - zeros + residuals).sum()),
            predictions=learned,
            outside=_outside(self.outside, assigned, known > self.high, known < self.low),
        )
        return grown, over, under


def _predicted(known: Predictions, assigned: Bools, fractions: Floats) -> tuple[Floats, Floats, Predictions]:
    """Predictions f1 and f0 for each unit, made before it, and those for the next one."""
    made: list[tuple[float, float]] = []
    for is_challenger, value in zip(assigned.tolist(), fractions.tolist(), strict=True):
        made.append((known.champion, known.difference))
        known = known.after(is_challenger, value)
    zeros, differences = np.array(made).reshape(-1, 2).T
    return np.clip(zeros + differences, 0.0, 1.0), zeros, known


def _outside(before: Outside, assigned: Bools, cut: Bools, lost: Bools) -> Outside:
    return Outside(
        before.cut_champion + int((cut & ~assigned).sum()),
        before.cut_challenger + int((cut & assigned).sum()),
        before.lost_champion + int((lost & ~assigned).sum()),
        before.lost_challenger + int((lost & assigned).sum()),
    )
