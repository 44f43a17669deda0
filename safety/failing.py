"""Whether an expression fails, said apart from whether it is true. Pure, total.

Duty: for who tries rules on recorded rows. The filter needs no difference, since what fails denies; the author of a
rule does: one that denies because a caller left something out is seldom meant so.
Strategy: the whole expression is run on one row and one action at a time, as in `recheck.py`: it is asked seldom, only
where a rule took something away.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from policies.types import ActionSpec, Choices, ObservationSpec
from safety.expression import let_through, modest, narrowed, program, read, view_of
from safety.rules import Bounds, Forbid

Action = Sequence[float]


class Failing:
    """One expression, bound to the spaces of a policy."""

    def __init__(self, rule: Forbid | Bounds, action: ActionSpec, observation: ObservationSpec) -> None:
        """Compile the rule's `when`. Raises SafetyError where it is no expression."""
        text = read(rule.when or "", observation)
        self._program = program(text.source)
        self._needs = text.needs()
        self._reads_action = bool(text.uses("action"))
        self._factor = rule.factor if isinstance(rule, Forbid) else None
        self._space = action
        self._names = observation.names

    def fails(
        self, state: npt.NDArray[np.floating], context: Mapping[str, object] | None, actions: Sequence[Action]
    ) -> bool:
        """Whether it fails in a row for one of these actions: it raises, says neither true nor false, or the row cannot
        be shown to it.
        """
        variables = self._variables(state, context)
        if variables is None:
            return True
        if not self._reads_action:
            return self._runs_into_error(variables)
        return any(self._runs_into_error(variables | {"action": self._shown(each)}) for each in actions)

    def _variables(
        self, state: npt.NDArray[np.floating], context: Mapping[str, object] | None
    ) -> dict[str, object] | None:
        variables: dict[str, object] = {}
        wanted = self._needs.state
        if wanted != frozenset():
            if self._names and wanted is not None:
                state = state[[self._names.index(name) for name in sorted(wanted)]]
            if not np.isfinite(state).all():
                return None
            names = self._names if wanted is None else sorted(wanted)
            variables["state"] = dict(zip(names, state.tolist(), strict=True)) if self._names else state.tolist()
        if self._needs.context != frozenset():
            variables["context"] = narrowed(context, self._needs.context)
            if not modest(variables["context"]):
                return None
        return variables

    def _runs_into_error(self, variables: dict[str, object]) -> bool:
        view = view_of(variables)
        try:
            return view is None or not isinstance(self._program.execute(view), bool)
        except BaseException as error:  # the library panics by one
            let_through(error)
            return True

    def _shown(self, action: Action) -> object:
        assert isinstance(self._space, Choices)  # of points an expression reads no action
        pairs = zip(action, self._space.names, strict=True)
        each = [{"index": int(choice), "name": names[int(choice)]} for choice, names in pairs]
        if not self._space.factors:
            return each[0]
        by_name = dict(zip(self._space.factors, each, strict=True))
        return by_name if self._factor is None else by_name[self._factor]
