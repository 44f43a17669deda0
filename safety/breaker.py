"""The breaker of a version: faults trip it, slowness opens it for a while. Pure.

Duty: say, from what inference calls did, whether a version may answer, and who answers when it may not. It counts
calls, not rows, and knows no versions, no clock (seconds are arguments) and no Redis.
Strategy: two machines, each a table: FAULTS stays open until an operator re-arms it; LATENCY opens only while the
baseline keeps its own budget, and closes by probing. An unknown pair of state and event raises.
Promise: docs/breaker.md shows the tables, and a test says that it does.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Set
from enum import StrEnum
from typing import Literal, NamedTuple, TypeVar

# Faulty calls that trip: so many in a row, or so many among the last WINDOW, which is 1 % (design section 7).
IN_A_ROW = 5
FAULTY = 10
WINDOW = 1_000
# Slow calls that open: 10 % of the last 200, so 20 at least. The budget is a 99th percentile to those who set it:
# by chance alone 20 of 200 is a matter of 1e-13, and one stall of the machine (a collection, a page fault) touches few.
LATENCY_WINDOW = 200
SLOW_SHARE = 0.10
SLOW = int(LATENCY_WINDOW * SLOW_SHARE)
# The baseline is judged by its last 20 calls, none older than a minute: what it did before says nothing of now.
BASELINE_CALLS = 20
BASELINE_FRESH_S = 60.0
# Half-open: one call in ten goes to the version, until 20 have gone: a slow version harms a tenth of the calls at most.
PROBE_EVERY = 10
PROBES = 20
# The pause before probing doubles from ten seconds to five minutes, and starts anew once probing has closed.
PAUSE_S = 10.0
LONGEST_PAUSE_S = 300.0

Role = Literal["champion", "challenger", "baseline"]
Who = Literal["champion", "challenger", "baseline", "fallback"]


class Faults(StrEnum):
    CLOSED = "closed"
    OPEN = "open"


class FaultEvent(StrEnum):
    LIMIT = "5 faulty calls in a row, or 10 of the last 1000"
    TOLD = "another replica tripped"
    REARMED = "re-armed by an operator"


class Latency(StrEnum):
    CLOSED = "closed"
    SUSPECT = "suspect"  # slow; whether the baseline keeps its budget is being found out
    OPEN = "open"
    PROBING = "probing"


class LatencyEvent(StrEnum):
    SLOW = "10 % of the last 200 calls over budget"
    FAST = "fewer again"
    BASELINE_KEEPS = "the baseline keeps its budget"
    BASELINE_SLOW = "the baseline is slow too"
    WAITED = "the pause is over"
    PROBE_SLOW = "10 % of the probes over budget"
    PROBES_FAST = "20 probes within budget"
    REARMED = "re-armed by an operator"


class Action(StrEnum):
    """What the caller, or the breaker itself, does on the way into the next state."""

    NONE = "nothing"
    PUBLISH = "publish the trip"  # a generation of the control state, for the other replicas
    FORGET = "count anew"
    TIME_BASELINE = "time the baseline"  # beside the answer, or after it has left


State = TypeVar("State", Faults, Latency)
Event = TypeVar("Event", FaultEvent, LatencyEvent)
Table = Mapping[tuple[State, Event], tuple[State, Action]]

FAULTS: Table[Faults, FaultEvent] = {
    (Faults.CLOSED, FaultEvent.LIMIT): (Faults.OPEN, Action.PUBLISH),
    (Faults.CLOSED, FaultEvent.TOLD): (Faults.OPEN, Action.NONE),
    (Faults.CLOSED, FaultEvent.REARMED): (Faults.CLOSED, Action.FORGET),
    (Faults.OPEN, FaultEvent.LIMIT): (Faults.OPEN, Action.NONE),  # calls under way when it tripped
    (Faults.OPEN, FaultEvent.TOLD): (Faults.OPEN, Action.NONE),
    (Faults.OPEN, FaultEvent.REARMED): (Faults.CLOSED, Action.FORGET),
}
LATENCY: Table[Latency, LatencyEvent] = {
    (Latency.CLOSED, LatencyEvent.SLOW): (Latency.SUSPECT, Action.TIME_BASELINE),
    (Latency.CLOSED, LatencyEvent.REARMED): (Latency.CLOSED, Action.FORGET),
    (Latency.SUSPECT, LatencyEvent.FAST): (Latency.CLOSED, Action.NONE),
    (Latency.SUSPECT, LatencyEvent.BASELINE_KEEPS): (Latency.OPEN, Action.FORGET),
    (Latency.SUSPECT, LatencyEvent.BASELINE_SLOW): (Latency.CLOSED, Action.FORGET),
    (Latency.SUSPECT, LatencyEvent.REARMED): (Latency.CLOSED, Action.FORGET),
    (Latency.OPEN, LatencyEvent.WAITED): (Latency.PROBING, Action.FORGET),
    (Latency.OPEN, LatencyEvent.REARMED): (Latency.CLOSED, Action.FORGET),
    (Latency.PROBING, LatencyEvent.PROBE_SLOW): (Latency.OPEN, Action.FORGET),
    (Latency.PROBING, LatencyEvent.PROBES_FAST): (Latency.CLOSED, Action.FORGET),
    (Latency.PROBING, LatencyEvent.REARMED): (Latency.CLOSED, Action.FORGET),
}
# Who answers in place of whom, the first that may: rows that a challenger may not answer are routed as without it.
INSTEAD: Mapping[Role, tuple[Role, ...]] = {
    "champion": ("champion", "baseline"),
    "challenger": ("challenger", "champion", "baseline"),
    "baseline": ("baseline",),
}


def step(table: Table[State, Event], state: State, event: Event) -> tuple[State, Action]:
    """Give the state after an event, and what to do. Raises ValueError for a pair that cannot be."""
    try:
        return table[state, event]
    except KeyError:
        raise ValueError(f"a breaker that is {state.value} cannot meet: {event.value}") from None


def diagram(table: Table[State, Event], first: State) -> str:
    """Draw a table for mermaid, events that change nothing left out."""
    lines = ["stateDiagram-v2", f"    [*] --> {first.name}"]
    for (one, event), (two, action) in table.items():
        told = "" if action is Action.NONE else f", {action.value}"
        if one is not two:
            lines.append(f"    {one.name} --> {two.name}: {event.value}{told}")
    return "\n".join(lines)


def who(assigned: Role, able: Set[Role]) -> Who:
    """Say who answers for the version that routing assigned. able: roles that are loaded and whose breakers admit."""
    return next((role for role in INSTEAD[assigned] if role in able), "fallback")


class Pace:
    """How many of a version's last `size` calls were over its latency budget."""

    def __init__(self, size: int) -> None:
        self._slow: deque[bool] = deque(maxlen=size)
        self._at_s: deque[float] = deque(maxlen=size)

    def add(self, slow: bool, now_s: float) -> None:
        self._slow.append(slow)
        self._at_s.append(now_s)

    def clear(self) -> None:
        self._slow.clear()
        self._at_s.clear()

    @property
    def slow(self) -> int:
        return sum(self._slow)

    def full_since(self, moment_s: float) -> bool:
        """Whether all of `size` calls have come, none before this moment."""
        return len(self._at_s) == self._at_s.maxlen and self._at_s[0] >= moment_s


