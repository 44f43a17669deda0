"""Expressions over rows and choices: for which cells of which rows of a batch one is not false. Pure, total.

Duty: say for which cells an expression is not false. A cell is one thing that `action` may be: a choice of one factor,
or a tuple of choices. It knows no rules and gives no verdicts.
Strategy: whatever fails denies, so the only question is "false or not", and in that lattice CEL's `&&` and `||`, which
absorb errors, are plain AND and OR. So an expression is cut at them (`cut.py`), and what arrays can say of the parts is
said for the whole batch (`parts.py`). Programs are run only for rows that are not decided by then.
Promise: the same answer as the whole expression, evaluated for each row and cell.
"""

from __future__ import annotations

import numpy as np

from policies.errors import SafetyError
from policies.types import Bools, ObservationSpec
from safety.cut import Cutter, Domain
from safety.expression import Text, read
from safety.facts import Facts
from safety.parts import At, array_of
from safety.views import Batch, Views


class Condition:
    """A compiled expression over a domain."""

    def __init__(self, text: Text, domain: Domain, observation: ObservationSpec, views: Views) -> None:
        """Compile. Raises SafetyError."""
        cutter = Cutter(domain, observation, views.thresholds)
        self.count = len(cutter.cells)
        self._every = (1 << self.count) - 1
        self._needs = text.needs()
        self._root = cutter.cut(text)
        self._run = cutter.needs
        self._views = views
        views.want(cutter.needs)
        nothing = np.zeros((1, 0), dtype=np.bool_)
        self._fixed = self._root.over(nothing, False) if self._needs.nothing else None

    def holds(self, facts: Facts) -> Bools | None:
        """Where the expression is true, or fails, bool [B, cells]; None: nowhere."""
        shape = len(facts.states), self.count
        found = self._fixed
        if found is None:
            batch = self._views.of(facts)
            hidden = batch.hidden(self._needs)
            if hidden is None and not self._root.may(batch.ever):
                return None
            found = self._root.over(batch.truth, False)
            if not self._root.known:
                found = self._asked(batch, found, hidden)
            if hidden is not None:
                found = found | hidden[:, None]
        return np.broadcast_to(found, shape) if shape[0] and found.any() else None

    def _asked(self, batch: Batch, found: Bools, hidden: Bools | None) -> Bools:
        """What is found when programs are run for rows of which the answer depends on them."""
        truth = batch.truth
        shape = len(truth), self.count
        between = np.broadcast_to(found != self._root.over(truth, True), shape).any(axis=1)
        rows = np.flatnonzero(between if hidden is None else between & ~hidden)
        if not len(rows):
            return found
        bits = []
        for row, known in zip(rows.tolist(), truth[rows].tolist(), strict=True):
            view = batch.view(row, self._run)
            bits.append(self._every if view is None else self._root.among(At(view, known), self._every))
        asked = np.array(np.broadcast_to(found, shape))
        asked[rows] = array_of(bits, self.count)
        return asked


def row_condition(source: str, observation: ObservationSpec, views: Views) -> Condition:
    """Compile an expression that is about rows alone. Raises SafetyError."""
    text = read(source, observation)
    if text.uses("action"):
        raise SafetyError("this expression is about the row: it cannot name `action`", "when")
    return Condition(text, Domain(), observation, views)
