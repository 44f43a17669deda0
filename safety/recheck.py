"""The last look at drawn actions: which rules they break. Pure, total.

Duty: find a mistake in the evaluators, in how verdicts are combined, or in the draw. So it shares none of their code:
it goes row by row over Python values, asks of the one action whether each rule forbids it, and takes each expression
whole, where the evaluators cut it. Rules that count executions are looked at where counts are kept.
Strategy: of a batch, first what the action alone tells: most expressions are about another one. Then what Python says
of the state's numbers. Rows are taken apart, and shown to CEL, only for rules that are left by then.
Promise: an answer for every input; a rule that cannot be looked at counts as broken.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, cast

import numpy as np
import numpy.typing as npt

from policies.types import ActionSpec, Bools, Box, Choices, ObservationSpec
from safety.drawn import Action, Broken, Drawn, Row
from safety.facts import Facts
from safety.recheck_kinds import confidence, exploring, max_step, support
from safety.rules import Bounds, Confidence, ExploreOnly, Forbid, MaxStep, NeverExplore, Rule, Support

if TYPE_CHECKING:
    from safety.plain import Test
    from safety.recheck_expression import Expression, Expressions

MOST_PLANS: Final = 4_096  # actions of which is kept what is left to ask of them


def rows_of(facts: Facts) -> list[Row]:
    """Take a batch apart."""
    return [Row.of(facts, index) for index in range(len(facts.states))]


@dataclass(frozen=True, slots=True)
class _Choice:
    """A rule that is an expression over choices: for one action it may come to less."""

    expression: Expression
    factor: str | None
    shown: Callable[[Action], object]  # the action as CEL sees it

    def broken(self, drawn: Drawn) -> bool:
        return self.expression.holds(drawn, self.factor, self.shown(drawn.action))

    def left(self, shown: object) -> Broken:
        """The same of one action, where Python cannot say it."""
        expression, factor = self.expression, self.factor
        return lambda drawn: expression.runs(drawn, factor, shown)


@dataclass(frozen=True, slots=True)
class _Plan:
    """What is left to ask of an action. always: some rule forbids it in every row. tests: of the state's numbers."""

    always: bool
    tests: tuple[Test, ...]
    looks: tuple[Broken, ...]

    def breaks(self, facts: Facts, row: int, numbers: Sequence[float], action: Action, explored: bool) -> bool:
        if self.always:
            return True
        for test in self.tests:
            if test(numbers):
                return True
        if not self.looks:
            return False
        drawn = Drawn(Row.of(facts, row), action, explored)
        return any(_breaks(look, drawn) for look in self.looks)


