"""`support`: states unlike those that the version was trained on are not for it. Pure, total.

Strategy: a state lies outside where more than `max_outside` of its features lie beyond the manifest's ends, or where it
is too far from their middle on the whole. Ends are rounded to the observation's dtype, as states are, so that a state
exactly at an end lies inside. A number that is not finite lies outside; a feature without ends never does.
"""

from __future__ import annotations

import math
from typing import Literal

import numpy as np

from policies.errors import SafetyError
from policies.types import Feature, ObservationSpec
from safety.facts import Facts, Replaced
from safety.rules import Support


class SupportEvaluator:
    """One `support` rule, bound to what a manifest says of its features."""

    joint = False

    def __init__(self, rule: Support, observation: ObservationSpec) -> None:
        """Bind. Raises SafetyError where the manifest says nothing that the rule could go by."""
        ends = [_ends(feature, rule.by) for feature in observation.features]
        if not any(math.isfinite(end) for pair in ends for end in pair):
            what = "low and high" if rule.by == "range" else "two or more quantiles"
            raise SafetyError(f"no feature of this policy has {what} in its manifest", "by")
        low, high = np.array(ends).T
        self._closed = np.isfinite(low) & np.isfinite(high)
        half = np.where(self._closed, high / 2 - low / 2, 0.0)
        self._name = rule.name
        with np.errstate(over="ignore", invalid="ignore"):
            self._low = (low - rule.margin * 2 * half).astype(observation.dtype)
            self._high = (high + rule.margin * 2 * half).astype(observation.dtype)
        self._max_outside, self._max_distance = rule.max_outside, rule.max_distance
        self._middle, self._half = low[self._closed] / 2 + high[self._closed] / 2, half[self._closed]
        if rule.max_distance is not None and not self._closed.any():
            raise SafetyError("a distance needs features with both ends", "max_distance")

    def judge(self, facts: Facts) -> Replaced:
        states = facts.states
        inside = (states >= self._low) & (states <= self._high) & np.isfinite(states)
        outside = np.count_nonzero(~inside, axis=1) > self._max_outside
        outside |= ~np.isfinite(states).all(axis=1)
        if self._max_distance is not None:
            away = np.abs(states[:, self._closed].astype(np.float64) - self._middle)
            with np.errstate(divide="ignore", invalid="ignore"):
                distance = np.where(away == 0.0, 0.0, away / self._half).mean(axis=1)
            outside |= ~(distance <= self._max_distance)
        return Replaced(self._name, outside)


def _ends(feature: Feature, by: Literal["range", "quantiles"]) -> tuple[float, float]:
    """Between which two numbers training has seen a feature; infinite where it is not said."""
    if by == "range":
        return -math.inf if feature.low is None else feature.low, math.inf if feature.high is None else feature.high
    seen = feature.quantiles.values()
    return (min(seen), max(seen)) if len(seen) > 1 else (-math.inf, math.inf)
