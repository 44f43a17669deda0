"""The same estimate from many logs of one world, against the truth."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from policies.types import Floats
from shadow.estimate import Estimates, Method


@dataclass(frozen=True, eq=False)
class Replicas:
    """One method's numbers, float64 [runs] each."""

    values: Floats
    errors: Floats
    lows: Floats
    highs: Floats
    lowers: Floats
    uppers: Floats

    @classmethod
    def of(cls, found: Sequence[Estimates], method: Method) -> Replicas:
        """Read one method off all estimates; each has a value."""
        each = [one.by(method) for one in found]
        table = [(one.value, one.error, one.low, one.high, one.lower, one.upper) for one in each]
        return cls(*np.array(table, np.float64).T)

    def z(self, truth: float) -> float:
        """How many standard errors the mean is off."""
        return z_score(self.values, truth)

    def covered(self, truth: float) -> float:
        """The share of intervals with the truth in them."""
        return float(((self.lows <= truth) & (truth <= self.highs)).mean())

    def crossed(self, truth: float) -> float:
        """The share of logs with a bound beyond the truth."""
        return float(((self.lowers > truth) | (truth > self.uppers)).mean())

    @property
    def spread(self) -> float:
        return float(self.values.std(ddof=1))


def z_score(values: Floats, truth: float) -> float:
    """How many standard errors the mean is off."""
    return float((values.mean() - truth) / (values.std(ddof=1) / math.sqrt(len(values))))


def mean_weights(found: Sequence[Estimates]) -> Floats:
    """Of all logs, float64 [runs]."""
    return np.array([one.support.mean_weight for one in found], np.float64)
