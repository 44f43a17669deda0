"""What the step under way has shown so far: from closed decisions to what the rollout's next move is made of. Pure.

    Outcome -> Book -> Unit -> a Difference for each guard -> Reading -> Verdict -> Evidence

Duty: one step of one rollout: its units, its guards' tests, its sample ratio; what has to be kept so that another
process goes on with it. It knows no stream and no clock.
Strategy: units enter the tests in batches, in the order in which they started, and a test's state is bounded; what is
open is not kept, but read again (`Kept` says from what on).
Promise: a step that is left and gone on with any number of times has counted every unit once.
"""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from shadow.guards import Guard
from shadow.ratio import Ratio
from shadow.rollout import Evidence, Standing
from shadow.sequential import Difference
from shadow.units import Book, Outcome, Plan, Step
from shadow.verdicts import Reading, Verdict, verdict

FEW = 30  # units of the challenger: a step that will have fewer shows nothing
LATE_MS = 60_000  # a producer that dies holds event time back by `max_lag` at most
EARLY_MS = 60_000  # before that, how many there will be is anybody's guess


class Kept(msgspec.Struct, frozen=True, kw_only=True):
    """What is kept of a step. Times are event times."""

    since_ms: int  # units that began before take no part
    guards: dict[str, Difference]
    ratio: Ratio
    place: int  # in α
    challengers: int = 0  # units in the tests
    champions: int = 0
    left_out: dict[str, int] = {}
    begun_ms: int = -1  # units of which the first decision had closed by then are in the ratio
    ripe_ms: int = -1  # units that were ripe by then are in the tests


class Units(msgspec.Struct, frozen=True, kw_only=True):
    """How many there are, for people."""

    challenger: int
    champion: int
    open: int
    left_out: dict[str, int]


class Shares(msgspec.Struct, frozen=True, kw_only=True):
    """The sample ratio, for people."""

    share: float
    meant: float
    challengers: int
    champions: int
    mismatched: bool


class Shown(msgspec.Struct, frozen=True, kw_only=True):
    """What a step has shown, for people. at_ms: when it was written; through_ms: the event time that it reaches."""

    at_ms: int
    through_ms: int
    units: Units
    ratio: Shares
    guards: dict[str, Reading]
    verdict: Verdict
    warnings: list[str]


