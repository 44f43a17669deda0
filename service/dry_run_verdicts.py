"""What each rule alone said of rows whose action is known: did it forbid that, take the row, narrow the choice. Pure.

Duty: take a group's `Judged` apart again, rule by rule. It counts nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import cast

import numpy as np

from policies.types import ActionSpec, Bools, Box, Choices, Floats, Ints, columns
from safety.evaluate import Evaluator
from safety.facts import Boxed, Facts, Masked, MaskedJointly, Replaced, Verdict
from safety.joint import to_indices, tuples
from safety.types import BoxConstraint, Constraint
from service.judge import Judged


@dataclass(frozen=True, slots=True)
class Said:
    """What one rule said of B rows, bool [B] each. forbids: the action at hand; by a rule on exploration only where it
    was explored. takes: the row, away from its version. narrows: what there was to choose from.
    """

    verdict: Verdict
    forbids: Bools
    takes: Bools
    narrows: Bools

    def forbidden(self, row: int, action: Sequence[float], nvec: tuple[int, ...], most: int) -> list[list[float]]:
        """Some actions that the rule forbids in a row: that at hand, if it does, and the first others. Of points that
        at hand stands for all.
        """
        if not isinstance(self.verdict, Masked | MaskedJointly):
            return [list(action)]
        first = np.flatnonzero(~self.verdict.allowed[row])[:most].tolist()
        if isinstance(self.verdict, MaskedJointly):
            others = [tuples(nvec)[at].tolist() for at in first]
        else:
            others = [_moved(action, at, nvec) for at in first]
        return [list(action), *others] if self.forbids[row] else others


def said(
    judged: Judged, actions: Floats, explored: Bools, space: ActionSpec, exploring: Sequence[Evaluator]
) -> Iterator[Said]:
    """Give what every rule said that said anything. actions: [B, F] or [B, D], executed. exploring: rules that restrict
    exploration alone, of which a `Judged` keeps no names.
    """
    constraint = judged.constraint
    for verdict in (*_enforced(constraint), *constraint.monitored, *constraint.replaced):
        yield _about(verdict, actions, space)
    for each in exploring:
        found = _about(cast(Masked, each.judge(cast(Facts, judged.facts))), actions, space)
        yield replace(found, forbids=found.forbids & explored, narrows=np.zeros(len(actions), dtype=np.bool_))


def _enforced(constraint: Constraint | BoxConstraint) -> list[Verdict]:
    if isinstance(constraint, BoxConstraint):
        return [Boxed(*each) for each in constraint.by_rule]
    return [MaskedJointly(*each) if constraint.factors else Masked(*each) for each in constraint.by_rule]


def _about(verdict: Verdict, actions: Floats, space: ActionSpec) -> Said:
    nothing = np.zeros(len(actions), dtype=np.bool_)
    if isinstance(verdict, Replaced):
        return Said(verdict, nothing, verdict.rows, nothing)
    if isinstance(verdict, Boxed):
        low, high = cast(Box, space).bounds
        outside = (actions < verdict.low) | (verdict.high < actions)
        narrows = (verdict.low > low) | (verdict.high < high)
        return Said(verdict, _any(outside), nothing, _any(narrows))
    at = _columns_of(verdict, actions.astype(np.int64), cast(Choices, space).nvec)
    return Said(verdict, _any(~np.take_along_axis(verdict.allowed, at, axis=1)), nothing, _any(~verdict.allowed))


def _any(found: Bools) -> Bools:
    """Rows with any, bool [B]."""
    return np.asarray(found.any(axis=1))


def _columns_of(verdict: Masked | MaskedJointly, actions: Ints, nvec: tuple[int, ...]) -> Ints:
    """Where the actions stand in a verdict's mask, int64 [B, F] or [B, 1]."""
    if isinstance(verdict, MaskedJointly):
        return to_indices(actions, nvec)[:, None]
    return np.asarray(actions + [part.start for part in columns(nvec)])


def _moved(action: Sequence[float], column: int, nvec: tuple[int, ...]) -> list[float]:
    """The action with the one choice that stands at a column."""
    starts = [part.start for part in columns(nvec)]
    factor = max(f for f, start in enumerate(starts) if start <= column)
    return [column - starts[f] if f == factor else choice for f, choice in enumerate(action)]
