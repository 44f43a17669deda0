"""Boxes over continuous actions. Pure, total: every input gives a box, an empty one where nothing is left.

Two speak by boxes of fixed ends: the caller, by `allowed_actions`, and the rule `bounds`, always or under a condition.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from policies.errors import SafetyError
from policies.types import ActionSpec, Box, Floats, ObservationSpec
from safety import rules
from safety.facts import Boxed, Facts

if TYPE_CHECKING:
    from safety.condition import Condition
    from safety.views import Views

Bounds = tuple[Sequence[float], Sequence[float]] | None  # low and high that a caller allows; None: all


def request_box(allowed: Sequence[Bounds], size: int) -> tuple[Floats, Floats] | None:
    """Bound by the callers' `allowed_actions`, low and high, float64 [B, D], or None when no row names any.

    NaN allows nothing: it is refused at the edge, and here it is merely harmless.
    """
    if all(row is None for row in allowed):
        return None
    low, high = np.full((len(allowed), size), -np.inf), np.full((len(allowed), size), np.inf)
    for index, row in enumerate(allowed):
        if row is not None:
            low[index], high[index] = row
    return np.where(np.isnan(low), np.inf, low), np.where(np.isnan(high), -np.inf, high)


class BoundsEvaluator:
    """One `bounds` rule, bound to the spaces of a policy."""

    joint = False

    def __init__(
        self, rule: rules.Bounds, action: ActionSpec, observation: ObservationSpec, views: Views | None = None
    ) -> None:
        """Compile. views: shared with other rules. Raises SafetyError naming the field."""
        if not isinstance(action, Box):
            raise SafetyError("bounds are for continuous actions; to take choices away write a `forbid`", "kind")
        if rule.low is None and rule.high is None:
            raise SafetyError("bounds need low, high, or both", "low")
        self._name = rule.name
        self._low = _ends(rule.low, -math.inf, action.size, "low")
        self._high = _ends(rule.high, math.inf, action.size, "high")
        if (self._low > self._high).any():
            raise SafetyError("low must not be above high: nothing would be left", "low")
        self._when = None if rule.when is None else _compiled(rule.when, observation, views)

    def judge(self, facts: Facts) -> Boxed | None:
        shape = len(facts.states), len(self._low)
        if self._when is None:
            return Boxed(self._name, np.broadcast_to(self._low, shape), np.broadcast_to(self._high, shape))
        holds = self._when.holds(facts)
        if holds is None:
            return None
        return Boxed(self._name, np.where(holds, self._low, -np.inf), np.where(holds, self._high, np.inf))


def _compiled(when: str, observation: ObservationSpec, views: Views | None) -> Condition:
    from safety.condition import row_condition  # imports CEL, which takes a while and few policies need
    from safety.views import Views

    return row_condition(when, observation, views or Views(observation))


def _ends(declared: Sequence[float | None] | None, open_end: float, size: int, field: str) -> Floats:
    """One end for each coordinate, float64 [D]."""
    if declared is None:
        return np.full(size, open_end)
    if len(declared) != size:
        raise SafetyError(f"the action has {size} coordinates, here are {len(declared)} numbers", field)
    if any(end is not None and math.isnan(end) for end in declared):
        raise SafetyError("NaN is no bound", field)
    return np.array([open_end if end is None else end for end in declared], dtype=np.float64)
