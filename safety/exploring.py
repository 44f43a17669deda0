"""`explore_only` and `never_explore`: which choices exploration draws among. Pure.

They take nothing away from the version itself: what is not explorable may still be its own choice.
"""

from __future__ import annotations

import numpy as np

from policies.types import ActionSpec
from safety.factor import chosen
from safety.facts import Facts, Masked
from safety.rules import ExploreOnly, NeverExplore


class ExploringEvaluator:
    """One of the two rules, bound to a space of choices."""

    joint = False

    def __init__(self, rule: ExploreOnly | NeverExplore, action: ActionSpec) -> None:
        """Bind. Raises SafetyError naming the field."""
        among, part = chosen(rule.actions, rule.factor, action)
        self._name = rule.name
        self._explorable = np.ones(len(among), dtype=np.bool_)
        self._explorable[part] = among[part] if isinstance(rule, ExploreOnly) else ~among[part]

    def judge(self, facts: Facts) -> Masked:
        return Masked(self._name, np.broadcast_to(self._explorable, (len(facts.states), len(self._explorable))))
