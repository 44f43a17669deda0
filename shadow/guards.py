"""What is measured on a unit, so that one test serves all guards. Pure.

Duty: name the measures, and turn a unit into the number that a guard compares; higher is better, so that "worse" means
the same for all. It knows no bounds and no verdicts.
Strategy: everything but the return is a share of the unit's decisions, in [0, 1], and is worth its negative. A share is
one number for a unit, however many decisions it made: decisions of one unit depend on each other.
Latency is the share of decisions above a threshold that stands before the step begins, the budget or a quantile that
the champion had: "the challenger's 99th percentile is above q" is the same statement as "more than 1 % of its decisions
take longer than q". Confidence sequences for quantiles themselves (Howard and Ramdas 2022, "Sequential estimation of
quantiles with applications to A/B testing and best-arm identification") want independent draws of one distribution;
a unit's decisions, and a service's hours, are neither.
Promise: `value` is in the range of `Guard.range` whenever a return is in `return_range`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import msgspec
import numpy as np

from policies.types import Bools, Floats
from shadow.sequential import Difference
from shadow.units import Unit
from shadow.verdicts import Action, Alpha, Reading, read

Measure = Literal["return", "override", "fallback", "error", "latency", "default", "quarantine", "void"]


class Guard(msgspec.Struct, frozen=True, kw_only=True):
    """One measure and what becomes of a rollout when the challenger is worse by more than the margin.

    margin: in the measure's unit; 0.01 of a rate is one decision in a hundred. must_prove: a step is left for the next
    only when the challenger was shown not to be worse; else it is enough that it was not shown to be.
    """

    measure: Measure
    margin: float
    action: Action = "rollback"
    must_prove: bool = False
    return_range: tuple[float, float] = (0.0, 1.0)  # of a unit's value; for the measure `return` only

    @property
    def range(self) -> tuple[float, float]:
        return self.return_range if self.measure == "return" else (-1.0, 0.0)

    def fresh(self, weight: float) -> Difference:
        """The state at the beginning of a step."""
        return Difference.fresh(*self.range, weight)

    def add(self, state: Difference, units: Sequence[Unit]) -> Difference:
        """Add ripe units, in the order in which they started."""
        return state.add_many(*self.column(units))

    def column(self, units: Sequence[Unit]) -> tuple[Bools, Floats]:
        """Which units are the challenger's, and their values: bool [N], float64 [N]."""
        assigned = np.array([unit.challenger for unit in units], np.bool_)
        return assigned, np.array([value(self.measure, unit) for unit in units], np.float64)

    def read(self, state: Difference, alpha: Alpha, place: int, step: int, margin: float | None = None) -> Reading:
        """Judge. place, step: the guard's and the step's places in α. margin: in place of the guard's own."""
        return read(
            state,
            margin=self.margin if margin is None else margin,
            rollback_alpha=alpha.rollback(place, step),
            advance_alpha=alpha.advance,
            action=self.action,
            must_prove=self.must_prove,
        )


def value(measure: Measure, unit: Unit) -> float:
    """What a unit is worth to a guard; higher is better."""
    if measure == "return":
        return unit.value
    counts = {
        "override": unit.overridden,
        "fallback": unit.fallback,
        "error": unit.errors,
        "latency": unit.slow,
        "default": unit.defaulted,
        "quarantine": unit.quarantined,
        "void": unit.void,
    }
    return -counts[measure] / unit.decisions
