"""Settled decisions as shadows are shown them. Pure.

Duty: from the arrays of a group that was answered to `shadow.shown.Rows`, which keep no plan and no version alive. Rows
that were refused are left out: nothing was executed, and nothing is recorded of them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import numpy as np

from policies.bundle import PolicyBundle
from policies.explore import Behaviour
from policies.types import Bools, Floats, Ints
from safety.mask import request_mask
from safety.types import REQUEST_RULE, BoxConstraint, Constraint
from service.plan import Settled
from shadow.shown import ChoiceRows, PointRows, Rows

if TYPE_CHECKING:
    from policies.continuous import DrawnPoints, Gaussian, PointBehaviour


def shown(settled: Settled, now_s: float) -> Rows:
    """What shadows see of a group. now_s: monotonic."""
    group, bundle = settled.group, settled.group.version.bundle
    count = len(group.rows)
    choices = isinstance(settled.behaviour, Behaviour)
    rows = Rows(
        version=bundle.version,
        ids=list(group.ids),
        episodes=[row.episode for row in group.rows],
        steps=[row.step for row in group.rows],
        states=group.states,
        asked=request_mask(group.masks, bundle.action.size) if choices else None,
        logged=_choices(settled, bundle) if choices else _points(settled),
        offered_s=np.full(count, now_s),
        share=np.ones(count),
    )
    if bundle.fallback is None:
        answered = np.flatnonzero(~settled.behaviour.fallback & settled.passed)
        return rows if len(answered) == count else rows.some(answered.tolist())
    return rows


def _choices(settled: Settled, bundle: PolicyBundle) -> ChoiceRows:
    constraint, behaviour = cast(Constraint, settled.judged.constraint), cast(Behaviour, settled.behaviour)
    return ChoiceRows(
        nvec=constraint.nvec,
        factors=constraint.factors,
        mask=constraint.mask,
        ruled=_ruled(constraint),
        own=behaviour.own,
        fallen=behaviour.fallback,
        actions=cast(Ints, settled.actions),
        propensity=np.where(settled.passed, settled.drawn.propensity, np.nan),
        values=settled.group.outputs if bundle.head == "q_values" else None,
    )


def _ruled(constraint: Constraint) -> Bools | None:
    """What rules leave, callers' own limits left aside."""
    ruled: Bools | None = None
    for name, allowed in constraint.by_rule:
        if name != REQUEST_RULE:
            ruled = allowed if ruled is None else ruled & allowed
    return ruled


def _points(settled: Settled) -> PointRows:
    constraint, behaviour = cast(BoxConstraint, settled.judged.constraint), cast("PointBehaviour", settled.behaviour)
    target, drawn = cast("Gaussian", settled.target), cast("DrawnPoints", settled.drawn)
    low, high = _ruled_box(constraint)
    return PointRows(
        transform=behaviour.transform,
        low=constraint.low,
        high=constraint.high,
        ruled_low=low,
        ruled_high=high,
        mean=target.mean,
        std=target.std,
        centre=behaviour.centre,
        declared=behaviour.declared,
        fallen=behaviour.fallback,
        actions=cast(Floats, settled.actions),
        log_propensity=np.where(settled.passed, drawn.log_propensity, np.nan),
    )


def _ruled_box(constraint: BoxConstraint) -> tuple[Floats | None, Floats | None]:
    low: Floats | None = None
    high: Floats | None = None
    for name, lowest, highest in constraint.by_rule:
        if name != REQUEST_RULE:
            low = lowest if low is None else np.maximum(low, lowest)
            high = highest if high is None else np.minimum(high, highest)
    return low, high
