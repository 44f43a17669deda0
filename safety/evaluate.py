"""All rules of a policy over a batch. Pure, total: whatever fails denies.

Duty: build one evaluator for each rule that can be judged from `Facts` alone, and ask them. Rules that count executions
(`rate`, `cooldown`, `cost`) are judged where counts are kept; their verdicts are brought in, and one that is not
brought in denies.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

import numpy as np

from policies.errors import SafetyError
from policies.types import ActionSpec, Box, ObservationSpec
from safety.bounds import BoundsEvaluator
from safety.combine import Pair
from safety.confidence import ConfidenceEvaluator
from safety.exploring import ExploringEvaluator
from safety.facts import Boxed, Facts, Masked, Replaced, Verdict
from safety.rules import (
    Bounds,
    Confidence,
    Cooldown,
    Cost,
    ExploreOnly,
    Forbid,
    MaxStep,
    NeverExplore,
    Rate,
    Rule,
    Support,
)
from safety.step import step_evaluator
from safety.support import SupportEvaluator

if TYPE_CHECKING:
    from safety.views import Views

ELSEWHERE = (Rate, Cooldown, Cost)


class Evaluator(Protocol):
    """One rule, bound to the spaces of a policy."""

    @property
    def joint(self) -> bool:
        """Whether it speaks of tuples of choices."""
        ...

    def judge(self, facts: Facts) -> Verdict | None:
        """Say what the rule allows in B rows; None: everything."""
        ...


@dataclass(frozen=True, slots=True)
class Judged:
    """What rules said. failed: names of rules whose evaluation raised, and so deny everything."""

    pairs: tuple[Pair, ...]
    failed: tuple[str, ...] = ()

    @property
    def answered(self) -> tuple[Pair, ...]:
        """Without rules that are judged elsewhere and have not been yet: to know what these may be about."""
        return tuple(pair for pair in self.pairs if pair[1] is not None)

    def with_verdicts(self, verdicts: Mapping[str, Verdict | None]) -> Judged:
        """Bring in what was said elsewhere, by name of the rule; None: it allows everything."""
        told = ((rule, verdicts.get(rule.name)) if verdict is None else (rule, verdict) for rule, verdict in self.pairs)
        kept = [pair for pair in told if pair[1] is not None or pair[0].name not in verdicts]
        return replace(self, pairs=tuple(kept))


class Filter:
    """The rules of a policy, bound to its spaces."""

    def __init__(self, rules: Sequence[Rule], action: ActionSpec, observation: ObservationSpec) -> None:
        """Build every evaluator. Raises SafetyError naming the rule's field."""
        views = _views(rules, observation)
        self._action = action
        self._rules: list[tuple[Rule, Evaluator | None]] = [
            (rule, None if isinstance(rule, ELSEWHERE) else evaluator(rule, action, observation, views))
            for rule in rules
        ]

    @property
    def joint(self) -> bool:
        """Whether a rule in force speaks of tuples of choices: then the whole decision is over them."""
        return any(rule.mode == "enforce" and built is not None and built.joint for rule, built in self._rules)

    def judge(self, facts: Facts) -> Judged:
        """Ask every rule about B rows."""
        pairs: list[Pair] = []
        failed = []
        for rule, built in self._rules:
            if built is None:
                pairs.append((rule, None))
                continue
            try:
                verdict = built.judge(facts)
            except Exception:
                failed.append(rule.name)
                verdict = denial(rule, self._action, len(facts.faulty))
            if verdict is not None:
                pairs.append((rule, verdict))
        return Judged(tuple(pairs), tuple(failed))


def evaluator(rule: Rule, action: ActionSpec, observation: ObservationSpec, views: Views | None = None) -> Evaluator:
    """Bind one rule. views: shared by the rules of a filter. Raises SafetyError naming the rule's field."""
    match rule:
        case Forbid():
            return _forbid(rule, action, observation, views)
        case Bounds():
            return BoundsEvaluator(rule, action, observation, views)
        case MaxStep():
            return step_evaluator(rule, action)
        case Support():
            return SupportEvaluator(rule, observation)
        case Confidence():
            return ConfidenceEvaluator(rule, action)
        case ExploreOnly() | NeverExplore():
            return ExploringEvaluator(rule, action)
    raise SafetyError(f"{rule.name!r} counts executions: it is judged where counts are kept", "kind")


def _forbid(rule: Forbid, action: ActionSpec, observation: ObservationSpec, views: Views | None) -> Evaluator:
    from safety.forbid import ForbidEvaluator  # imports CEL, which takes a while and few policies need
    from safety.views import Views

    return ForbidEvaluator(rule, action, observation, views or Views(observation))


def _views(rules: Sequence[Rule], observation: ObservationSpec) -> Views | None:
    """Views that the rules share, where any is an expression."""
    if not any(isinstance(rule, Forbid | Bounds) and rule.when is not None for rule in rules):
        return None
    from safety.views import Views

    return Views(observation)


def denial(rule: Rule, action: ActionSpec, count: int) -> Verdict:
    """What a rule says that cannot be evaluated: nothing is allowed, or no row is the version's."""
    if isinstance(rule, Support | Confidence):
        return Replaced(rule.name, np.ones(count, dtype=np.bool_))
    if isinstance(action, Box):
        shape = count, action.size
        return Boxed(rule.name, np.full(shape, np.inf), np.full(shape, -np.inf))
    return Masked(rule.name, np.zeros((count, action.size), dtype=np.bool_))
