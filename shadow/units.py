"""From decisions to units: what a rollout compares. Pure.

Duty: collect closed decisions by the thing that routing assigned, say which units are ripe, and what each is worth. It
knows neither Redis nor clocks: `now_ms` is event time, the time through which every producer has shipped.
Strategy: one unit for each thing that was assigned at random, whatever it did since, counted once, for the version it
was assigned to, also when baseline or fallback answered. It is ripe by age alone. What decides whether it takes part
was known before its first decision; anything else would let the versions choose their own witnesses.
Promise: given everything before, a unit that `ripe` returns is of the challenger with probability `Step.chance`.

A key meets the same version again in every step, so a raised weight tells nothing new about keys that were the
challenger's already. Of the others, which lie above `Step.floor`, so many move that the chance is
(weight - floor) / (1 - floor). Episodes and single decisions are new in each step: their floor is 0.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator
from itertools import takewhile
from typing import Literal

import msgspec

from policies.route import BUCKETS, bucket

LIMIT = 500_000  # decisions and known units that a book holds; 450 bytes each when a decision is held, a quarter after


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """One decision whose join has closed. `unit`, `assigned` and `weight` are what routing said."""

    unit: str  # the key, episode or decision that was hashed
    id: str  # of the decision: settles the order within a millisecond
    at_ms: int
    assigned: str
    weight: float  # of the assigned version at the pin, as `Record.weight`
    generation: int
    episode: str = ""
    reward: float | None = None  # None: none came
    quarantined: bool = False
    void: bool = False  # the action was not executed
    overridden: bool = False
    fallback: bool = False
    error: bool = False
    slow: bool = False  # took longer than the latency budget
    ended: bool = False  # it was its episode's last


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """How a policy's units are valued.

    `episode`: the sum of an episode's rewards; of a key's episodes, the first one in the step. `step`: the mean reward
    of the unit's first `unit_decisions`. In both, of decisions up to `unit_time_ms` after the first.
    """

    objective: Literal["episode", "step"]
    unit_time_ms: int
    window_ms: int
    unit_decisions: int = 100
    default_reward: float = 0.0
    worst_reward: float = -math.inf  # low end of the range of rewards; what a quarantined one counts as


class Step(msgspec.Struct, frozen=True, kw_only=True):
    """A stretch of a rollout with one weight, one ε and one pair of versions."""

    champion: str
    challenger: str
    weight: float
    since_ms: int
    generations: tuple[int, int | None]  # first and last control state that belongs to it; None: it goes on
    floor: float = 0.0  # for keys: the largest weight that the challenger had before, in this rollout
    salt: bytes = b""  # routing's; needed where there is a floor

    @property
    def chance(self) -> float:
        """Probability that a unit that takes part is the challenger's. Raises ValueError where it is 0, or 1."""
        floor, top = _buckets(self.floor), _buckets(self.weight)
        if not floor < top < BUCKETS:
            raise ValueError("a step assigns no unit anew; raise the weight further, or begin another rollout")
        return (top - floor) / (BUCKETS - floor)

    def began_after(self, outcome: Outcome) -> bool:
        """Whether a decision, or the episode that it belongs to, is older than the step."""
        return outcome.at_ms < self.since_ms or outcome.generation < self.generations[0]

    def refusal(self, first: Outcome) -> str | None:
        """Why a unit that began with this decision takes no part; None: it does."""
        newest = self.generations[1]
        share = {self.challenger: self.weight, self.champion: 1.0 - self.weight}.get(first.assigned)
        if self.began_after(first):
            return "before"
        if newest is not None and first.generation > newest:
            return "after"
        if share is None or abs(first.weight - share) > 1e-9:
            return "elsewhere"
        floor = _buckets(self.floor)
        return "moved_before" if floor and bucket(self.salt, self.challenger, first.unit) < floor else None


class Unit(msgspec.Struct, frozen=True, kw_only=True):
    """What one assignment came to. Counts are of decisions that belong to the unit."""

    start_ms: int
    order: str  # settles the order of units that started in one millisecond
    assigned: str
    challenger: bool
    weight: float  # probability that it would be the challenger's
    value: float  # -inf where a reward was quarantined that may be as bad as can be
    decisions: int
    overridden: int
    fallback: int
    errors: int
    slow: int
    defaulted: int
    quarantined: int
    void: int
    ended: bool  # its episode ended in time; of no consequence


