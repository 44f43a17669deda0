"""Whole expressions for the last look, one row and one action at a time. Pure, total.

Duty: say whether an expression is true of a row and an action, or fails. It shares neither the cutting nor the arrays
of the evaluators.
Strategy: what Python can say as CEL does, `plain.py` reads; all else CEL runs whole. A view of a row costs more than
running a program, so one is made for all expressions that ask about the row.
Promise: an answer for every row; whatever fails holds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import cast

import numpy as np

from policies.types import ObservationSpec
from safety.drawn import Drawn, Row
from safety.expression import Needs, View, denies, modest, narrowed, program, read, simple, view_of
from safety.facts import Facts
from safety.plain import Reader


class Expressions:
    """What the expressions of a policy share. reader: of those that Python can say. needs: what any of them names."""

    def __init__(self, observation: ObservationSpec) -> None:
        self.reader = Reader(observation)
        self.needs = Needs()
        self._observation = observation

    def expression(self, source: str) -> Expression:
        """Compile one. Raises SafetyError."""
        found = Expression(source, self._observation, self)
        self.needs |= found.needs
        return found

    def plain_rows(self, facts: Facts) -> list[bool]:
        """Rows that can certainly be shown to all of them."""
        good = [True] * len(facts.states)
        if self.needs.state != frozenset() and not np.isfinite(facts.states).all():
            good = [all(map(math.isfinite, state)) for state in facts.states.reshape(len(good), -1).tolist()]
        if self.needs.context != frozenset():
            good = [fine and (not each or simple(each)) for fine, each in zip(good, facts.contexts, strict=True)]
        return good

    def numbers(self, facts: Facts) -> Sequence[Sequence[float]]:
        """The numbers of each row that readings are about."""
        count, features = len(facts.states), self.reader.features
        return facts.states.reshape(count, -1).take(features, axis=1).tolist() if features else [()] * count

    def plainly(self, row: Row, needs: Needs) -> bool:
        """Whether a row can certainly be shown: its numbers are finite, its context is small."""
        if needs.state != frozenset() and not _finite(self._state(row, needs)):
            return False
        return needs.context == frozenset() or not row.context or simple(row.context)

    def values(self, row: Row) -> list[float]:
        """The numbers of a row that readings are about."""
        found = []
        for feature in self.reader.features:
            value: object = row.state
            for index in np.unravel_index(feature, self._observation.shape):
                value = cast(list[object], value)[index]
            found.append(cast(float, value))
        return found

    def view(self, drawn: Drawn, factor: str | None, action: object) -> View | None:
        """A row and its action with all that any expression names; None where it cannot be shown."""
        if factor not in drawn.views:
            drawn.views[factor] = self.shown(drawn.row, action, self.needs)
        return drawn.views[factor]

    def shown(self, row: Row, action: object, needs: Needs) -> View | None:
        """A row and its action with what is named; None where it cannot be shown."""
        variables: dict[str, object] = {} if action is None else {"action": action}
        if needs.state != frozenset():
            variables["state"] = self._state(row, needs)
            if not _finite(variables["state"]):
                return None
        if needs.context != frozenset():
            variables["context"] = context = narrowed(row.context, needs.context)
            if not simple(context) and not modest(context):
                return None
        return view_of(variables)

    def _state(self, row: Row, needs: Needs) -> object:
        names = self._observation.names
        if not names:
            return row.state
        named = zip(names, row.state, strict=True)
        return {name: value for name, value in named if needs.state is None or name in needs.state}


class Expression:
    """One expression. reading: what it comes to for an action, where Python can say it of rows shown plainly."""

    def __init__(self, source: str, observation: ObservationSpec, shared: Expressions) -> None:
        """Compile. Raises SafetyError."""
        self.needs = read(source, observation).needs()
        self.reading = shared.reader.read(source)
        self._program = program(source)
        self._shared = shared

    def holds(self, drawn: Drawn, factor: str | None, action: object) -> bool:
        """Whether it is true, or fails. action: as CEL sees it; `factor` alone, or all."""
        answer = self.reading(action) if self._shared.plainly(drawn.row, self.needs) else None
        if answer is None:
            return self.runs(drawn, factor, action)
        return answer(self._shared.values(drawn.row)) if callable(answer) else answer

    def runs(self, drawn: Drawn, factor: str | None, action: object) -> bool:
        """The same, of CEL alone."""
        view = self._shared.view(drawn, factor, action)
        if view is None:
            view = self._shared.shown(drawn.row, action, self.needs)
        return view is None or denies(self._program, view)


def _finite(value: object) -> bool:
    if isinstance(value, int | float):
        return math.isfinite(value)
    inner = value.values() if isinstance(value, dict) else cast(list[object], value)
    return all(map(_finite, inner))
