"""What may be drawn for a group whose network has answered, and who else must answer. Pure.

    kill switches -> breaker -> rules -> who answers: the version, another, the fallback

Duty: the safety side of a decision before the draw, for all rows of a group at once. It draws nothing and asks no
network: a row that another version must answer is only said to be one, `act.py` hands it over.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from policies.heads import target
from policies.types import Bools, Box, Target, columns
from safety.bounds import request_box
from safety.chain import constrain, constrain_box
from safety.combine import Pair, combine, combine_box
from safety.facts import Facts, Verdict
from safety.halt import combined
from safety.joint import lift_target
from safety.mask import request_mask
from safety.types import BoxConstraint, Constraint, FallbackReason
from service.plan import Group, Safeguards

if TYPE_CHECKING:
    from policies.continuous import Gaussian
    from service.ruling import Bound, Ruling


@dataclass(frozen=True, slots=True)
class Past:
    """What is known of the keys' pasts before the draw, for the rows of a group.

    previous: each key's last executed action. known: bool [B], whether it could be read. verdicts: what rules say that
    count executions, by name.
    """

    previous: Sequence[tuple[float, ...] | None]
    known: Bools
    verdicts: Mapping[str, Verdict | None]

    @classmethod
    def unasked(cls, count: int) -> Past:
        """The past where nobody asked: rules on it deny."""
        return cls([None] * count, np.zeros(count, dtype=np.bool_), {})


@dataclass(frozen=True, slots=True)
class Judged:
    """What safety says about a group's B rows.

    target: what the network says, over tuples of choices where rules speak of them. denied: why the fallback answers a
    row, where that is settled already; its part of the constraint is empty. instead: the version that must answer some
    rows in place of this one, and why for each of them. facts, bound: what rules read, for the last look.
    """

    target: Target | Gaussian
    constraint: Constraint | BoxConstraint
    denied: list[FallbackReason | None]
    instead: str | None
    reasons: list[str | None]
    facts: Facts | None = None
    bound: Bound | None = None
    rules_digest: str = ""
    failed: tuple[str, ...] = ()  # rules whose evaluation raised: they deny

    @property
    def handed_over(self) -> list[int]:
        """Rows that the other version must answer."""
        return [i for i, reason in enumerate(self.reasons) if reason is not None]


def judge(group: Group, safeguards: Safeguards, instead: str | None, past: Past | None = None) -> Judged:
    """Judge a group. instead: the version that answers where the group's own may not; None: the fallback does."""
    judged = _ruled(group, safeguards.ruling, past)
    lost = _without_mass(judged)
    if lost is None and not (safeguards.halts or judged.constraint.instead or group.failure == "breaker_open"):
        return judged
    denied, reasons = _by_rules(judged, lost)
    count = len(group.rows)
    answers = combined(safeguards.halts).answers
    if answers == "fallback":
        denied, reasons = ["fallback_only"] * count, [None] * count
    elif answers == "baseline" and group.version.bundle.version != group.plan.baseline:
        instead, reasons = group.plan.baseline if instead else None, ["baseline_only"] * count
    elif group.failure == "breaker_open":
        reasons = ["breaker_open"] * count
    if instead is None:
        denied = [why or _without(reason) for why, reason in zip(denied, reasons, strict=True)]
        reasons = [None] * count
    emptied = _emptied(judged.constraint, denied)
    return replace(judged, constraint=emptied, denied=denied, instead=instead, reasons=reasons)


def _ruled(group: Group, ruling: Ruling | None, past: Past | None) -> Judged:
    """What the network says, and what rules and callers leave of it."""
    bundle, count = group.version.bundle, len(group.rows)
    wanted = _target(group)
    none: list[Any] = [None] * count
    if ruling is None:
        return Judged(wanted, _allowed(group), none, None, none)
    previous: list[tuple[float, ...] | None] = [row.previous for row in group.rows]
    known = np.array([action is not None for action in previous])
    if past is not None:
        previous = [said or before for said, before in zip(previous, past.previous, strict=True)]
        known |= past.known
    bound = ruling.bind(bundle, bundle.version == group.plan.baseline)
    facts = Facts(
        states=group.states,
        contexts=[row.context for row in group.rows],
        keys=[row.key for row in group.rows],
        previous=previous,
        past=known,
        scores=wanted.scores if isinstance(wanted, Target) else None,
        greedy=isinstance(wanted, Target) and wanted.greedy,
        faulty=wanted.faulty,
    )
    said = bound.filter.judge(facts)
    if past is not None:
        said = said.with_verdicts(past.verdicts)
    constraint = _constraint(group, said.pairs, ruling, joint=bound.filter.joint)
    if isinstance(constraint, Constraint) and isinstance(wanted, Target) and constraint.factors:
        wanted = lift_target(wanted)
    return Judged(wanted, constraint, none, None, none, facts, bound, ruling.ruleset.digest, said.failed)


