"""What may be drawn for a group whose network has answered, and who else must answer. Pure.

    kill switches -> breaker -> rules -> who answers: the version, another, the fallback

Duty: the safety side of a decision before the draw, for all rows of a group at once. It draws nothing and asks no
network: a row that another version must answer is only said to be one, `act.py` hands it over.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import cast

import numpy as np

from policies.types import Box
from safety.chain import constrain, constrain_box
from safety.halt import combined
from safety.types import BoxConstraint, Constraint, FallbackReason
from service.plan import Group, Safeguards


@dataclass(frozen=True, slots=True)
class Judged:
    """What safety says about a group's B rows.

    denied: why the fallback answers a row, where that is settled already; its part of the constraint is empty.
    instead: the version that must answer some rows in place of this one, and why for each of them.
    """

    constraint: Constraint | BoxConstraint
    denied: list[FallbackReason | None]
    instead: str | None
    reasons: list[str | None]

    @property
    def handed_over(self) -> list[int]:
        """Rows that the other version must answer."""
        return [i for i, reason in enumerate(self.reasons) if reason is not None]


def judge(group: Group, safeguards: Safeguards, instead: str | None) -> Judged:
    """Judge a group. instead: the version that answers where the group's own may not; None: the fallback does."""
    count = len(group.rows)
    denied: list[FallbackReason | None] = [None] * count
    reasons: list[str | None] = [None] * count
    answers = combined(safeguards.halts).answers
    if answers == "fallback":
        denied = ["fallback_only"] * count
    elif answers == "baseline" and group.version.bundle.version != group.plan.baseline:
        instead, reasons = group.plan.baseline if instead else None, ["baseline_only"] * count
    elif group.failure == "breaker_open":
        reasons = ["breaker_open"] * count
    if instead is None:
        denied = [why or _without(reason) for why, reason in zip(denied, reasons, strict=True)]
        reasons = [None] * count
    return Judged(_emptied(_constraint(group), denied), denied, instead, reasons)


def _without(reason: str | None) -> FallbackReason | None:
    """Why the fallback answers a row that another version should have answered."""
    return None if reason is None else "breaker_open" if reason == "breaker_open" else "no_baseline"


def _constraint(group: Group) -> Constraint | BoxConstraint:
    space = group.version.bundle.action
    if isinstance(space, Box):
        boxes = [cast(tuple[tuple[float, ...], tuple[float, ...]] | None, row.allowed) for row in group.rows]
        return constrain_box(boxes, space)
    return constrain([cast(tuple[int, ...] | None, row.allowed) for row in group.rows], space)


def _emptied(constraint: Constraint | BoxConstraint, denied: list[FallbackReason | None]) -> Constraint | BoxConstraint:
    """The constraint with nothing left in rows that are denied."""
    if not any(denied):
        return constraint
    rows = np.array([why is not None for why in denied])[:, None]
    if isinstance(constraint, BoxConstraint):
        low, high = np.where(rows, np.inf, constraint.low), np.where(rows, -np.inf, constraint.high)
        return BoxConstraint(low, high, constraint.by_rule)
    return Constraint(constraint.mask & ~rows, constraint.nvec, constraint.by_rule)


def hand_rows_over(group: Group, judged: Judged) -> list[Group]:
    """Split a group into the rows that its version answers and those that another must be asked about."""
    moved = judged.handed_over
    if not moved:
        return [group]
    handed = replace(
        group.some(moved),
        version=group.plan.versions[cast(str, judged.instead)],
        outputs=None,
        failure=None,
        state_reset=[False] * len(moved),
        stand_in=[judged.reasons[i] for i in moved],
    )
    kept = [i for i, reason in enumerate(judged.reasons) if reason is None]
    return [group.some(kept), handed] if kept else [handed]
