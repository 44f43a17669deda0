"""The last look at one drawn action: which rules it breaks. Pure, total.

Duty: find a mistake in the evaluators, in how verdicts are combined, or in the draw. So it shares none of their code:
it goes row by row over Python values, asks of the one action whether each rule forbids it, and runs each expression
whole, where the evaluators cut it. Rules that count executions are looked at where counts are kept.
Promise: returns names for every input; a rule that cannot be looked at counts as broken.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, cast

from policies.types import ActionSpec, Box, Choices, Feature, ObservationSpec
from safety.facts import Facts
from safety.rules import Bounds, Choice, Confidence, ExploreOnly, Forbid, MaxStep, NeverExplore, Rule, Support

if TYPE_CHECKING:
    from safety.expression import Needs, Program

Action = Sequence[float]  # one index for each factor, or D numbers


@dataclass(frozen=True, slots=True)
class Row:
    """One row of `Facts`, as Python values. state: numbers, nested as the observation's shape."""

    state: list[object]
    context: Mapping[str, object] | None
    previous: tuple[float, ...] | None
    past: bool
    scores: list[float] | None
    greedy: bool
    faulty: bool


# By how much float32 ends of a feature, and sums in another order, may differ from what is computed here. Nothing that
# is said of an action itself is compared with any tolerance.
ROUNDING: Final = 1e-6

Broken = Callable[[Row, Action, bool], bool]  # row, drawn action, whether it was explored


def rows_of(facts: Facts) -> list[Row]:
    """Take a batch apart."""
    scores = [None] * len(facts.states) if facts.scores is None else facts.scores.tolist()
    return [
        Row(state, facts.contexts[i], facts.previous[i], past, scores[i], facts.greedy, faulty)
        for i, (state, past, faulty) in enumerate(
            zip(facts.states.tolist(), facts.past.tolist(), facts.faulty.tolist(), strict=True)
        )
    ]


class Recheck:
    """The rules in force of a policy, for the last look."""

    def __init__(self, rules: Sequence[Rule], action: ActionSpec, observation: ObservationSpec) -> None:
        """Build. Raises SafetyError where an expression is none."""
        looks = [(rule.name, _look(rule, action, observation)) for rule in rules if rule.mode == "enforce"]
        self._looks = [(name, broken) for name, broken in looks if broken is not None]

    def broken(self, row: Row, drawn: Action, explored: bool = False) -> tuple[str, ...]:
        """Names of the rules that a drawn action breaks. It is the version's own: a fallback is not looked at."""
        return tuple(name for name, broken in self._looks if _breaks(broken, row, drawn, explored))


def _breaks(broken: Broken, row: Row, drawn: Action, explored: bool) -> bool:
    try:
        return broken(row, drawn, explored)
    except Exception:
        return True


def _look(rule: Rule, action: ActionSpec, observation: ObservationSpec) -> Broken | None:
    match rule:
        case Forbid():
            return _forbid(rule, action, observation)
        case Bounds():
            return _bounds(rule, observation)
        case MaxStep():
            return _max_step(rule, action)
        case Support():
            return lambda row, drawn, explored: _unlike_training(rule, observation, row.state)
        case Confidence():
            return _confidence(rule, cast(Choices, action))
        case ExploreOnly() | NeverExplore():
            return _exploring(rule, cast(Choices, action))
    return None


class _Expression:
    """A whole expression, run on one row at a time."""

    def __init__(self, source: str, observation: ObservationSpec) -> None:
        from safety.expression import program, read  # imports CEL, which takes a while and few policies need

        self._program: Program = program(source)
        self._needs: Needs = read(source, observation).needs()
        self._names = observation.names

    def holds(self, row: Row, action: object) -> bool:
        """Whether it is true, or fails."""
        from safety.expression import denies, modest, narrowed, view_of

        variables = {} if action is None else {"action": action}
        if self._needs.state != frozenset():
            variables["state"] = self._state(row)
            if not _finite(variables["state"]):
                return True
        if self._needs.context != frozenset():
            variables["context"] = narrowed(row.context, self._needs.context)
            if not modest(variables["context"]):
                return True
        view = view_of(variables)
        return view is None or denies(self._program, view)

    def _state(self, row: Row) -> object:
        wanted = self._needs.state
        if not self._names:
            return row.state
        named = zip(self._names, row.state, strict=True)
        return {name: value for name, value in named if wanted is None or name in wanted}


def _finite(value: object) -> bool:
    if isinstance(value, float):
        return math.isfinite(value)
    inner = value.values() if isinstance(value, dict) else cast(list[object], value)
    return all(_finite(each) for each in inner)


def _forbid(rule: Forbid, action: ActionSpec, observation: ObservationSpec) -> Broken:
    expression = _Expression(rule.when, observation)
    if isinstance(action, Box):
        return lambda row, drawn, explored: expression.holds(row, None)
    space, factor = action, rule.factor

    def broken(row: Row, drawn: Action, explored: bool) -> bool:
        pairs = zip(drawn, space.names, strict=True)
        each = [{"index": int(choice), "name": names[int(choice)]} for choice, names in pairs]
        if not space.factors:
            return expression.holds(row, each[0])
        by_name = dict(zip(space.factors, each, strict=True))
        return expression.holds(row, by_name if factor is None else by_name[factor])

    return broken


def _bounds(rule: Bounds, observation: ObservationSpec) -> Broken:
    when = None if rule.when is None else _Expression(rule.when, observation)

    def broken(row: Row, drawn: Action, explored: bool) -> bool:
        if when is not None and not when.holds(row, None):
            return False
        low = rule.low or [None] * len(drawn)
        high = rule.high or [None] * len(drawn)
        return not all(
            (bottom is None or value >= bottom) and (top is None or value <= top)
            for bottom, value, top in zip(low, drawn, high, strict=True)
        )

    return broken


def _max_step(rule: MaxStep, action: ActionSpec) -> Broken:
    def broken(row: Row, drawn: Action, explored: bool) -> bool:
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


def _confidence(rule: Confidence, space: Choices) -> Broken:
    def broken(row: Row, drawn: Action, explored: bool) -> bool:
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


def _exploring(rule: ExploreOnly | NeverExplore, space: Choices) -> Broken:
    factor = space.factors.index(rule.factor) if rule.factor else 0
    named = {_index(choice, space.names[factor]) for choice in rule.actions}

    def broken(row: Row, drawn: Action, explored: bool) -> bool:
        return explored and (int(drawn[factor]) in named) != isinstance(rule, ExploreOnly)

    return broken
