"""Sums over units from which means, ratios and their errors are read at any time. Pure.

Duty: first and second moments of a few numbers for each unit; and, for the weighted per-decision estimate, sums by step
and group of units. It knows nothing of policies.
Strategy: a ratio of sums R = ΣX/ΣY over independent units has, to first order, the error of Σ(X - R·Y)/ΣY, which second
moments give in closed form (Cochran 1977, "Sampling techniques", chapter 6; for a mean over rows the cluster-robust
error of Liang and Zeger 1986). A sum over steps of such ratios has none that few numbers could keep; its error is the
delete-a-group jackknife's (Kott 2001, "The delete-a-group jackknife"), over 20 groups that units take turns in.
Promise: sums of bounded size (but for the longest episode), and the same whatever the batches were.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import msgspec
import numpy as np

from policies.types import Floats

GROUPS = 20


@dataclass(frozen=True, slots=True)
class Figure:
    """A number and its error. freedom: of the t distribution that its interval takes."""

    value: float
    error: float
    freedom: int

    def interval(self, level: float) -> tuple[float, float]:
        """Two-sided interval: right as units become many."""
        from scipy.special import stdtrit  # takes a moment to load: only with the first interval

        width = float(stdtrit(self.freedom, 0.5 + level / 2.0)) * self.error
        return self.value - width, self.value + width


class Moments(msgspec.Struct, frozen=True, kw_only=True):
    """Of M numbers for each unit. sums: float64 [M]; products: float64 [M, M]."""

    sums: bytes
    products: bytes
    units: int = 0

    @classmethod
    def fresh(cls, count: int) -> Moments:
        """Of no unit, `count` numbers each."""
        return cls(sums=np.zeros(count).tobytes(), products=np.zeros((count, count)).tobytes())

    def add(self, *columns: Floats) -> Moments:
        """Add units: one column [k] for each number."""
        table = np.stack(columns, axis=1)
        sums = np.frombuffer(self.sums) + table.sum(axis=0)
        products = np.frombuffer(self.products).reshape(len(sums), -1) + table.T @ table
        return Moments(sums=sums.tobytes(), products=products.tobytes(), units=self.units + len(table))

    def total(self, number: int) -> float:
        """The sum of one of the numbers."""
        return float(np.frombuffer(self.sums)[number])

    def ratio(self, above: int, below: int) -> Figure | None:
        """Give one sum over another; None for fewer than two units, or a sum of 0 below."""
        total = self.total(below)
        if self.units < 2 or total <= 0.0:
            return None
        products = np.frombuffer(self.products).reshape(len(np.frombuffer(self.sums)), -1)
        value = self.total(above) / total
        squares = products[above, above] - 2.0 * value * products[above, below] + value**2 * products[below, below]
        error = math.sqrt(max(float(squares), 0.0) * self.units / (self.units - 1)) / total
        return Figure(value, error, self.units - 1)


class ByStep(msgspec.Struct, frozen=True, kw_only=True):
    """Sums by group and step of episodes, float64 [GROUPS, H] each: what was earned, and the mass behind it."""

    earned: bytes = b""
    mass: bytes = b""
    units: int = 0

    def add(self, earned: Floats, mass: Floats) -> ByStep:
        """Add episodes in turn: float64 [k, T] each. An episode that has ended keeps its mass, and earns nothing."""
        kept = [np.frombuffer(each).reshape(GROUPS, -1) for each in (self.earned, self.mass)]
        steps = max(kept[0].shape[1], earned.shape[1])
        groups = (self.units + np.arange(len(earned))) % GROUPS
        sums_earned, sums_mass = _longer(kept[0], steps, "constant"), _longer(kept[1], steps, "edge")
        np.add.at(sums_earned, groups, _longer(earned, steps, "constant"))
        np.add.at(sums_mass, groups, _longer(mass, steps, "edge"))
        return ByStep(earned=sums_earned.tobytes(), mass=sums_mass.tobytes(), units=self.units + len(earned))

    def figure(self) -> Figure | None:
        """Give Σ_t (Σ earned_t / Σ mass_t); None for fewer than two episodes, or no mass at all."""
        if self.units < 2:
            return None
        earned, mass = (np.frombuffer(each).reshape(GROUPS, -1)[: self.units] for each in (self.earned, self.mass))
        if not mass[:, 0].any():
            return None
        count = len(earned)
        left = _weighted(earned.sum(axis=0) - earned, mass.sum(axis=0) - mass)
        value = float(_weighted(earned.sum(axis=0), mass.sum(axis=0)))
        error = math.sqrt((count - 1) / count * float(np.square(left - value).sum()))
        return Figure(value, error, count - 1)


def _weighted(earned: Floats, mass: Floats) -> Floats:
    """Σ over steps of the ratios, [...]; where nothing is left of the mass, nothing is known to be earned."""
    lost = mass <= 0.0
    return np.asarray((np.where(lost, 0.0, earned) / np.where(lost, 1.0, mass)).sum(axis=-1))


def _longer(table: Floats, steps: int, mode: str) -> Floats:
    """Fill a table up to `steps` columns; a copy."""
    if table.shape[1] == 0:
        return np.zeros((len(table), steps))
    width = ((0, 0), (0, steps - table.shape[1]))
    return np.pad(table, width, mode="edge" if mode == "edge" else "constant")
