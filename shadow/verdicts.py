"""What the bounds say about a step of a rollout: roll back, pause, advance, or hold. Pure.

Duty: cut α into shares, read each guard's bounds against its margin, make one verdict of them, and keep the account of
what promotions may have cost. It knows no rollout table: the controller acts, latches, and waits for minimum volumes.
Strategy: two kinds of error, two ways of counting them.
    Rolling back, or pausing, a version that is not worse than the margin: any guard in any step can do it, so their
    shares of α are added up (`Alpha.rollback`).
    Advancing one that is worse: all guards that must prove would have to let it pass, so each has the whole of α
    (intersection-union test, Berger 1982), and a step is only reached by passing those before it, so each step has the
    whole of α too (fixed sequence, Maurer, Hothorn and Lehmacher 1995): the first wrong advance is out of the first
    step in which the version is worse.
Promise: each kind of error has probability α at most over a whole rollout, looks, guards and steps together.
"""

from __future__ import annotations

from collections.abc import Iterable
from enum import StrEnum
from typing import Literal

import msgspec

from shadow.sequential import Difference

Action = Literal["rollback", "pause", "inform"]
RESERVE = 0.1  # of α, for guards and steps that nobody planned: costs the planned ones 0.1 nats


class Verdict(StrEnum):
    ROLLBACK = "rollback"
    PAUSE = "pause"
    ADVANCE = "advance"
    HOLD = "hold"


class Alpha(msgspec.Struct, frozen=True, kw_only=True):
    """α of a whole rollout, with so many guards and steps as are planned; more may come. No place is used twice."""

    total: float = 0.01
    guards: int
    steps: int

    def rollback(self, guard: int, step: int) -> float:
        """Share of the guard and the step at these places, from 0. All shares there can ever be come to `total`."""
        return self.total * portion(guard, self.guards) * portion(step, self.steps)

    @property
    def advance(self) -> float:
        """What each guard and step may use to prove that the version is not worse."""
        return self.total


def portion(place: int, planned: int) -> float:
    """Part of one for a place, from 0: 1 - RESERVE evenly for the planned, RESERVE / (j(j + 1)) for the j-th more.

    Steps that are repeated, after a pause for example, are places of their own.
    """
    if place < planned:
        return (1.0 - RESERVE) / planned
    further = place - planned + 1
    return RESERVE / (further * (further + 1))


class Reading(msgspec.Struct, frozen=True, kw_only=True):
    """One guard's numbers, challenger minus champion, positive is better; in the measure's unit.

    estimate: cut to what can be; that of few units may lie beyond it. worse: the upper bound is below -margin. proven:
    the lower bound is above it, and no unit of the challenger lost more than its range can tell. superior: the same
    against 0.
    """

    estimate: float
    lower: float
    upper: float
    margin: float
    action: Action
    must_prove: bool
    worse: bool
    proven: bool
    superior: bool
    lost: int  # units of the challenger worse than the range's bad end: nothing is proven while there are any


def read(
    difference: Difference,
    *,
    margin: float,
    rollback_alpha: float,
    advance_alpha: float,
    action: Action = "rollback",
    must_prove: bool = True,
) -> Reading:
    """Hold a guard's difference against its margin. `upper` is at the guard's share of α, `lower` at all of it."""
    lower, upper = difference.lower(advance_alpha), difference.upper(rollback_alpha)
    span = difference.high - difference.low
    lost = difference.outside.lost_challenger
    return Reading(
        estimate=min(max(difference.estimate, -span), span),
        lower=lower,
        upper=upper,
        margin=margin,
        action=action,
        must_prove=must_prove,
        worse=upper < -margin,
        proven=lower > -margin and not lost,
        superior=lower > 0.0 and not lost,
        lost=lost,
    )


def verdict(readings: Iterable[Reading]) -> Verdict:
    """Make one verdict of all guards' readings.

    1. A guard that rolls back found it worse: `rollback`. 2. One that pauses did: `pause`. 3. There are guards that
    must prove, and all did: `advance`. 4. Else `hold`. Guards that inform count for nothing, unless they must prove.
    """
    guards = list(readings)
    for action, said in (("rollback", Verdict.ROLLBACK), ("pause", Verdict.PAUSE)):
        if any(guard.worse and guard.action == action for guard in guards):
            return said
    proving = [guard for guard in guards if guard.must_prove]
    return Verdict.ADVANCE if proving and all(guard.proven for guard in proving) else Verdict.HOLD


class Account(msgspec.Struct, frozen=True):
    """What promotions that showed no more than non-inferiority may have cost together, against one margin.

    Ten promotions, each "at most 2 % worse", may be 20 % worse than what was there at first. The account holds the
    champion against the last version that was shown to be better than its predecessor.
    """

    margin: float
    spent: float = 0.0  # Invariant: 0 <= spent; below `margin` if every promotion was judged against `left`

    @property
    def left(self) -> float:
        """The margin for the next rollout; 0: only a version that is shown to be better will do."""
        return max(0.0, self.margin - self.spent)

    def promoted(self, lower: float) -> Account:
        """Charge a promotion with the lower bound it was made on: its loss may be that. Superiority settles all."""
        return Account(self.margin, 0.0 if lower > 0.0 else self.spent - lower)