class Recheck:
    """The rules in force of a policy, for the last look."""

    def __init__(self, rules: Sequence[Rule], action: ActionSpec, observation: ObservationSpec) -> None:
        """Build. Raises SafetyError where an expression is none."""
        self._shared = shared = _expressions(rules, observation)
        looks = ((rule.name, _look(rule, action, observation, shared)) for rule in rules if rule.mode == "enforce")
        self._looks = [(name, look) for name, look in looks if look is not None]
        self._every = _Plan(False, (), tuple(_broken(look) for _, look in self._looks))
        self._plans: dict[Action, _Plan] = {}
        self._points = isinstance(action, Box)

    def broken(self, row: Row, drawn: Action, explored: bool = False) -> tuple[str, ...]:
        """Names of the rules that a drawn action breaks. It is the version's own: a fallback is not looked at."""
        seen = Drawn(row, drawn, explored)
        return tuple(name for name, look in self._looks if _breaks(_broken(look), seen))

    def broken_rows(self, facts: Facts, actions: npt.NDArray[Any], explored: Bools, fallen: Bools) -> Bools:
        """Rows whose drawn action breaks some rule, bool [B]; one that fell back breaks none.

        actions: [B, F] or [B, D].
        """
        if not self._looks or fallen.all():
            return np.zeros(len(actions), dtype=np.bool_)
        found = []
        rows = zip(actions.tolist(), explored.tolist(), fallen.tolist(), *self._read(facts), strict=True)
        for row, (action, by_chance, fell, plainly, numbers) in enumerate(rows):
            if fell:
                found.append(False)
                continue
            plan = self._plan(action) if plainly else self._every
            found.append(plan.breaks(facts, row, numbers, action, by_chance))
        return np.array(found, dtype=np.bool_)

    def _read(self, facts: Facts) -> tuple[Sequence[bool], Sequence[Sequence[float]]]:
        """Of each row whether it can certainly be shown to expressions, and the numbers that they are about."""
        count, shared = len(facts.states), self._shared
        if shared is None:
            return [True] * count, [()] * count
        return shared.plain_rows(facts), shared.numbers(facts)

    def _plan(self, action: list[float]) -> _Plan:
        """What is left to ask of an action in rows that can be shown."""
        if self._points:
            return self._every
        key = tuple(action)
        plan = self._plans.get(key)
        if plan is None:
            if len(self._plans) >= MOST_PLANS:
                self._plans.clear()
            plan = self._plans[key] = self._planned(key)
        return plan

    def _planned(self, action: Action) -> _Plan:
        always = False
        tests: list[Test] = []
        looks: list[Broken] = []
        for _, look in self._looks:
            if not isinstance(look, _Choice):
                looks.append(look)
                continue
            try:
                shown = look.shown(action)
                answer = look.expression.reading(shown)
            except Exception:  # no action of this space
                return _Plan(True, (), ())
            if callable(answer):
                tests.append(answer)
            elif answer is None:
                looks.append(look.left(shown))
            always = always or answer is True
        return _Plan(always, tuple(tests), tuple(looks))


def _broken(look: Broken | _Choice) -> Broken:
    return look.broken if isinstance(look, _Choice) else look


def _breaks(broken: Broken, drawn: Drawn) -> bool:
    try:
        return broken(drawn)
    except Exception:
        return True


def _expressions(rules: Sequence[Rule], observation: ObservationSpec) -> Expressions | None:
    """What expressions share, where any rule is one."""
    if not any(isinstance(rule, Forbid | Bounds) and rule.when is not None for rule in rules):
        return None
    from safety.recheck_expression import Expressions  # imports CEL, which takes a while and few policies need

    return Expressions(observation)


def _look(
    rule: Rule, action: ActionSpec, observation: ObservationSpec, shared: Expressions | None
) -> Broken | _Choice | None:
    match rule:
        case Forbid():
            return _forbid(rule, action, cast("Expressions", shared))
        case Bounds():
            return _bounds(rule, shared)
        case MaxStep():
            return max_step(rule, action)
        case Support():
            return support(rule, observation)
        case Confidence():
            return confidence(rule, cast(Choices, action))
        case ExploreOnly() | NeverExplore():
            return exploring(rule, cast(Choices, action))
    return None


def _forbid(rule: Forbid, action: ActionSpec, shared: Expressions) -> Broken | _Choice:
    expression = shared.expression(rule.when)
    if isinstance(action, Box):
        return lambda drawn: expression.holds(drawn, None, None)
    space, factor = action, rule.factor

    def shown(drawn: Action) -> object:
        pairs = zip(drawn, space.names, strict=True)
        each = [{"index": int(choice), "name": names[int(choice)]} for choice, names in pairs]
        if not space.factors:
            return each[0]
        by_name = dict(zip(space.factors, each, strict=True))
        return by_name if factor is None else by_name[factor]

    return _Choice(expression, factor, shown)


def _bounds(rule: Bounds, shared: Expressions | None) -> Broken:
    when = None if rule.when is None else cast("Expressions", shared).expression(rule.when)

    def broken(drawn: Drawn) -> bool:
        if when is not None and not when.holds(drawn, None, None):
            return False
        point = drawn.action
        low = rule.low or [None] * len(point)
        high = rule.high or [None] * len(point)
        return not all(
            (bottom is None or value >= bottom) and (top is None or value <= top)
            for bottom, value, top in zip(low, point, high, strict=True)
        )

    return broken
