"""A batch as expressions see it. Pure, total.

Duty: for the rules that share it, say once for each batch which comparisons with numbers hold, and show rows to CEL
programs; say which rows cannot be shown.
Strategy: a view costs microseconds, so one is made for a row only when a program asks for it, with all that programs of
these rules name; where that cannot be shown, each rule gets a view of its own, as what another needs does not count.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import numpy as np

from policies.types import Bools, ObservationSpec
from safety.expression import Needs, View, modest, narrowed, simple, view_of
from safety.facts import Facts
from safety.threshold import Thresholds


class Views:
    """What the rules of a filter share: their comparisons, and the batch they were last asked about."""

    def __init__(self, observation: ObservationSpec) -> None:
        self.thresholds = Thresholds()
        self._observation = observation
        self._shared = Needs()
        self._last: Batch | None = None

    def want(self, needs: Needs) -> None:
        """Show this to programs too. For the time when rules are built."""
        self._shared |= needs
        self._last = None

    def of(self, facts: Facts) -> Batch:
        last = self._last
        if last is None or last.facts is not facts:
            last = self._last = Batch(facts, self._observation, self.thresholds, self._shared)
        return last


class Batch:
    """One batch of rows.

    truth: bool [B, columns], which comparisons hold; [1, 0] where rules make none. ever: for each comparison whether it
    holds in any row.
    """

    def __init__(self, facts: Facts, observation: ObservationSpec, thresholds: Thresholds, shared: Needs) -> None:
        self.facts = facts
        self.truth: Bools = thresholds.of(facts.states) if len(thresholds) else np.zeros((1, 0), dtype=np.bool_)
        self.ever: Sequence[bool] = cast(list[bool], self.truth.any(axis=0).tolist()) if len(thresholds) else ()
        self._observation = observation
        self._shared = shared
        self._finite: bool | None = None  # whether every number is; None: nobody has asked
        self._views: dict[int, View | None] = {}
        self._simple: bool | None = None  # whether every context is; None: nobody has asked

    def hidden(self, needs: Needs) -> Bools | None:
        """Rows that cannot be shown to an expression: a number is not finite, a context too large; None: there are
        none.
        """
        found = None
        if needs.state != frozenset() and not self._all_finite():
            found = self._not_finite(needs.state)
        if needs.context != frozenset() and not self._all_simple():
            hides = [not self._showable(i, needs) for i in range(len(self.facts.contexts))]
            if any(hides):
                found = np.array(hides) if found is None else found | hides
        return found

    def view(self, row: int, needs: Needs) -> View | None:
        """A row, with at least what is needed."""
        view = self._views.get(row)
        if view is not None:
            return view
        if row not in self._views:
            view = self._views[row] = self._built(row, self._shared)
        return self._built(row, needs) if view is None and needs != self._shared else view

    def _all_finite(self) -> bool:
        if self._finite is None:
            self._finite = bool(np.isfinite(self.facts.states).all())
        return self._finite

    def _all_simple(self) -> bool:
        if self._simple is None:
            self._simple = all(not context or simple(context) for context in self.facts.contexts)
        return self._simple

    def _not_finite(self, wanted: frozenset[str] | None) -> Bools:
        states, names = self.facts.states, self._observation.names
        if wanted is not None:
            states = states[:, [names.index(name) for name in names if name in wanted]]
        return np.asarray(~np.isfinite(states.reshape(len(states), -1)).all(axis=1))

    def _showable(self, row: int, needs: Needs) -> bool:
        context = self.facts.contexts[row]
        return not context or simple(context) or self.view(row, needs) is not None

    def _built(self, row: int, needs: Needs) -> View | None:
        variables: dict[str, object] = {}
        if needs.state != frozenset():
            variables["state"] = self._state(row, needs.state)
        if needs.context != frozenset():
            shown = narrowed(self.facts.contexts[row], needs.context)
            if not self._all_simple() and not modest(shown):
                return None
            variables["context"] = shown
        return view_of(variables)

    def _state(self, row: int, wanted: frozenset[str] | None) -> object:
        numbers, names = self.facts.states[row].tolist(), self._observation.names
        if not names:
            return numbers
        return {name: value for name, value in zip(names, numbers, strict=True) if wanted is None or name in wanted}
