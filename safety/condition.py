"""Expressions over rows and choices: for which cells of which rows of a batch one is not false. Pure, total.

Duty: say for which cells an expression is not false. A cell is one thing that `action` may be: a choice of one factor,
or a tuple of choices. It knows no rules and gives no verdicts.
Strategy: whatever fails denies, so the only question is "false or not", and in that lattice CEL's `&&` and `||`, which
absorb errors, are plain AND and OR. So an expression is cut at them (`cut.py`), and what arrays can say of the parts is
said for the whole batch (`parts.py`). Programs are run only for rows that are not decided by then.
Promise: the same answer as the whole expression, evaluated for each row and cell.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np

from policies.errors import SafetyError
from policies.types import Bools, ObservationSpec
from safety.cut import Cutter, Domain
from safety.expression import Text, read
from safety.facts import Facts
from safety.parts import array_of
from safety.views import Batch, Views

MOST_ROWS: Final = 64


class Condition:
    """A compiled expression over a domain."""

    def __init__(self, text: Text, domain: Domain, observation: ObservationSpec, views: Views) -> None:
        """Compile. Raises SafetyError."""
        cutter = Cutter(domain, observation, views.thresholds)
        self.count = len(cutter.cells)
        self._every = (1 << self.count) - 1
        self._needs = text.needs()
        self._root = cutter.cut(text)
        self._reads = cutter.needs
        self._narrows = cutter.compares
        self._views = views
        self._rows: dict[int, Bools] = {}  # what some cells are as an array
        views.want(cutter.needs)
        nothing = np.zeros((1, 0), dtype=np.bool_)
        self._fixed = self._root.over(nothing, False) if self._needs.nothing else None

    def holds(self, facts: Facts) -> Bools | None:
        """Where the expression is true, or fails, bool [B, cells]; None: nowhere."""
        shape = len(facts.states), self.count
        if not shape[0]:
            return None
        found = self._fixed
        if found is None:
            batch = self._views.of(facts)
            hidden = batch.hidden(self._needs)
            if hidden is None and not self._root.may(batch.ever):
                return None
            found = self._root.over(batch.truth, False) if self._root.known else self._asked(batch, hidden)
            if hidden is not None:
                found = found | hidden[:, None]
        if not np.count_nonzero(found):
            return None
        return found if found.shape == shape else np.broadcast_to(found, shape)

    def _asked(self, batch: Batch, hidden: Bools | None) -> Bools:
        """What is found when programs are run for every row of which the answer depends on them."""
        shape = len(batch.facts.states), self.count
        if not self._narrows:
            return self._run(batch, range(shape[0]), [()] * shape[0])
        found = self._root.over(batch.truth, False)
        between = np.broadcast_to(found != self._root.over(batch.truth, True), shape).any(axis=1)
        rows = np.flatnonzero(between if hidden is None else between & ~hidden)
        if len(rows):
            found = np.array(np.broadcast_to(found, shape))
            found[rows] = self._run(batch, rows.tolist(), batch.truth[rows].tolist())
        return found

    def _run(self, batch: Batch, rows: Sequence[int], truth: Sequence[Sequence[bool]]) -> Bools:
        """What is found in these rows, bool [rows or 1, cells]. truth: which comparisons hold in each."""
        every, among, needs, view_of = self._every, self._root.among, self._reads, batch.view
        bits = []
        for row, known in zip(rows, truth, strict=True):
            view = view_of(row, needs)
            bits.append(every if view is None else among(view, known, every))
        return self._array(bits)

    def _array(self, bits: Sequence[int]) -> Bools:
        """Cells of rows as an array, bool [rows or 1, cells]. Mostly all rows have the same, or nothing."""
        kinds = set(bits)
        if len(kinds) == 1:
            return self._row(bits[0])
        if len(kinds) == 2 and 0 in kinds:
            return np.array([[each != 0] for each in bits]) & self._row(max(kinds))
        return array_of(bits, self.count)

    def _row(self, bits: int) -> Bools:
        found = self._rows.get(bits)
        if found is None:
            if len(self._rows) >= MOST_ROWS:
                self._rows.clear()
            found = self._rows[bits] = array_of([bits], self.count)
        return found


def row_condition(source: str, observation: ObservationSpec, views: Views) -> Condition:
    """Compile an expression that is about rows alone. Raises SafetyError."""
    text = read(source, observation)
    if text.uses("action"):
        raise SafetyError("this expression is about the row: it cannot name `action`", "when")
    return Condition(text, Domain(), observation, views)