class Book:
    """Open units of one step, and the names of those that are through.

    `add` takes closed decisions in any order, `ripe` gives units in the order in which they started. For `ripe(now)` to
    be whole, every decision that is older than the reward window must have been added.
    """

    def __init__(
        self,
        plan: Plan,
        step: Step,
        *,
        known: dict[str, int] | None = None,
        begun_ms: int = -1,
        ripe_ms: int = -1,
        limit: int = LIMIT,
    ) -> None:
        """Begin a step. known: `known` of the book before, where units are episodes: those that go on are not new.

        begun_ms, ripe_ms: of the last calls of `begun` and `ripe`, where a step is gone on with: what was counted then
        is not counted again.
        """
        self.plan, self.step = plan, step
        self.left_out: Counter[str] = Counter()  # units, by reason
        self._chance = step.chance
        self._limit = limit
        self._held = 0
        self._new: list[str] = []  # through, and not told yet
        self._open: dict[str, list[Outcome]] = {}
        self._through: dict[str, int] = dict(known or {})
        self._begun_ms, self._through_ms = begun_ms, ripe_ms

    def __contains__(self, name: str) -> bool:
        """Whether a unit is open."""
        return name in self._open

    def __len__(self) -> int:
        """How many units are open."""
        return len(self._open)

    @property
    def known(self) -> dict[str, int]:
        """When each unit, open or through, was last seen."""
        return self._through | {name: rows[-1].at_ms for name, rows in self._open.items()}

    def take_through(self) -> dict[str, int]:
        """Units that are through since this was asked last, and when each was last seen: to go on with elsewhere."""
        names, self._new = self._new, []
        return {name: self._through[name] for name in names if name in self._through}

    def add(self, outcome: Outcome) -> None:
        """Add one closed decision. A repetition, or one after its unit or for a full book, changes nothing."""
        name = outcome.unit
        if self._of_before(outcome):
            return
        if name in self._through:
            self._through[name] = max(self._through[name], outcome.at_ms)
            return
        rows = self._open.get(name)
        if rows is None:
            if outcome.at_ms + self._age(outcome) < self._through_ms:
                return  # it was through when this step was left
            if self._held + len(self._through) >= self._limit:
                self.left_out["full"] += 1
                return
            rows = self._open[name] = []
        at = bisect_left(rows, _order(outcome), key=_order)
        if at < len(rows) and rows[at].id == outcome.id:
            return
        rows.insert(at, outcome)
        self._held += 1
        self._trim(rows)

    def begun(self, now_ms: int) -> tuple[int, int]:
        """How many units that take part have begun since this was asked last: the challenger's, the champion's.

        Each is counted once its first decision must have closed, so that what a version does to rewards, or to how soon
        they come, does not show. Call it before `ripe` with the same time.
        """
        window, counts = self.plan.window_ms, [0, 0]
        for rows in self._open.values():
            if self._begun_ms <= rows[0].at_ms + window < now_ms and self.step.refusal(rows[0]) is None:
                counts[rows[0].assigned != self.step.challenger] += 1
        self._begun_ms = max(self._begun_ms, now_ms)
        return counts[0], counts[1]

    def ripe(self, now_ms: int) -> list[Unit]:
        """Take out the units that are older than `unit_time` and the reward window, those that take part, by start."""
        names = [name for name, rows in self._open.items() if rows[0].at_ms + self._age(rows[0]) < now_ms]
        taken = []
        for name in names:
            rows = self._open.pop(name)
            self._held -= len(rows)
            if name != rows[0].id:  # a decision by itself never comes again
                self._through[name] = rows[-1].at_ms
                self._new.append(name)
            why = self.step.refusal(rows[0])
            if why is None:
                taken.append(self._unit(rows))
            else:
                self.left_out[why] += 1
        return sorted(taken, key=lambda unit: (unit.start_ms, unit.order))

    def forget(self, before_ms: int) -> None:
        """Forget units that are through and were last seen before that: an episode whose pin has ended is a new one."""
        self._through = {name: seen for name, seen in self._through.items() if seen >= before_ms}

    def _of_before(self, outcome: Outcome) -> bool:
        """Whether it is what a key did before this step, which is no part of it: the step's weight deals the key anew.

        An episode that began before keeps its version, and never takes part.
        """
        lasting = outcome.unit not in (outcome.episode, outcome.id)
        return lasting and self.step.began_after(outcome)

    def _age(self, first: Outcome) -> int:
        """How old a unit must be: a decision by itself has nothing to wait for but its reward."""
        alone = first.unit == first.id
        return self.plan.window_ms if alone else self.plan.unit_time_ms + self.plan.window_ms

    def _trim(self, rows: list[Outcome]) -> None:
        """Drop what cannot belong to the unit, however early its first decision turns out to be."""
        while len(rows) > 1 and rows[-1].at_ms >= rows[0].at_ms + self.plan.unit_time_ms:
            rows.pop()
            self._held -= 1
        if self.plan.objective == "step" and len(rows) > self.plan.unit_decisions:
            rows.pop()
            self._held -= 1

    def _unit(self, rows: list[Outcome]) -> Unit:
        first, own = rows[0], list(self._own(rows))
        return Unit(
            start_ms=first.at_ms,
            order=first.id,
            assigned=first.assigned,
            challenger=first.assigned == self.step.challenger,
            weight=self._chance,
            value=self._value(own),
            decisions=len(own),
            overridden=sum(row.overridden for row in own),
            fallback=sum(row.fallback for row in own),
            errors=sum(row.error for row in own),
            slow=sum(row.slow for row in own),
            defaulted=sum(row.reward is None and not row.quarantined and not row.void for row in own),
            quarantined=sum(row.quarantined for row in own),
            void=sum(row.void for row in own),
            ended=any(row.ended for row in own),
        )

    def _own(self, rows: list[Outcome]) -> Iterator[Outcome]:
        """The unit's own decisions: until it is assigned anew, and of its first episode."""
        first = rows[0]
        mine = takewhile(lambda row: row.assigned == first.assigned, rows)
        return (row for row in mine if self.plan.objective == "step" or self._same_episode(first, row))

    @staticmethod
    def _same_episode(first: Outcome, row: Outcome) -> bool:
        return row is first or (first.episode != "" and row.episode == first.episode)

    def _value(self, own: list[Outcome]) -> float:
        rewards = [self._reward(row) for row in own if not row.void]
        if self.plan.objective == "episode":
            return math.fsum(rewards)
        return math.fsum(rewards) / len(rewards) if rewards else self.plan.default_reward

    def _reward(self, row: Outcome) -> float:
        if row.quarantined:
            return self.plan.worst_reward
        return self.plan.default_reward if row.reward is None else row.reward


def _order(outcome: Outcome) -> tuple[int, str]:
    return outcome.at_ms, outcome.id


def _buckets(weight: float) -> int:
    """How many of the router's buckets a weight owns."""
    return math.ceil(round(weight * BUCKETS, 6))
