"""Rules tried on decisions that were made without them. Pure.

Duty: say of each recorded decision what a set of rules would have said: of the action that was executed, of what there
was to choose from, of who would have answered. It draws nothing: what another action had led to nobody knows.
Strategy: `judge.py` decides, as it does live, on groups rebuilt from records; here its word is held against what was
executed, and counted. Limits are replayed first, over all decisions in order of time.
Promise: chunks of decisions may be judged in any order, each once; whoever calls may stop between two.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, Literal, cast, get_args

import numpy as np

from policies.explore import behave, masked_mass
from policies.types import ActionSpec, Bools, Box, Choices, Floats, Ints, ObservationSpec, Target
from safety.evaluate import evaluator
from safety.rules import Bounds, ExploreOnly, Forbid, NeverExplore, Rule
from safety.types import BoxConstraint, Constraint
from service.dry_run_facts import Seen, Versions, group_of
from service.dry_run_limits import replay_limits
from service.dry_run_verdicts import Said, said
from service.judge import Judged, judge
from service.plan import Group, LoadedVersion, Plan, Safeguards
from service.ruling import Ruling

if TYPE_CHECKING:
    from safety.failing import Failing

Outcome = Literal["forbidden", "narrowed", "fallback", "stand_in", "failed", "monitored"]
OUTCOMES: Final[tuple[Outcome, ...]] = get_args(Outcome)
EXAMPLES: Final = 10
# Of what a rule forbids in a row, so many actions are tried for whether that is because its expression fails.
TRIED: Final = 16


@dataclass(slots=True)
class RuleCounts:
    """In how many decisions one rule would have done what. forbids: the executed action. takes: the decision, away from
    its version. narrows: what there was to choose from. failed: its expression did. examples: ids of decisions that it
    forbids or takes.
    """

    rule: Rule
    forbids: int = 0
    takes: int = 0
    narrows: int = 0
    failed: int = 0
    examples: list[str] = field(default_factory=list)

    def add(self, forbids: Bools, takes: Bools, narrows: Bools, failed: Bools, ids: Sequence[str]) -> None:
        self.forbids += int(forbids.sum())
        self.takes += int(takes.sum())
        self.narrows += int(narrows.sum())
        self.failed += int(failed.sum())
        self.examples += [ids[i] for i in np.flatnonzero(forbids | takes)[: EXAMPLES - len(self.examples)].tolist()]


class Trial:
    """One set of rules, or none, on n decisions.

    outcomes: bool [n] by name. masked: float64 [n], the target mass that rules take where the version still answers.
    rules: counts by name. Both are of the decisions judged so far.
    """

    def __init__(self, ruling: Ruling | None, plan: Plan, versions: Versions, decisions: Sequence[Seen]) -> None:
        """Replay limits. decisions: in order of time, all of which fit the versions."""
        self._ruling, self._plan, self._versions, self._decisions = ruling, plan, versions, decisions
        rules = () if ruling is None else ruling.ruleset.rules.rules
        spaces = plan.action, plan.observation
        self._failing = _expressions(rules, *spaces)
        self._exploring = [evaluator(rule, *spaces) for rule in rules if isinstance(rule, ExploreOnly | NeverExplore)]
        self._replayed = replay_limits(ruling.limits, decisions) if ruling is not None and ruling.counts else None
        self._nvec = plan.action.nvec if isinstance(plan.action, Choices) else ()
        self.rules = {rule.name: RuleCounts(rule) for rule in rules}
        self.outcomes = {name: np.zeros(len(decisions), dtype=np.bool_) for name in OUTCOMES}
        self.masked: Floats = np.zeros(len(decisions))

    def judge(self, places: Sequence[int]) -> None:
        """Judge some of the decisions, by their places."""
        members: dict[str, list[int]] = {}
        for place in places:
            members.setdefault(self._decisions[place].digest, []).append(place)
        for each in members.values():
            self._judge([self._decisions[place] for place in each], np.array(each))

    def _judge(self, seen: list[Seen], at: Ints) -> None:
        """Judge decisions of one version. at: their places."""
        version = self._versions.of(seen[0])
        group = group_of(self._plan, version, seen)
        past = None if self._replayed is None else self._replayed.past(at)
        judged = judge(group, Safeguards(ruling=self._ruling), self._stand_in(version), past)
        handed = np.array([reason is not None for reason in judged.reasons])
        fallen, mass = _left(judged, version)
        self.outcomes["stand_in"][at] = handed
        self.outcomes["fallback"][at] = fallen & ~handed
        self.masked[at] = np.where(fallen | handed, 0.0, mass)
        for each in said(
            judged,
            np.array([each.action for each in seen], dtype=np.float64),
            np.array([each.explored for each in seen]),
            version.bundle.action,
            self._exploring,
        ):
            self._count(each, judged, group, seen, at)

    def _stand_in(self, version: LoadedVersion) -> str | None:
        """Who answers for a version that rules take rows from."""
        label, plan = version.bundle.version, self._plan
        if label == plan.baseline:
            return None
        return plan.routes.champion if label == plan.routes.challenger else plan.baseline

    def _count(self, one: Said, judged: Judged, group: Group, seen: Sequence[Seen], at: Ints) -> None:
        """Count what one rule said. Nothing is held against a declared fallback: rules do not mask it."""
        counts = self.rules[one.verdict.name]
        forbids = one.forbids & np.array([not each.fallback for each in seen])
        failed = self._failed(one, judged, group, seen)
        counts.add(forbids, one.takes, one.narrows, failed, group.ids)
        self.outcomes["failed"][at] |= failed
        if counts.rule.mode == "monitor":
            self.outcomes["monitored"][at] |= forbids | one.takes
        else:
            self.outcomes["forbidden"][at] |= forbids
            self.outcomes["narrowed"][at] |= one.narrows

    def _failed(self, one: Said, judged: Judged, group: Group, seen: Sequence[Seen]) -> Bools:
        """Rows in which the rule denied because it could not be evaluated, bool [B]."""
        failed: Bools = np.zeros(len(seen), dtype=np.bool_)
        name = one.verdict.name
        if name in judged.failed:
            return ~failed
        expression = self._failing.get(name)
        if expression is not None:
            for i in np.flatnonzero(one.narrows).tolist():
                actions = one.forbidden(i, seen[i].action, self._nvec, TRIED)
                failed[i] = expression.fails(group.states[i], seen[i].context, actions)
        return failed


def _expressions(rules: Sequence[Rule], action: ActionSpec, observation: ObservationSpec) -> dict[str, Failing]:
    """The expressions of rules, by name."""
    written = [rule for rule in rules if isinstance(rule, Forbid | Bounds) and rule.when is not None]
    if not written:
        return {}
    from safety.failing import Failing  # imports CEL, which takes a while and few policies need

    return {rule.name: Failing(rule, action, observation) for rule in written}


def _left(judged: Judged, version: LoadedVersion) -> tuple[Bools, Floats]:
    """Rows that the declared fallback answers, bool [B], and the target mass that rules take, float64 [B]."""
    bundle, wanted, constraint, count = version.bundle, judged.target, judged.constraint, len(judged.reasons)
    if isinstance(wanted, Target):
        mask, inner = cast(Constraint, constraint).mask, np.zeros((count, len(wanted.nvec)), dtype=np.int64)
        return behave(wanted, mask, np.zeros(count), inner).fallback, masked_mass(wanted, mask)
    import policies.continuous as continuous  # loads scipy: only with the first version that needs it

    space, box = cast(Box, bundle.action), cast(BoxConstraint, constraint)
    transform = continuous.Transform.of(bundle.head, bundle.transform, space)
    mass = continuous.masked_mass(wanted, transform, (box.low, box.high))
    return wanted.faulty | (box.low > box.high).any(axis=1), mass
