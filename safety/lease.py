"""The holder's side of a lease: portions of the caps, for one policy of one worker. Pure: no I/O, time is an argument.

    lapsed --ask--> asking --granted--> held --ask--> renewing --granted--> held
       ^---failed-----'                  '---lapse---> lapsed      '--lapse--> asking          any --release--> released

Duty: what may be explored this moment, what to tell the bank (`service/leases.lua`) and what its answer means.
Strategy: nothing is told as a difference. A holder has, for each kind of cap and each window, a ceiling that only the
bank raises and a count of what it has used; both travel as they stand, under a number that grows with each request. So
a request that is lost, or applied without its answer arriving, changes nothing but that a portion lies idle. The bank
counts every ceiling as spent until the holder reports less: who never reports burns its portion at the window's end.
Time runs from before the request left, so the holder's lease ends before the bank's would; what is spent under a window
is bounded by ceilings alone, whatever any clock does.
Promise: the sum of what holders use under a window is at most the sum of what the bank granted under it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final, Literal

from msgspec.structs import replace

from policies.types import Bools, Floats
from safety.bank import TERM_S, Granted, Progress, Purse, Reply, Request
from safety.budget import NOTHING, Allotted, Left, Pace, allot, millionths
from safety.burn import RUNNING, BurnLimit, BurnState, step
from safety.exploration import Exploration, Kind
from safety.pace import Meter, memory_s, pace

RENEW_S: Final = TERM_S / 3  # two renewals may fail before a lease lapses
RETRY_S: Final = 0.2
# A holder without decisions for so long, or a tenth of its longest window, gives its portions back.
IDLE_S: Final = 10.0

StateName = Literal["lapsed", "asking", "held", "renewing", "released"]
Event = Literal["ask", "granted", "failed", "lapse", "release"]

# Every pair that can happen. What is not here is a bug, and raises.
TABLE: dict[tuple[StateName, Event], StateName] = {
    ("lapsed", "ask"): "asking",
    ("lapsed", "release"): "released",
    ("asking", "granted"): "held",
    ("asking", "failed"): "lapsed",
    ("held", "ask"): "renewing",
    ("held", "lapse"): "lapsed",
    ("held", "release"): "released",
    ("renewing", "granted"): "held",
    ("renewing", "failed"): "held",
    ("renewing", "lapse"): "asking",
}


@dataclass(slots=True)
class Portion:
    """One kind, in one window. Invariant: used <= ceiling, but where the bank took the rest away."""

    granted: Granted
    ends_s: float
    acked: int
    used: int = 0
    decisions: int = 0

    @property
    def left(self) -> int:
        return max(0, self.granted.ceiling - self.used)


@dataclass(frozen=True, slots=True)
class News:
    """Decisions made since the bank answered last, and those of them that wanted to explore."""

    decisions: int = 0
    wanting: int = 0

    def less(self, other: News) -> News:
        return News(self.decisions - other.decisions, self.wanting - other.wanting)


@dataclass(frozen=True, slots=True)
class Standing:
    """What a holder may do this moment, for metrics, answers and `/admin`."""

    state: StateName
    burn: BurnState
    left: Left
    pace: Pace
    windows: Mapping[Kind, str]
    progress: Progress
    explores: bool
    closed: bool


@dataclass(frozen=True, slots=True)
class Settled:
    """An allotment and the windows that it was taken from: each decision records them, `60000:29012345` by kind."""

    allotted: Allotted
    windows: Mapping[Kind, str] = field(default_factory=dict)

    @property
    def epsilon(self) -> Floats:
        return self.allotted.epsilon


class Holder:
    """One worker's lease on one policy's exploration. Not for use from several threads."""

    def __init__(self, name: str, exploration: Exploration, generation: int) -> None:
        self.name = name  # of this life of this worker: never the same again
        self.state: StateName = "lapsed"
        self.due_s = float("-inf")  # when to ask next: at once
        self.lapses = 0
        self._wanting, self._all = Meter(0.0), Meter(0.0)
        self._exploration = exploration
        self._returns = False  # portions go back with the next request
        self._portions: dict[Kind, Portion] = {}
        self.configure(exploration, generation)
        self._seq = 0
        self._sent_s = self._until_s = float("-inf")
        self._busy_s: float | None = None  # when a decision last wanted to explore, at first when asking began
        self._news = self._reporting = News()
        self._fleet_rate = 0.0
        self._progress = Progress()
        self._progress_s = 0.0
        self._told = self._burn = RUNNING

    # What may be explored

    def standing(self, now_s: float) -> Standing:
        """Say what is left and how it is paced; nothing without a lease, or while exploration is halted."""
        self._lapse(now_s)
        live = self.state in ("held", "renewing") and self._burn.explores and not self._exploration.freeze
        portions = {kind: each for kind, each in self._portions.items() if now_s < each.ends_s}
        explores = live and len(portions) == len(self._portions)
        return Standing(
            state=self.state,
            burn=self._burn,
            left=Left(**{kind: each.left for kind, each in portions.items()}) if explores else NOTHING,
            pace=Pace(**{kind: self._pace(kind, each, now_s) for kind, each in portions.items()}),
            windows={kind: each.granted.window for kind, each in portions.items()} if self._leased else {},
            progress=self._progress_at(now_s),
            explores=explores,
            closed=any(each.granted.closed for each in portions.values()),
        )

    def allot(self, now_s: float, wanted: Floats, u0: Floats, worst: Floats, expected: Floats) -> Settled:
        """Settle ε for the rows of a batch (see `budget.allot`) and reserve what they take at most."""
        wants = int((wanted > 0.0).sum())
        self._count(len(wanted), wants, now_s)
        now = self.standing(now_s)
        allotted = allot(wanted, u0, worst, expected, now.left, now.pace)
        for kind in now.windows:
            portion = self._portions[kind]
            portion.used += allotted.regret if kind == "regret" else allotted.count
            portion.decisions += len(wanted)
        return Settled(allotted, now.windows)

    def spend(self, settled: Settled, explored: Bools, paid: Floats) -> None:
        """Give back what the draw did not take. explored: bool [B]; paid: float64 [B], the prices of what was drawn."""
        allotted = settled.allotted
        if not (settled.windows and (allotted.count or explored.any())):
            return
        count = int(explored.sum()) - allotted.count
        regret = int(millionths(paid)[explored].sum()) - allotted.regret
        for kind, window in settled.windows.items():
            portion = self._portions.get(kind)
            if portion is not None and portion.granted.window == window:
                portion.used += regret if kind == "regret" else count

    # Talking to the bank

    def configure(self, exploration: Exploration, generation: int) -> None:
        """Go by another document from the next request on; a freeze holds at once. Where caps change, portions of the
        old ones go back first, so that a lowered cap is not passed by what was leased under it.
        """
        if exploration.caps != self._exploration.caps:
            self._returns = True
            self._give_back()
        self._exploration, self._generation = exploration, generation
        windows = [cap.window_ms for cap in exploration.caps]
        self._wanting.memory_s = self._all.memory_s = memory_s(windows)
        self._idle_s = max([IDLE_S, *(window / 10_000 for window in windows)])
        self.due_s = float("-inf")

    def ask(self, now_s: float) -> Request:
        """Begin a request. One at a time: `granted` or `failed` ends it."""
        self._lapse(now_s)
        self._move("ask")
        self._busy_s = now_s if self._busy_s is None else self._busy_s
        if self._idle(now_s):
            self._give_back()
        return self._request(now_s)

    def release(self, now_s: float) -> Request:
        """End for good: nothing is explored any more, all that is left goes back."""
        self._lapse(now_s)
        self._move("release")
        self._give_back()
        return replace(self._request(now_s), release=True)

    def granted(self, reply: Reply) -> None:
        """Take the answer to the last request."""
        self._move("granted")
        self._until_s, self._fleet_rate = self._sent_s + TERM_S, reply.fleet_rate
        before = self._portions
        self._portions = {each.kind: self._portion(before.get(each.kind), each) for each in reply.purses}
        self._progress, self._progress_s = reply.progress, self._sent_s
        self._news = self._news.less(self._reporting)
        self._told = self._burn = reply.burn
        limit = self._exploration.burn
        self._burn = RUNNING if limit is None else step(reply.burn, limit, reply.buckets, reply.now_ms)
        self.due_s = min([self._sent_s + RENEW_S, *(each.ends_s for each in self._portions.values())])

    def failed(self, now_s: float) -> None:
        """The request was not answered, whether or not the bank has applied it."""
        self._move("failed")
        self.due_s = now_s + RETRY_S

    # Inside

    @property
    def _leased(self) -> bool:
        return self.state in ("held", "renewing")

    def _move(self, event: Event) -> None:
        self.state = TABLE[self.state, event]

    def _idle(self, now_s: float) -> bool:
        return self._busy_s is None or now_s - self._busy_s >= self._idle_s

    def _lapse(self, now_s: float) -> None:
        if self._leased and now_s >= self._until_s:
            self._move("lapse")
            self.lapses += 1

    def _count(self, rows: int, wants: int, now_s: float) -> None:
        self._all.add(rows, now_s)
        self._wanting.add(wants, now_s)
        self._news = News(self._news.decisions + rows, self._news.wanting + wants)
        if wants:
            self._busy_s = now_s

    def _pace(self, kind: Kind, portion: Portion, now_s: float) -> float:
        rate, total = self._wanting.rate(now_s), self._all.rate(now_s)
        earns = portion.granted.limit * total / rate if kind == "share" and rate > 0.0 else 0.0
        pool, ends_s = portion.granted.pool, portion.ends_s
        return pace(portion.left, pool, rate, self._fleet_rate, ends_s - now_s, earns)

    def _give_back(self) -> None:
        for each in self._portions.values():
            each.granted = replace(each.granted, ceiling=min(each.granted.ceiling, each.used))

    def _request(self, now_s: float) -> Request:
        if self._returns:  # again: an answer to an earlier request may have come meanwhile
            self._give_back()
            self._returns = False
        self._seq += 1
        self._sent_s, self._reporting = now_s, self._news
        limit: BurnLimit | None = self._exploration.burn
        idle = self._idle(now_s)
        progress = self._progress_at(now_s)
        return Request(
            holder=self.name,
            seq=self._seq,
            generation=self._generation,
            start_now=self._exploration.start == "now",
            caps=self._exploration.caps,
            purses={kind: self._purse(each) for kind, each in self._portions.items()},
            meter_ms=int(self._all.memory_s * 1000),
            rate=0.0 if idle else self._wanting.rate(now_s),
            all_rate=0.0 if idle else self._all.rate(now_s),
            decisions=self._news.decisions,
            wanting=self._news.wanting,
            progress=replace(progress, decisions=progress.decisions - self._news.decisions),
            was=self._told,
            will=self._burn,
            burn_width_ms=0 if limit is None else limit.width_ms,
            burn_long_ms=0 if limit is None else int(limit.long_s * 1000),
        )

    def _purse(self, portion: Portion) -> Purse:
        ceiling = max(portion.granted.ceiling, portion.used)
        return Purse(portion.granted.window, ceiling, portion.used, portion.decisions, portion.acked)

    def _portion(self, before: Portion | None, granted: Granted) -> Portion:
        fresh = Portion(granted, self._sent_s + granted.ends_ms / 1000, self._seq)
        if before is not None and before.granted.window == granted.window:
            fresh.used, fresh.decisions = before.used, before.decisions
        return fresh

    def _progress_at(self, now_s: float) -> Progress:
        """What the bank said last, and what has happened here since."""
        if self._progress.schedules != self._exploration.progress_of:
            return Progress(self._exploration.progress_of, self._news.decisions)
        passed_ms = int(max(0.0, now_s - self._progress_s) * 1000)
        decisions = self._progress.decisions + self._news.decisions
        return Progress(self._progress.schedules, decisions, self._progress.elapsed_ms + passed_ms)
