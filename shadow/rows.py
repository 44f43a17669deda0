"""Logged decisions as the estimators read them: columns, cut into units. Pure.

Duty: the columns of n decisions and of the k units (episodes, or keys) that they belong to, checked; and how one unit
is made of decisions that came one by one. It knows no record, stream or version.
Strategy: rows of a unit stand together, in the order of their steps; units stand in the order in which they started. An
episode of which a part is not known is cut before that part: what came before stays, and `known` says that its return
is not. Dropping such episodes would favour versions whose good episodes are the ones that are kept.
Promise: what a `Rows` holds are numbers that the formulas may be applied to; all else was refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from policies.types import Bools, Floats, Ints

_TOLERANCE = 1e-6  # how far a distribution may be from a sum of one


@dataclass(frozen=True, eq=False, slots=True)
class Choices:
    """What a model of rewards needs besides. Points have none.

    actions: int64 [n], the executed one. targets, behaviours: float64 [n, A], π_M and what was drawn from. features:
    float64 [n, d], what a reward may depend on. values: float64 [n, A], the version's own q; a regressor and no more.
    """

    actions: Ints
    targets: Floats
    behaviours: Floats
    features: Floats
    values: Floats | None = None

    def part(self, rows: slice | Bools) -> Choices:
        """Some of the rows."""
        values = None if self.values is None else self.values[rows]
        return Choices(self.actions[rows], self.targets[rows], self.behaviours[rows], self.features[rows], values)


@dataclass(frozen=True, eq=False, slots=True)
class Rows:
    """n logged decisions in k units.

    names: [k], what must not stand on both sides of a fold: the key, or the episode where there is no key. starts:
    int64 [k], each unit's first row. targets: float64 [n], π_M of the executed action under the logged mask, without
    exploration. propensities: float64 [n], the probability that it was drawn with. rewards: float64 [n]. unsupported:
    float64 [n], mass of π_M where the log could not go. disagrees: bool [n], the version would do another thing than
    the champion; matched: bool [n], and the log happened to do it. known: bool [k], nothing of the unit is missing.
    """

    names: tuple[str, ...]
    starts: Ints
    targets: Floats
    propensities: Floats
    rewards: Floats
    unsupported: Floats
    disagrees: Bools
    matched: Bools
    known: Bools
    choices: Choices | None = None

    def __post_init__(self) -> None:
        """Raise ValueError for columns that do not fit together, and for numbers that are no probabilities."""
        n, k = len(self.rewards), len(self.names)
        by_row = (self.targets, self.propensities, self.rewards, self.unsupported, self.disagrees, self.matched)
        if any(each.shape != (n,) for each in by_row) or any(each.shape != (k,) for each in (self.starts, self.known)):
            raise ValueError("columns of different lengths")
        if (n and not k) or (k and self.starts[0] != 0) or (self.lengths < 0).any():
            raise ValueError("units begin at row 0, one after the other")
        if not (np.isfinite(self.rewards).all() and _within(self.propensities) and (self.propensities > 0.0).all()):
            raise ValueError("each row needs a reward, and a propensity in (0, 1]")
        if not (_within(self.targets) and _within(self.unsupported)):
            raise ValueError("target probabilities and unsupported shares lie in [0, 1]")
        if self.choices is not None:
            _check(self.choices, n)
            _agree(self, self.choices)

    @property
    def lengths(self) -> Ints:
        """Rows of each unit, int64 [k]."""
        return np.diff(self.starts, append=len(self.rewards))

    @property
    def units(self) -> Ints:
        """The unit of each row, int64 [n]."""
        return np.repeat(np.arange(len(self.names)), self.lengths)

    def part(self, first: int, last: int) -> Rows:
        """Units first..last - 1."""
        ends = np.append(self.starts, len(self.rewards))
        rows = slice(int(ends[first]), int(ends[last]))
        return Rows(
            names=self.names[first:last],
            starts=self.starts[first:last] - rows.start,
            targets=self.targets[rows],
            propensities=self.propensities[rows],
            rewards=self.rewards[rows],
            unsupported=self.unsupported[rows],
            disagrees=self.disagrees[rows],
            matched=self.matched[rows],
            known=self.known[first:last],
            choices=None if self.choices is None else self.choices.part(rows),
        )

    @classmethod
    def chosen(
        cls,
        names: Sequence[str],
        starts: npt.ArrayLike,
        rewards: npt.ArrayLike,
        choices: Choices,
        *,
        champion: npt.ArrayLike,
        known: npt.ArrayLike | None = None,
    ) -> Rows:
        """Make rows of whole distributions; support and agreement follow from them.

        champion: int64 [n], what the champion would have done, or -1 where that is not known. The version "would do"
        its most probable action, the lowest of equals. An action of probability zero in `behaviours` that was executed
        contradicts the record and raises ValueError.
        """
        rows, wanted = np.arange(len(choices.actions)), choices.targets.argmax(axis=1)
        others = np.asarray(champion, np.int64)
        disagrees = (others >= 0) & (wanted != others)
        return cls(
            names=tuple(names),
            starts=np.asarray(starts, np.int64),
            targets=choices.targets[rows, choices.actions],
            propensities=choices.behaviours[rows, choices.actions],
            rewards=np.asarray(rewards, np.float64),
            unsupported=np.minimum(np.where(choices.behaviours > 0.0, 0.0, choices.targets).sum(axis=1), 1.0),
            disagrees=disagrees,
            matched=disagrees & (choices.actions == wanted),
            known=np.ones(len(names), np.bool_) if known is None else np.asarray(known, np.bool_),
            choices=choices,
        )


@dataclass(frozen=True, eq=False, slots=True)
class Step:
    """One logged decision. reward, propensity: None where not known. The rest: as the columns of `Rows`."""

    step: int
    target: float
    propensity: float | None
    reward: float | None
    unsupported: float = 0.0
    disagrees: bool = False
    matched: bool = False
    switched: bool = False
    action: int = -1
    targets: Floats | None = None
    behaviours: Floats | None = None
    features: Floats | None = None
    values: Floats | None = None


@dataclass(frozen=True, eq=False, slots=True)
class Unit:
    """One episode, or one key with its first decisions. whole: nothing comes after its last step.

    Whole is an episode that was terminated or truncated, or has reached the age at which units are valued; one that
    was lost is not. A truncated one is worth what it earned: a unit is valued by its return, and nothing is
    bootstrapped beyond it.
    """

    name: str
    steps: Sequence[Step]
    whole: bool = True


def assemble(units: Sequence[Unit], *, sequential: bool) -> Rows:
    """Make rows of units in the order of their start.

    sequential: units are episodes. Each is cut before a step that is missing (steps count from 0), that another version
    took over (`switched`), or that has no reward or propensity. Otherwise a step without reward or propensity is left
    out, and the others stay. A unit of which nothing is left still counts as one that is not known.
    """
    kept = [_chain(unit.steps) if sequential else [each for each in unit.steps if _told(each)] for unit in units]
    steps = [step for some in kept for step in some]
    return Rows(
        names=tuple(unit.name for unit in units),
        starts=np.cumsum([0, *(len(some) for some in kept)], dtype=np.int64)[:-1],
        targets=_column([each.target for each in steps]),
        propensities=_column([each.propensity for each in steps]),
        rewards=_column([each.reward for each in steps]),
        unsupported=_column([each.unsupported for each in steps]),
        disagrees=np.array([each.disagrees for each in steps], np.bool_),
        matched=np.array([each.matched for each in steps], np.bool_),
        known=np.array(
            [unit.whole and len(unit.steps) == len(some) > 0 for unit, some in zip(units, kept, strict=True)], np.bool_
        ),
        choices=_choices(steps),
    )


def _chain(steps: Sequence[Step]) -> list[Step]:
    """The steps up to the first that is not known, or not this version's."""
    chain: list[Step] = []
    for each in steps:
        if each.step != len(chain) or not _told(each) or (each.switched and chain):
            break
        chain.append(each)
    return chain


