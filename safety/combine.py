"""What all rules say, as one constraint: masks and boxes intersect, so order does not matter. Pure, total.

Strategy: verdicts of rules that monitor are kept aside, those on exploration restrict exploration alone, those that
replace rows are collected, all others intersect. A verdict that is missing, or does not fit the batch, denies.
Who answers a row in place of its version: the fallback, unless every rule that has a say in it (`then` of those that
replaced it, `on_empty` of those that left nothing) says the baseline.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from math import prod
from typing import TypeVar

import numpy as np

from policies.types import ActionSpec, Bools, Box, Choices, Floats, columns
from safety.facts import Boxed, Masked, MaskedJointly, Replaced, Verdict
from safety.joint import lift_mask
from safety.rules import Confidence, ExploreOnly, Instead, NeverExplore, Rule, Support
from safety.types import REQUEST_RULE, BoxConstraint, Constraint, safest

# A rule and what it said; None: it has not been asked, which denies. Rules that say nothing are left out.
Pair = tuple[Rule, Verdict | None]
Either = TypeVar("Either", Constraint, BoxConstraint)


def combine(
    judged: Sequence[Pair],
    request: Bools | None,
    space: Choices,
    count: int,
    *,
    on_empty: Instead = "fallback",
    joint: bool = False,
) -> Constraint:
    """Intersect over choices for `count` rows.

    request: what callers allow, bool [B, N]. on_empty: what the document says. joint: decide over tuples of choices,
    because some rule speaks of them, whether or not it says anything this time.
    """
    if not judged and request is None:
        width = prod(space.nvec) if joint else space.size
        return _unruled(np.ones((count, width), dtype=np.bool_), space, on_empty, joint)
    roles = _Roles.of(judged)
    joint = joint or any(isinstance(verdict, MaskedJointly) for _, verdict in roles.enforced)
    masks = _Masks(space, count, joint)
    by_rule = [] if request is None else [(REQUEST_RULE, masks.lifted(request))]
    for rule, verdict in roles.enforced:
        allowed = masks.of(verdict)
        if np.count_nonzero(allowed) < allowed.size:
            by_rule.append((rule.name, allowed))
    mask = _intersection([allowed for _, allowed in by_rule], (count, masks.width))
    explorable = None
    for _, verdict in roles.exploring:
        explorable = (mask if explorable is None else explorable) & masks.of(verdict)
    constraint = Constraint(
        mask,
        (masks.width,) if joint else space.nvec,
        tuple(by_rule),
        monitored=_fitting(roles.monitored, count, space),
        replaced=_replaced(roles.replacing, count),
        instead=(None,) * count,
        explorable=explorable,
        says=_says(roles.enforced, on_empty),
        otherwise=on_empty,
        factors=space.nvec if joint else (),
    )
    return _with_instead(constraint, judged, count)


def _unruled(mask: Bools, space: Choices, on_empty: Instead, joint: bool) -> Constraint:
    """Where nobody says anything."""
    nvec, factors = (mask.shape[1:], space.nvec) if joint else (space.nvec, ())
    return Constraint(mask, nvec, instead=(None,) * len(mask), otherwise=on_empty, factors=factors)


def _intersection(masks: Sequence[Bools], shape: tuple[int, int]) -> Bools:
    return reduce(np.logical_and, masks) if masks else np.ones(shape, dtype=np.bool_)


def combine_box(
    judged: Sequence[Pair],
    request: tuple[Floats, Floats] | None,
    space: Box,
    count: int,
    *,
    on_empty: Instead = "fallback",
) -> BoxConstraint:
    """Intersect over a box for `count` rows. request: low and high of what callers allow, float64 [B, D] each."""
    roles = _Roles.of(judged)
    low, high = (np.tile(end, (count, 1)) for end in space.bounds)
    by_rule = [] if request is None else [(REQUEST_RULE, *request)]
    for rule, verdict in roles.enforced:
        lowest, highest = _ends_of(verdict, count, space)
        if (lowest > low).any() or (highest < high).any():
            by_rule.append((rule.name, lowest, highest))
    for _, lowest, highest in by_rule:
        low, high = np.maximum(low, lowest), np.minimum(high, highest)
    constraint = BoxConstraint(
        low,
        high,
        tuple(by_rule),
        monitored=_fitting(roles.monitored, count, space),
        replaced=_replaced(roles.replacing, count),
        instead=(None,) * count,
        says=_says(roles.enforced, on_empty),
        otherwise=on_empty,
    )
    return _with_instead(constraint, judged, count)


@dataclass(frozen=True, slots=True)
class _Roles:
    """Rules by what they do: in force, they restrict the version, restrict exploration alone, or take rows away."""

    enforced: list[Pair]
    exploring: list[Pair]
    replacing: list[Pair]
    monitored: list[Pair]

    @classmethod
    def of(cls, judged: Sequence[Pair]) -> _Roles:
        roles = cls([], [], [], [])
        for pair in judged:
            rule, verdict = pair
            if isinstance(rule, ExploreOnly | NeverExplore):  # one that monitors forbids nothing
                if rule.mode == "enforce":
                    roles.exploring.append(pair)
            elif rule.mode != "enforce":
                roles.monitored.append(pair)
            else:
                (roles.replacing if isinstance(verdict, Replaced) else roles.enforced).append(pair)
        return roles


@dataclass(frozen=True, slots=True)
class _Masks:
    """Verdicts as masks over choices, or over tuples of them."""

    space: Choices
    count: int
    joint: bool

    @property
    def width(self) -> int:
        return prod(self.space.nvec) if self.joint else self.space.size

    def of(self, verdict: Verdict | None) -> Bools:
        """What a verdict allows, bool [B, width]: nothing where it is none over these choices."""
        if isinstance(verdict, Masked) and _fits(verdict, self.count, self.space):
            return self.lifted(verdict.allowed)
        if isinstance(verdict, MaskedJointly) and _fits(verdict, self.count, self.space):
            return verdict.allowed
        return np.zeros((self.count, self.width), dtype=np.bool_)

    def lifted(self, mask: Bools) -> Bools:
        return lift_mask(mask, self.space.nvec) if self.joint else mask


def _ends_of(verdict: Verdict | None, count: int, space: Box) -> tuple[Floats, Floats]:
    """What a verdict allows, low and high: nothing where it is none over this box, and where it says NaN."""
    if isinstance(verdict, Boxed) and _fits(verdict, count, space):
        low, high = verdict.low, verdict.high
        return np.where(np.isnan(low), np.inf, low), np.where(np.isnan(high), -np.inf, high)
    shape = count, space.size
    return np.full(shape, np.inf), np.full(shape, -np.inf)


def _fits(verdict: Verdict, count: int, space: ActionSpec) -> bool:
    """Whether a verdict is about this space, and has a row for each of the batch."""
    match verdict, space:
        case Masked(), Choices():
            return verdict.allowed.shape == (count, space.size)
        case MaskedJointly(), Choices():
            return verdict.allowed.shape == (count, prod(space.nvec))
        case Boxed(), Box():
            return verdict.low.shape == verdict.high.shape == (count, space.size)
        case Replaced(), _:
            return verdict.rows.shape == (count,)
    return False


def _replaced(replacing: Sequence[Pair], count: int) -> tuple[Replaced, ...]:
    """Verdicts that take some row away; one that does not fit the batch takes all."""
    if not replacing:
        return ()
    every = np.ones(count, dtype=np.bool_)
    verdicts = (verdict for _, verdict in replacing if isinstance(verdict, Replaced))
    fitting = (each if each.rows.shape == (count,) else Replaced(each.name, every) for each in verdicts)
    return tuple(each for each in fitting if each.rows.any())


def _fitting(monitored: Sequence[Pair], count: int, space: ActionSpec) -> tuple[Verdict, ...]:
    """What rules in monitor mode would have forbidden."""
    return tuple(verdict for _, verdict in monitored if verdict is not None and _fits(verdict, count, space))


def _says(enforced: Sequence[Pair], on_empty: Instead) -> Mapping[str, Instead]:
    return {rule.name: rule.on_empty or on_empty for rule, _ in enforced}


def _with_instead(constraint: Either, judged: Sequence[Pair], count: int) -> Either:
    """Settle who answers each row in place of its version, if anybody does."""
    emptied = _emptied(constraint)
    if not emptied and not constraint.replaced:
        return constraint
    then = {rule.name: rule.then for rule, _ in judged if isinstance(rule, Support | Confidence)}
    answers: list[list[Instead]] = [[] for _ in range(count)]
    for verdict in constraint.replaced:
        for row in np.flatnonzero(verdict.rows).tolist():
            answers[row].append(then.get(verdict.name, "fallback"))
    for row in emptied:
        answers[row].append(constraint.on_empty(row))
    return replace(constraint, instead=tuple(safest(each) if each else None for each in answers))


def _emptied(constraint: Constraint | BoxConstraint) -> list[int]:
    """Rows of which nothing is left."""
    if isinstance(constraint, BoxConstraint):
        empty = (constraint.low > constraint.high).any(axis=1)
    else:
        if not constraint.by_rule:
            return []
        alive = [constraint.mask[:, part].any(axis=1) for part in columns(constraint.nvec)]
        empty = ~(alive[0] if len(alive) == 1 else np.logical_and.reduce(alive))
    return np.flatnonzero(empty).tolist()
