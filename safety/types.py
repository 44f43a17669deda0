"""What safety says about a batch of rows. Pure.

A rule speaks by a mask over choices, bool [B, N], True for allowed, or by a box over continuous actions, low and high,
float64 [B, D]. Masks and boxes intersect: order does not matter.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt

from policies.types import Bools, Floats, Ints, columns
from safety.facts import Boxed, Masked, MaskedJointly, Replaced, Verdict
from safety.joint import to_indices
from safety.rules import Instead

FallbackReason = Literal[
    "inference_failed",
    "inference_timeout",
    "session_reopening",
    "not_finite",
    "nothing_allowed",
    "no_mass_allowed",
    "check_failed",
    "fallback_only",
    "no_baseline",
    "rule",
    "breaker_open",
]

REQUEST_RULE: Final = "request"  # the name under which a caller's `allowed_actions` shows among the rules


NOTHING_SAID: Final[Mapping[str, Instead]] = {}


@dataclass(frozen=True, slots=True)
class Constraint:
    """The safety filter's answer over choices for B rows.

    mask: bool [B, N], what every rule allows. nvec: the factors' sizes, with sum N. by_rule: for each rule that masked
    anything, what it alone allows. monitored: what rules that only monitor said. replaced: rules that take rows away
    from the version. instead: who answers a row in place of the version, because a rule says so or nothing is left;
    empty: nobody does. explorable: bool [B, N], what exploration may draw, within the mask; None: all of it. says: what
    each rule says about rows of which nothing is left, `otherwise` where it says nothing. factors: where rules speak of
    tuples of choices, the sizes of the factors; nvec is then one number, their product.
    """

    mask: Bools
    nvec: tuple[int, ...]
    by_rule: tuple[tuple[str, Bools], ...] = ()
    monitored: tuple[Verdict, ...] = ()
    replaced: tuple[Replaced, ...] = ()
    instead: tuple[Instead | None, ...] = ()
    explorable: Bools | None = None
    says: Mapping[str, Instead] = field(default_factory=lambda: NOTHING_SAID)
    otherwise: Instead = "fallback"
    factors: tuple[int, ...] = ()

    def rules_against(self, row: int, action: Sequence[float]) -> tuple[str, ...]:
        """Names of the rules that forbid `action`, one index for each factor, in `row`, or that took the row away."""
        if not self.by_rule and not self.replaced:
            return ()
        names = self._forbidding(row, self._at(action))
        return (*names, *(verdict.name for verdict in self.replaced if verdict.rows[row]))

    def monitors_against(self, row: int, action: Sequence[float]) -> tuple[str, ...]:
        """Names of the rules in monitor mode that would have forbidden `action`, or taken the row away."""
        return tuple(verdict.name for verdict in self.monitored if forbids(verdict, row, action, self._sizes))

    def rules_against_all(self, actions: npt.NDArray[Any]) -> list[tuple[str, ...]]:
        """The same as `rules_against` for each row's action, int64 [B, F]."""
        found: list[tuple[str, ...]] = [()] * len(actions)
        if self.by_rule:
            at = self._columns_of(actions)
            allowed = self.mask[np.arange(len(at))[:, None], at]
            rows = np.flatnonzero(~(allowed[:, 0] if at.shape[1] == 1 else allowed.all(axis=1)))
            for row, columns_ in zip(rows.tolist(), at[rows].tolist(), strict=True):
                found[row] = self._forbidding(row, columns_)
        return with_names(found, ((each.name, each.rows) for each in self.replaced))

    def monitors_against_all(self, actions: npt.NDArray[Any]) -> list[tuple[str, ...]]:
        """The same as `monitors_against` for each row's action, int64 [B, F]."""
        said = ((verdict.name, forbidden(verdict, actions, self._sizes)) for verdict in self.monitored)
        return with_names([()] * len(actions), said)

    def nothing_left(self, row: int) -> bool:
        """Whether some factor has no choice left in `row`."""
        return not all(self.mask[row, part].any() for part in columns(self.nvec))

    def on_empty(self, row: int) -> Instead:
        """Who answers `row` where nothing is left, or no target mass on what is left.

        The rules decide that took part: that forbid something of what has nothing left (or else anything in the row).
        """
        parts = columns(self.nvec)
        empty = [part for part in parts if not self.mask[row, part].any()] or parts
        took_part = [name for name, allowed in self.by_rule if any(not allowed[row, part].all() for part in empty)]
        return safest([self.says[name] for name in took_part if name in self.says] or [self.otherwise])

    def recorded(self) -> npt.NDArray[np.generic]:
        """One byte for each choice, [B, N]."""
        return self.mask

    def _forbidding(self, row: int, at: Sequence[int]) -> tuple[str, ...]:
        """Names of the rules that forbid any of these columns of `row`."""
        if len(at) == 1:
            place = row, at[0]
            return tuple([name for name, allowed in self.by_rule if not allowed[place]])
        return tuple([name for name, allowed in self.by_rule if not allowed[row, at].all()])

    @property
    def _sizes(self) -> tuple[int, ...]:
        return self.factors or self.nvec

    def _at(self, action: Sequence[float]) -> list[int]:
        """Columns of an action, one index for each factor."""
        if self.factors:
            return [flat_index(action, self.factors)]
        return [part.start + int(choice) for part, choice in zip(columns(self.nvec), action, strict=True)]

    def _columns_of(self, actions: Ints) -> Ints:
        """Columns of each row's action, int64 [B, F], or [B, 1] of tuples."""
        return to_indices(actions, self.factors)[:, None] if self.factors else by_columns(actions, self.nvec)


