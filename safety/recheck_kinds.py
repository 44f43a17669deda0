"""The last look at rules that are no expressions. Pure.

Duty: for each kind, whether a drawn action breaks it, in plain Python over one row; it shares no code with the
evaluators. What raises counts as broken, for who asks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final, cast

from policies.types import ActionSpec, Box, Choices, Feature, ObservationSpec
from safety.drawn import Broken, Drawn
from safety.rules import Choice, Confidence, ExploreOnly, MaxStep, NeverExplore, Support

# By how much float32 ends of a feature, and sums in another order, may differ from what is computed here. Nothing that
# is said of an action itself is compared with any tolerance.
ROUNDING: Final = 1e-6


def max_step(rule: MaxStep, action: ActionSpec) -> Broken:
    def broken(seen: Drawn) -> bool:
        row, drawn = seen.row, seen.action
        if not row.past:
            return True
        last = row.previous if row.previous is not None else _initial(rule, action)
        if last is None or len(last) != len(drawn):
            return True
        if isinstance(action, Box):
            limits = rule.limit if isinstance(rule.limit, list) else [rule.limit] * len(drawn)
            return not all(abs(a - b) <= limit for a, b, limit in zip(drawn, last, limits, strict=True))
        factor = action.factors.index(rule.factor) if rule.factor else 0
        one, other = (_worth(rule, action.names[factor], each[factor]) for each in (drawn, last))
        return not abs(one - other) <= cast(float, rule.limit)

    return broken


def _initial(rule: MaxStep, action: ActionSpec) -> tuple[float, ...] | None:
    """The action that counts as last; of several factors, only this rule's matters."""
    if rule.initial is None:
        return None
    if isinstance(action, Box):
        return tuple(rule.initial) if isinstance(rule.initial, list) else (float(rule.initial),)
    factor = action.factors.index(rule.factor) if rule.factor else 0
    return (_index(cast(Choice, rule.initial), action.names[factor]),) * len(action.names)


def _worth(rule: MaxStep, names: Sequence[str], choice: float) -> float:
    if choice not in range(len(names)):
        return math.nan
    values = rule.values
    return values[names[int(choice)]] if isinstance(values, dict) else cast(list[float], values)[int(choice)]


def _index(choice: Choice, names: Sequence[str]) -> int:
    return names.index(choice) if isinstance(choice, str) else choice


def support(rule: Support, observation: ObservationSpec) -> Broken:
    return lambda seen: _unlike_training(rule, observation, seen.row.state)


def _unlike_training(rule: Support, observation: ObservationSpec, state: Sequence[object]) -> bool:
    outside, distances = 0, []
    for feature, value in zip(observation.features, cast(Sequence[float], state), strict=True):
        if not math.isfinite(value):
            return True
        low, high = _seen(rule, feature)
        closed = math.isfinite(low) and math.isfinite(high)
        half, middle = (high / 2 - low / 2, low / 2 + high / 2) if closed else (0.0, 0.0)
        low, high = low - rule.margin * 2 * half, high + rule.margin * 2 * half
        outside += value < low - _rounded(low, observation) or value > high + _rounded(high, observation)
        if closed:
            away = abs(value - middle)
            distances.append(0.0 if away == 0.0 else away / half if half else math.inf)
    if outside > rule.max_outside:
        return True
    return rule.max_distance is not None and sum(distances) / len(distances) > rule.max_distance * (1 + ROUNDING)


def _rounded(end: float, observation: ObservationSpec) -> float:
    """By how much rounding to the observation's dtype may have moved an end."""
    return ROUNDING * abs(end) if observation.dtype == "float32" and math.isfinite(end) else 0.0


def _seen(rule: Support, feature: Feature) -> tuple[float, float]:
    low, high = feature.low, feature.high
    if rule.by == "quantiles":
        low, high = (
            (min(feature.quantiles.values()), max(feature.quantiles.values()))
            if len(feature.quantiles) > 1
            else (None, None)
        )
    return -math.inf if low is None else low, math.inf if high is None else high


def confidence(rule: Confidence, space: Choices) -> Broken:
    def broken(seen: Drawn) -> bool:
        row = seen.row
        if row.faulty:
            return False
        if row.scores is None:
            return True
        start, uncertainty = 0, 0.0
        for n in space.nvec:
            scores = sorted(row.scores[start : start + n], reverse=True)
            start += n
            if rule.min_gap is not None and n > 1 and not scores[0] - scores[1] >= rule.min_gap:
                return True
            uncertainty -= sum(p * math.log(p) for p in scores if p > 0.0) if not row.greedy else -math.inf
        return rule.max_entropy is not None and not uncertainty <= rule.max_entropy * (1 + ROUNDING)

    return broken


def exploring(rule: ExploreOnly | NeverExplore, space: Choices) -> Broken:
    factor = space.factors.index(rule.factor) if rule.factor else 0
    named = {_index(choice, space.names[factor]) for choice in rule.actions}

    def broken(seen: Drawn) -> bool:
        return seen.explored and (int(seen.action[factor]) in named) != isinstance(rule, ExploreOnly)

    return broken