class Trial:
    """The step under way, as one reader knows it."""

    def __init__(
        self,
        standing: Standing,
        plan: Plan,
        salt: bytes,
        kept: Kept | None,
        known: Mapping[str, int],
        since_ms: int,
        *,
        again: bool = False,
    ) -> None:
        """Begin, or go on. plan: how units are valued. salt: of routing. known: units that are through, by name.

        since_ms: units that began before take no part, where there is no `kept`. again: something may have been counted
        before, and is lost: the test has another place in α, behind those of all steps that are planned. Raises
        ValueError where the step's weight assigns no unit anew.
        """
        self.standing = standing
        self._alpha = standing.plan.budget
        self._guards: tuple[Guard, ...] = standing.plan.measured(standing.returns, standing.margin)
        step = Step(
            champion=standing.champion,
            challenger=standing.version,
            weight=standing.weight,
            since_ms=since_ms if kept is None else kept.since_ms,
            generations=(standing.generation, None),
            floor=standing.floor,
            salt=salt,
        )
        if kept is None:
            fresh: dict[str, Difference] = {each.measure: each.fresh(step.chance) for each in self._guards}
            place = standing.place + (len(standing.plan.steps) if again else 0)
            kept = Kept(since_ms=since_ms, guards=fresh, ratio=Ratio(step.chance), place=place)
        self._kept = kept
        self._readings: dict[str, Reading] | None = None  # of `_kept`, once somebody has asked
        self.book = Book(plan, step, known=dict(known), begun_ms=kept.begun_ms, ripe_ms=kept.ripe_ms)
        self.book.left_out.update(kept.left_out)

    @property
    def kept(self) -> Kept:
        return self._kept

    def add(self, outcome: Outcome) -> None:
        """Add a closed decision; order and repetition do not matter."""
        self.book.add(outcome)

    def settle(self, now_ms: int) -> None:
        """Let event time pass: every decision that was due by then has been added."""
        begun = self.book.begun(now_ms)
        units = self.book.ripe(now_ms)
        challengers = sum(unit.challenger for unit in units)
        known = self._kept
        self._kept = msgspec.structs.replace(
            known,
            ratio=known.ratio.add_many(*begun),
            guards={g.measure: g.add(known.guards[g.measure], units) for g in self._guards} if units else known.guards,
            challengers=known.challengers + challengers,
            champions=known.champions + len(units) - challengers,
            left_out=dict(self.book.left_out),
            begun_ms=max(known.begun_ms, now_ms),
            ripe_ms=max(known.ripe_ms, now_ms),
        )
        if units:
            self._readings = self._read()

    def readings(self) -> dict[str, Reading]:
        """What each guard's test says now. Read once for all units there are: bounds take milliseconds."""
        if self._readings is None:
            self._readings = self._read()
        return self._readings

    def _read(self) -> dict[str, Reading]:
        place = self._kept.place
        return {
            guard.measure: guard.read(self._kept.guards[guard.measure], self._alpha, number, place)
            for number, guard in enumerate(self._guards)
        }

    def evidence(self) -> Evidence:
        """What the next move is made of."""
        readings = self.readings()
        said = verdict(readings.values())
        return Evidence(said, self._kept.challengers, self._mismatched, reason=_reason(readings, said))

    def shown(self, at_ms: int) -> Shown:
        """The same, for people."""
        kept, readings = self._kept, self.readings()
        return Shown(
            at_ms=at_ms,
            through_ms=kept.ripe_ms,
            units=Units(
                challenger=kept.challengers, champion=kept.champions, open=len(self.book), left_out=kept.left_out
            ),
            ratio=Shares(
                share=kept.ratio.share,
                meant=kept.ratio.weight,
                challengers=kept.ratio.challengers,
                champions=kept.ratio.champions,
                mismatched=self._mismatched,
            ),
            guards=readings,
            verdict=verdict(readings.values()),
            warnings=self._warnings(at_ms),
        )

    @property
    def _mismatched(self) -> bool:
        return self._kept.ratio.mismatched(self._alpha.rollback(len(self._guards), self._kept.place))

    def _warnings(self, at_ms: int) -> list[str]:
        plan, kept, found = self.standing.plan, self._kept, []
        waited_ms = at_ms - kept.since_ms
        expected = kept.ratio.challengers * plan.max_duration_s * 1000 / max(waited_ms, 1)
        if waited_ms >= EARLY_MS and expected < FEW:
            found.append(
                f"the step will have some {expected:.0f} units of {self.standing.version}, {FEW} show something"
            )
        for measure, reading in self.readings().items():
            if reading.lost:
                found.append(f"{measure}: {reading.lost} units of {self.standing.version} lie below the declared range")
        known_ms = max(kept.ripe_ms, kept.since_ms)  # a Redis that was emptied tells no time at first
        if known_ms < at_ms - LATE_MS:
            lag_s = (at_ms - known_ms) / 1000
            found.append(f"what closed is known until {lag_s:.0f} s ago: a producer is silent, or the join is late")
        if kept.left_out.get("full"):
            found.append(f"{kept.left_out['full']} decisions were left out: too many units are known")
        return found


def _reason(readings: Mapping[str, Reading], said: Verdict) -> str:
    """Which guards decided, with their numbers."""
    if said is Verdict.ADVANCE:
        return "; ".join(_numbers(name, each) for name, each in readings.items() if each.must_prove)
    if said is Verdict.HOLD:
        waits = [_numbers(name, each) for name, each in readings.items() if each.must_prove and not each.proven]
        return (
            "not shown to be no worse: " + "; ".join(waits) if waits else "no guard is to be proven: a person decides"
        )
    action = said.value
    return "; ".join(_numbers(name, each) for name, each in readings.items() if each.worse and each.action == action)


def _numbers(name: str, reading: Reading) -> str:
    return f"{name} {reading.estimate:+.4g} in [{reading.lower:.4g}, {reading.upper:.4g}], margin {reading.margin:.4g}"