def _told(step: Step) -> bool:
    return step.reward is not None and step.propensity is not None


def _choices(steps: Sequence[Step]) -> Choices | None:
    """The columns of a model, if each step has them."""
    if not steps or any(each.targets is None or each.behaviours is None or each.features is None for each in steps):
        return None
    owned = all(each.values is not None for each in steps)
    return Choices(
        actions=np.array([each.action for each in steps], np.int64),
        targets=_column([each.targets for each in steps]),
        behaviours=_column([each.behaviours for each in steps]),
        features=_column([each.features for each in steps]),
        values=_column([each.values for each in steps]) if owned else None,
    )


def _column(values: object) -> Floats:
    return np.asarray(values, np.float64)


def _within(values: Floats) -> bool:
    return bool(((values >= 0.0) & (values <= 1.0 + _TOLERANCE)).all())


def _check(choices: Choices, n: int) -> None:
    shape = choices.targets.shape
    if len(shape) != 2 or choices.behaviours.shape != shape or choices.actions.shape != (n,) or shape[0] != n:
        raise ValueError("choices of different shapes")
    if choices.features.ndim != 2 or len(choices.features) != n or not np.isfinite(choices.features).all():
        raise ValueError("each row needs its features, finite numbers")
    if choices.values is not None and (choices.values.shape != shape or not np.isfinite(choices.values).all()):
        raise ValueError("each row needs its values, finite numbers")
    if ((choices.actions < 0) | (choices.actions >= shape[1])).any():
        raise ValueError("an action that does not exist")
    for each in (choices.targets, choices.behaviours):
        if not ((each >= 0.0).all() and (np.abs(each.sum(axis=1) - 1.0) <= _TOLERANCE).all()):
            raise ValueError("targets and behaviours are distributions")


def _agree(rows: Rows, choices: Choices) -> None:
    """The executed action's numbers are the distributions', or a control variate would not have mean zero."""
    each = np.arange(len(choices.actions))
    for column, table in ((rows.targets, choices.targets), (rows.propensities, choices.behaviours)):
        if not np.allclose(column, table[each, choices.actions], rtol=1e-6, atol=1e-12):
            raise ValueError("an executed action whose probability is not what its distribution says")
