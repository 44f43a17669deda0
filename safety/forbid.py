"""`forbid`: choices for which an expression is true, or fails. Pure, total.

Strategy: `condition.py` says for which cells the expression holds; here cells become a mask over one factor, over the
product of all of them, or the whole row, as the expression names them.
"""

from __future__ import annotations

from math import prod

import numpy as np

from policies.errors import SafetyError
from policies.types import ActionSpec, Bools, Box, ObservationSpec, columns
from safety.condition import Condition
from safety.cut import MOST_CELLS, Domain
from safety.expression import Text, read
from safety.factor import named_factor
from safety.facts import Boxed, Facts, Masked, MaskedJointly, Verdict
from safety.rules import Forbid
from safety.views import Views


class ForbidEvaluator:
    """One `forbid` rule, bound to the spaces of a policy."""

    def __init__(self, rule: Forbid, action: ActionSpec, observation: ObservationSpec, views: Views) -> None:
        """Compile. Raises SafetyError naming what in `when` or `factor` cannot be."""
        text = read(rule.when, observation)
        self._name = rule.name
        self._space = action
        self._domain = _domain(rule, text, action)
        self._condition = Condition(text, self._domain, observation, views)

    @property
    def joint(self) -> bool:
        """Whether it speaks of tuples of choices."""
        return len(self._domain.factors) > 1

    def judge(self, facts: Facts) -> Verdict | None:
        forbidden = self._condition.holds(facts)
        return None if forbidden is None else self._verdict(forbidden)

    def _verdict(self, forbidden: Bools) -> Verdict:
        """forbidden: bool [B, cells]."""
        if isinstance(self._space, Box):
            high = np.where(forbidden, -np.inf, np.inf) * np.ones(self._space.size)
            return Boxed(self._name, -high, high)
        if self.joint:
            return MaskedJointly(self._name, ~forbidden)
        if forbidden.shape[1] == self._space.size:
            return Masked(self._name, ~forbidden)
        allowed = np.ones((len(forbidden), self._space.size), dtype=np.bool_)
        factors = self._domain.factors
        part = columns(self._space.nvec)[factors[0]] if factors else slice(None)
        allowed[:, part] = ~forbidden
        return Masked(self._name, allowed)


def _domain(rule: Forbid, text: Text, action: ActionSpec) -> Domain:
    """What `action` ranges over, as the expression uses it."""
    used = text.uses("action")
    if isinstance(action, Box):
        if rule.factor is not None:
            raise SafetyError("a continuous action has no factors", "factor")
        if used:
            raise SafetyError("an expression cannot name a continuous `action`; say what it may be by bounds", "when")
        return Domain()
    factor = named_factor(rule.factor, action)
    if factor is not None or not action.factors:
        return Domain(action, (factor or 0,)) if used or factor is not None else Domain()
    named = {use.path[0] for use in used if use.path}
    factors = [index for index, name in enumerate(action.factors) if name in named]
    if len(factors) < 2:  # of none that exists: the domain says so
        return Domain(action, tuple(factors), named=True) if used else Domain()
    if prod(action.nvec) > MOST_CELLS:
        detail = f"a rule over several factors looks at every tuple of choices, at most {MOST_CELLS}; there are "
        raise SafetyError(detail + f"{prod(action.nvec)}; write a rule for each factor", "when")
    return Domain(action, tuple(range(len(action.nvec))), named=True)
