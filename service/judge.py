"""What may be drawn for a group whose network has answered, and who else must answer. Pure.

    kill switches -> rules -> who answers: the version, the baseline, the fallback

Duty: the safety side of a decision before the draw, for all rows of a group at once. It draws nothing and asks no
network: a row that the baseline must answer is only said to be one, `act.py` hands it over.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import cast

import numpy as np

from policies.types import Box
from safety.chain import constrain, constrain_box
from safety.types import BoxConstraint, Constraint, FallbackReason
from service.plan import Group, Safeguards


@dataclass(frozen=True, slots=True)
class Judged:
    """What safety says about a group's B rows.

    denied: why the fallback answers a row, where that is settled already; its part of the constraint is empty.
    baseline: why the baseline version must answer a row in place of this one.
    """

    constraint: Constraint | BoxConstraint
    denied: list[FallbackReason | None]
    baseline: list[str | None]

    @property
    def handed_over(self) -> list[int]:
        """Rows that the baseline must answer."""
        return [i for i, reason in enumerate(self.baseline) if reason is not None]


def judge(group: Group, safeguards: Safeguards, *, hand_over: bool) -> Judged:
    """Judge a group. Where the baseline should answer but cannot (there is none, this is it, or `hand_over` is false
    because it had its chance), the fallback does.
    """
    count = len(group.rows)
    denied: list[FallbackReason | None] = [None] * count
    baseline: list[str | None] = [None] * count
    is_baseline = group.version.bundle.version == group.plan.baseline
    if "fallback_only" in safeguards.halts:
        denied = ["fallback_only"] * count
    elif "baseline_only" in safeguards.halts and not is_baseline:
        baseline = ["baseline_only"] * count
    if group.plan.baseline is None or is_baseline or not hand_over:
        denied = [why or ("no_baseline" if wanted else None) for why, wanted in zip(denied, baseline, strict=True)]
        baseline = [None] * count
    return Judged(_emptied(_constraint(group), denied), denied, baseline)


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
    """Split a group into the rows that its version answers and those that the baseline must be asked about."""
    moved = judged.handed_over
    if not moved:
        return [group]
    baseline = group.plan.versions[cast(str, group.plan.baseline)]
    handed = replace(
        group.some(moved),
        version=baseline,
        outputs=None,
        failure=None,
        state_reset=[False] * len(moved),
        stand_in=[judged.baseline[i] for i in moved],
    )
    kept = [i for i, reason in enumerate(judged.baseline) if reason is None]
    return [group.some(kept), handed] if kept else [handed]
