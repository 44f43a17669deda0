"""The burn-rate halt: exploration stops while explored decisions turn out badly, and comes back carefully. Pure.

    running --burning--> halted --calm--> probing --recovered--> running
                            ^---------------burning---'

Duty: counts of outcomes of explored decisions by time bucket in, a state out. It counts nothing itself.
Strategy: an outcome burns when it is an error, or a reward below `bad_reward`. Two windows, as for error budgets in
Google's SRE workbook (chapter 5): the long one says that it matters, the short one, a twelfth of it, that it still goes
on. Each needs a minimum of outcomes. Outcomes count when they arrive, not when their decision was made, so that rewards
that come late are seen too. Hysteresis: a halt lasts at least `hold_s`; then a probe explores again, and is over after
`min_volume` outcomes: at or below `resume` times the rate exploration is back, else it halts again.
Promise: counts of replicas add up: any order and any grouping of the same outcomes gives the same answer.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Final, Literal

from msgspec import Meta, Struct

StateName = Literal["running", "halted", "probing"]
Event = Literal["burning", "calm", "recovered"]
BUCKETS_PER_SHORT: Final = 10


class BurnLimit(Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """When exploration halts.

    rate: the share of outcomes that may burn. bad_reward: rewards below it burn; None: only errors do. resume: times
    `rate`, at or below which a probe succeeds. hold_s: how long a halt lasts before the probe; None: `short_s`.
    """

    rate: Annotated[float, Meta(gt=0, lt=1)]
    bad_reward: float | None = None
    short_s: Annotated[float, Meta(ge=1, le=86_400)] = 50.0
    long_s: Annotated[float, Meta(ge=1, le=7 * 86_400)] = 600.0
    min_volume: Annotated[int, Meta(ge=1, le=1_000_000)] = 20
    resume: Annotated[float, Meta(ge=0, le=1)] = 0.5
    hold_s: Annotated[float, Meta(ge=1, le=7 * 86_400)] | None = None

    def __post_init__(self) -> None:
        if not self.short_s <= self.long_s <= 60 * self.short_s:
            raise ValueError("`long_s` is 1 to 60 times `short_s`")

    @property
    def width_ms(self) -> int:
        """How wide a bucket is."""
        return max(1, int(self.short_s * 1000 / BUCKETS_PER_SHORT))

    @property
    def hold_ms(self) -> float:
        return (self.short_s if self.hold_s is None else self.hold_s) * 1000

    def burns(self, *, error: bool, reward: float | None) -> bool:
        """Whether one outcome counts as burnt. A reward that is not a number is bad."""
        low = self.bad_reward is not None and reward is not None and not reward >= self.bad_reward
        return error or low


class Bucket(Struct, frozen=True, array_like=True):
    """Outcomes of explored decisions that arrived within one stretch of `width_ms`."""

    index: int  # arrival time in ms // width_ms
    outcomes: int
    burnt: int


class BurnState(Struct, frozen=True, array_like=True):
    """Where the halt stands. since_ms: by Redis's clock."""

    name: StateName = "running"
    since_ms: int = 0

    @property
    def explores(self) -> bool:
        return self.name != "halted"


RUNNING: Final = BurnState()

# Every pair that can happen. What is not here is a bug, and raises.
TABLE: dict[tuple[StateName, Event], StateName] = {
    ("running", "burning"): "halted",
    ("halted", "calm"): "probing",
    ("probing", "burning"): "halted",
    ("probing", "recovered"): "running",
}


@dataclass(frozen=True, slots=True)
class Volume:
    """Outcomes within a window. Invariant: 0 <= burnt <= outcomes."""

    outcomes: int
    burnt: int

    def above(self, rate: float, least: int) -> bool:
        """Whether enough has been seen, and more than `rate` of it burnt."""
        return self.outcomes >= least and self.burnt > rate * self.outcomes


def merge(buckets: Iterable[Bucket]) -> tuple[Bucket, ...]:
    """Add up buckets of the same time, in order of time."""
    sums: dict[int, tuple[int, int]] = {}
    for each in buckets:
        outcomes, burnt = sums.get(each.index, (0, 0))
        sums[each.index] = outcomes + each.outcomes, burnt + each.burnt
    return tuple(Bucket(index, *sums[index]) for index in sorted(sums))


def volume(buckets: Iterable[Bucket], width_ms: int, since_ms: float) -> Volume:
    """Add up what arrived in buckets that began at `since_ms` or later."""
    recent = [each for each in buckets if each.index * width_ms >= since_ms]
    return Volume(sum(each.outcomes for each in recent), sum(each.burnt for each in recent))


def step(state: BurnState, limit: BurnLimit, buckets: Iterable[Bucket], now_ms: int) -> BurnState:
    """Move the state by what the buckets say now."""
    event = _event(state, limit, tuple(buckets), now_ms)
    return state if event is None else BurnState(TABLE[state.name, event], now_ms)


def _event(state: BurnState, limit: BurnLimit, buckets: tuple[Bucket, ...], now_ms: int) -> Event | None:
    short = volume(buckets, limit.width_ms, now_ms - limit.short_s * 1000)
    if state.name == "halted":
        quiet = not short.above(limit.rate * limit.resume, limit.min_volume)
        return "calm" if quiet and now_ms - state.since_ms >= limit.hold_ms else None
    if state.name == "probing":
        probe = volume(buckets, limit.width_ms, max(state.since_ms, now_ms - limit.long_s * 1000))
        if probe.outcomes < limit.min_volume:
            return None
        return "burning" if probe.above(limit.rate * limit.resume, limit.min_volume) else "recovered"
    long = volume(buckets, limit.width_ms, now_ms - limit.long_s * 1000)
    both = short.above(limit.rate, limit.min_volume) and long.above(limit.rate, limit.min_volume)
    return "burning" if both else None