@dataclass(frozen=True, slots=True)
class BoxConstraint:
    """The safety filter's answer over a box for B rows.

    low, high: float64 [B, D], what every rule allows; empty where low is above high. by_rule: what each rule that
    narrowed anything allows alone. All else as in Constraint.
    """

    low: Floats
    high: Floats
    by_rule: tuple[tuple[str, Floats, Floats], ...] = ()
    monitored: tuple[Verdict, ...] = ()
    replaced: tuple[Replaced, ...] = ()
    instead: tuple[Instead | None, ...] = ()
    says: Mapping[str, Instead] = field(default_factory=lambda: NOTHING_SAID)
    otherwise: Instead = "fallback"

    def rules_against(self, row: int, action: Sequence[float]) -> tuple[str, ...]:
        """Names of the rules that forbid `action`, D numbers, in `row`, or that took the row away."""
        point = np.asarray(action)
        names = [name for name, low, high in self.by_rule if not ((low[row] <= point) & (point <= high[row])).all()]
        return (*names, *(verdict.name for verdict in self.replaced if verdict.rows[row]))

    def monitors_against(self, row: int, action: Sequence[float]) -> tuple[str, ...]:
        """Names of the rules in monitor mode that would have forbidden `action`, or taken the row away."""
        return tuple(verdict.name for verdict in self.monitored if forbids(verdict, row, action, ()))

    def rules_against_all(self, actions: npt.NDArray[Any]) -> list[tuple[str, ...]]:
        """The same as `rules_against` for each row's action, float64 [B, D]."""
        outside = ((name, ~within(low, actions, high)) for name, low, high in self.by_rule)
        found = with_names([()] * len(actions), outside)
        return with_names(found, ((each.name, each.rows) for each in self.replaced))

    def monitors_against_all(self, actions: npt.NDArray[Any]) -> list[tuple[str, ...]]:
        """The same as `monitors_against` for each row's action, float64 [B, D]."""
        said = ((verdict.name, forbidden(verdict, actions, ())) for verdict in self.monitored)
        return with_names([()] * len(actions), said)

    def nothing_left(self, row: int) -> bool:
        """Whether the box of `row` is empty."""
        return bool((self.low[row] > self.high[row]).any())

    def on_empty(self, row: int) -> Instead:
        """Who answers `row` where nothing is left: the rules decide whose ends crossed."""
        low, high = self.low[row], self.high[row]
        crossed = low > high
        took_part = [
            name
            for name, lowest, highest in self.by_rule
            if (((lowest[row] == low) | (highest[row] == high)) & crossed).any()
        ]
        return safest([self.says[name] for name in took_part if name in self.says] or [self.otherwise])

    def recorded(self) -> npt.NDArray[np.generic]:
        """low and high side by side, float64 [B, 2·D]."""
        return np.concatenate([self.low, self.high], axis=1)


def safest(answers: Sequence[Instead]) -> Instead:
    """Who answers where several rules have a say: the fallback, which is declared safe, unless all say otherwise."""
    return "baseline" if answers and all(answer == "baseline" for answer in answers) else "fallback"


def flat_index(action: Sequence[float], nvec: Sequence[int]) -> int:
    """Where a tuple of choices stands among all of them, the last factor fastest."""
    index = 0
    for choice, n in zip(action, nvec, strict=True):
        index = index * n + int(choice)
    return index


def forbids(verdict: Verdict, row: int, action: Sequence[float], nvec: tuple[int, ...]) -> bool:
    """Whether a rule forbids `action`, as the space has it, in `row`, or takes the row away."""
    match verdict:
        case Masked():
            at = [part.start + int(choice) for part, choice in zip(columns(nvec), action, strict=True)]
            return not verdict.allowed[row, at].all()
        case MaskedJointly():
            return not verdict.allowed[row, flat_index(action, nvec)]
        case Boxed():
            point = np.asarray(action)
            return not ((verdict.low[row] <= point) & (point <= verdict.high[row])).all()
    return bool(verdict.rows[row])


def forbidden(verdict: Verdict, actions: npt.NDArray[Any], nvec: tuple[int, ...]) -> Bools:
    """The same for each row's action, [B, F] or [B, D]: bool [B]."""
    rows = np.arange(len(actions))
    match verdict:
        case Masked():
            return np.asarray(~verdict.allowed[rows[:, None], by_columns(actions, nvec)].all(axis=1))
        case MaskedJointly():
            return np.asarray(~verdict.allowed[rows, to_indices(actions, nvec)])
        case Boxed():
            return ~within(verdict.low, actions, verdict.high)
    return verdict.rows


def by_columns(actions: Ints, nvec: Sequence[int]) -> Ints:
    """Where each row's choices stand among all factors' side by side, int64 [B, F]."""
    return actions if len(nvec) == 1 else actions + np.array([part.start for part in columns(nvec)])


def within(low: Floats, points: Floats, high: Floats) -> Bools:
    """Rows of which no coordinate is outside, bool [B]."""
    return np.asarray(((low <= points) & (points <= high)).all(axis=1))


def with_names(found: list[tuple[str, ...]], said: Iterable[tuple[str, Bools]]) -> list[tuple[str, ...]]:
    """Add each rule's name to what was found of the rows that it is about."""
    for name, rows in said:
        for row in np.flatnonzero(rows).tolist():
            found[row] += (name,)
    return found