class Counts(NamedTuple):
    """What a breaker has seen; for people."""

    faults: Faults
    latency: Latency
    faulty: int  # of the last WINDOW calls
    slow: int  # of the last LATENCY_WINDOW calls


class Breaker:
    """The breaker of one version in one replica.

    Call `admits` once for each inference call it would get, and `observe` after each that it got; the baseline's calls
    go to every breaker's `observe_baseline`. `trip` and `rearm` are the control state's.
    """

    def __init__(self, *, open: bool = False) -> None:
        self.faults = Faults.OPEN if open else Faults.CLOSED
        self.latency = Latency.CLOSED
        self._calls = self._in_a_row = self._asked = self._probes = 0
        self._faulty: deque[int] = deque(maxlen=FAULTY)  # numbers of the last faulty calls
        self._pace = Pace(LATENCY_WINDOW)
        self._baseline = Pace(BASELINE_CALLS)
        self._pause_s, self._until_s = PAUSE_S, 0.0

    def admits(self, now_s: float) -> bool:
        """Whether the version may answer this call. now_s: monotonic."""
        if self.latency is Latency.OPEN and now_s >= self._until_s:
            self._meet(LatencyEvent.WAITED)
        if self.faults is Faults.OPEN or self.latency is Latency.OPEN:
            return False
        if self.latency is not Latency.PROBING:
            return True
        self._asked += 1
        return self._asked % PROBE_EVERY == 0

    def observe(self, now_s: float, *, fault: bool, slow: bool) -> Action:
        """Count one inference call of the version.

        fault: it raised, timed out, or answered with NaN or a wrong shape for states within the version's support.
        slow: it took longer than the version's latency budget. Gives what to do: PUBLISH, TIME_BASELINE or NONE.
        """
        self._calls += 1
        action = self._count_fault() if fault else Action.NONE
        if not fault:
            self._in_a_row = 0
        paced = self._count_time(slow, now_s)
        return paced if action is Action.NONE else action

    def observe_baseline(self, now_s: float, *, slow: bool) -> None:
        """Count one call of the baseline against its own budget. A faulty one is no pace: leave it out."""
        self._baseline.add(slow, now_s)
        self._compare(now_s)

    def trip(self) -> None:
        """Open, as another replica has."""
        self.faults, _ = step(FAULTS, self.faults, FaultEvent.TOLD)

    def rearm(self) -> None:
        """Close both machines, as an operator says."""
        self.faults, _ = step(FAULTS, self.faults, FaultEvent.REARMED)
        self._in_a_row = 0
        self._faulty.clear()
        self._pause_s = PAUSE_S
        self._meet(LatencyEvent.REARMED)

    @property
    def counts(self) -> Counts:
        faulty = sum(number > self._calls - WINDOW for number in self._faulty)
        return Counts(self.faults, self.latency, faulty, self._pace.slow)

    @property
    def wants_baseline(self) -> bool:
        """Whether the baseline is to be timed on a call that it does not answer."""
        return self.latency is Latency.SUSPECT

    def _count_fault(self) -> Action:
        self._in_a_row += 1
        self._faulty.append(self._calls)
        often = len(self._faulty) == FAULTY and self._faulty[0] > self._calls - WINDOW
        if self._in_a_row < IN_A_ROW and not often:
            return Action.NONE
        self.faults, action = step(FAULTS, self.faults, FaultEvent.LIMIT)
        return action

    def _count_time(self, slow: bool, now_s: float) -> Action:
        if self.latency is Latency.OPEN:
            return Action.NONE  # under way when it opened
        self._pace.add(slow, now_s)
        if self.latency is Latency.PROBING:
            return self._probe(now_s)
        if self.latency is Latency.CLOSED and self._pace.slow >= SLOW:
            self._meet(LatencyEvent.SLOW)
            self._compare(now_s)
            return Action.TIME_BASELINE if self.wants_baseline else Action.NONE
        if self.latency is Latency.SUSPECT and self._pace.slow < SLOW:
            self._meet(LatencyEvent.FAST)
        return Action.NONE

    def _probe(self, now_s: float) -> Action:
        self._probes += 1
        if self._pace.slow >= PROBES * SLOW_SHARE:
            self._pause_s = min(2.0 * self._pause_s, LONGEST_PAUSE_S)
            self._until_s = now_s + self._pause_s
            self._meet(LatencyEvent.PROBE_SLOW)
        elif self._probes == PROBES:
            self._pause_s = PAUSE_S
            self._meet(LatencyEvent.PROBES_FAST)
        return Action.NONE

    def _compare(self, now_s: float) -> None:
        """Where the version is suspect and the baseline's pace is known, one of the two is slow."""
        if self.latency is not Latency.SUSPECT or not self._baseline.full_since(now_s - BASELINE_FRESH_S):
            return
        keeps = self._baseline.slow < BASELINE_CALLS * SLOW_SHARE
        self._until_s = now_s + self._pause_s
        self._meet(LatencyEvent.BASELINE_KEEPS if keeps else LatencyEvent.BASELINE_SLOW)

    def _meet(self, event: LatencyEvent) -> None:
        self.latency, action = step(LATENCY, self.latency, event)
        if action is Action.FORGET:
            self._pace.clear()
            self._asked = self._probes = 0