def _target(group: Group) -> Target | Gaussian:
    bundle, outputs = group.version.bundle, group.outputs
    if outputs is None:
        outputs = np.full((len(group.rows), bundle.width), np.nan)
    if isinstance(bundle.action, Box):
        import policies.continuous as continuous  # loads scipy: only with the first version that needs it

        return continuous.gaussian(outputs, bundle.head)
    return target(outputs, bundle.head, bundle.temperature, bundle.action.nvec)


def _allowed(group: Group) -> Constraint | BoxConstraint:
    """What callers leave, where there are no rules."""
    space = group.version.bundle.action
    if isinstance(space, Box):
        return constrain_box(group.boxes, space)
    return constrain(group.masks, space)


def _constraint(group: Group, said: Sequence[Pair], ruling: Ruling, *, joint: bool) -> Constraint | BoxConstraint:
    """What callers and rules leave."""
    space, count, on_empty = group.version.bundle.action, len(group.rows), ruling.on_empty
    if isinstance(space, Box):
        return combine_box(said, request_box(group.boxes, space.size), space, count, on_empty=on_empty)
    return combine(said, request_mask(group.masks, space.size), space, count, on_empty=on_empty, joint=joint)


def _by_rules(judged: Judged, lost: Bools | None) -> tuple[list[FallbackReason | None], list[str | None]]:
    """Rows that rules take away from the version: to the fallback, or to the baseline, and why.

    lost: as `_without_mass` says.
    """
    constraint = judged.constraint
    denied, reasons = list(judged.denied), list(judged.reasons)
    for i in [] if lost is None else np.flatnonzero(lost).tolist():
        if constraint.on_empty(i) == "baseline":
            reasons[i] = "no_mass_allowed"
    for i, answers in enumerate(constraint.instead):
        taken = [each.name for each in constraint.replaced if each.rows[i]]
        if answers == "baseline":
            reasons[i] = f"rule:{taken[0]}" if taken else "nothing_allowed"
        elif answers == "fallback" and taken:
            denied[i] = "rule"
    return denied, reasons


def _without_mass(judged: Judged) -> Bools | None:
    """Rows whose target has no mass on what is left, bool [B]; None: there are none. A greedy one always has some."""
    wanted, constraint = judged.target, judged.constraint
    if (
        not isinstance(wanted, Target)
        or not isinstance(constraint, Constraint)
        or wanted.greedy
        or wanted.logits is not None
    ):
        return None
    lost = np.zeros(len(judged.denied), dtype=np.bool_)
    for part in columns(wanted.nvec):
        lost |= ~((wanted.scores[:, part] * constraint.mask[:, part]).sum(axis=1) > 0.0)
    lost &= ~wanted.faulty
    return lost if lost.any() else None


def _without(reason: str | None) -> FallbackReason | None:
    """Why the fallback answers a row that another version should have answered."""
    if reason is None or reason in ("breaker_open", "nothing_allowed", "no_mass_allowed"):
        return cast("FallbackReason | None", reason)
    return "rule" if reason.startswith("rule:") else "no_baseline"


def _emptied(constraint: Constraint | BoxConstraint, denied: list[FallbackReason | None]) -> Constraint | BoxConstraint:
    """The constraint with nothing left in rows that are denied."""
    if not any(denied):
        return constraint
    rows = np.array([why is not None for why in denied])[:, None]
    if isinstance(constraint, BoxConstraint):
        low, high = np.where(rows, np.inf, constraint.low), np.where(rows, -np.inf, constraint.high)
        return replace(constraint, low=low, high=high)
    return replace(constraint, mask=constraint.mask & ~rows)


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
