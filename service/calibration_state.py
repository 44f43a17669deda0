"""What all replicas of a policy know of its calibration, and how shipped decisions add to it. Pure.

Duty: between records as the ledger has them and the monitor of `safety/calibration.py`: which space a decision belongs
to, that none is counted twice, which alarms have been raised. It knows no Redis, thread or clock.
Strategy: one monitor per space of actions (a policy may get another one in its life). Their sums, how far each lane has
been looked at and the alarms stand in one `State`, which replicas change one after the other: so what they see together
is one process, as if one worker had made all decisions.
Promise: a decision counts at most once, whatever is shipped again; an honest log raises an alarm with probability
`ALPHA` at most over the life of a state, all spaces, bins and looks together. An alarm stays until a new round.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import msgspec

from safety.calibration import Bin, Calibration, Line, Report, Sums, Tosses
from safety.calibration_choices import Tracked, bins, toss
from service.logged import Decided, Space, choices, decided, points

ALPHA = 0.05
MOST_SPACES = 8  # the i-th one gets 1/(i(i + 1)) of ALPHA
MOST_LANES = 256  # a lane is one life of one worker
MOST_ALARMS = 32


class Chunk(NamedTuple):
    """Decisions that were recorded together, once they are shipped."""

    lane: str
    first_seq: int
    end: int  # the seq after the last
    blob: bytes


class Kept(msgspec.Struct, frozen=True):
    """The monitor of one space. tracked: None over a box."""

    space: Space
    sums: Sums | None = None
    tracked: Tracked | None = None


class Alarm(msgspec.Struct, frozen=True):
    """A line as it was when it was found over its threshold; see `safety.calibration.Line`."""

    at_ms: int
    decisions: int  # in the space, by then
    space: str
    scope: str
    group: str
    bin: str
    hits: int
    expected: float
    s: float
    v: float
    evidence: float
    threshold: float
    impossible: int

    @property
    def name(self) -> tuple[str, ...]:
        return self.space, self.scope, self.group, self.bin


class State(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of one policy. A higher (round, version) is newer.

    monitors: in the order in which their spaces were met. through: lane -> last seq looked at. broken: decisions whose
    record cannot be read. unwatched: decisions of more spaces than there are monitors.
    """

    round: int = 1
    version: int = 0
    monitors: tuple[Kept, ...] = ()
    through: dict[str, int] = {}
    alarms: tuple[Alarm, ...] = ()
    unreadable: int = 0
    unwatched: int = 0

    @property
    def unknown(self) -> int:
        return sum(each.sums.unknown for each in self.monitors if each.sums)

    @property
    def broken(self) -> int:
        return self.unreadable + sum(each.sums.broken for each in self.monitors if each.sums)

    @property
    def alarmed(self) -> bool:
        return bool(self.alarms) or self.broken > 0

    def anew(self) -> State:
        """Begin a new round: nothing is known, but what has been looked at is not looked at again."""
        return State(round=self.round + 1, version=self.version + 1, through=self.through)


encode = msgspec.msgpack.Encoder().encode
_state = msgspec.msgpack.Decoder(State)


def decode(raw: bytes) -> State:
    """Raises ValueError when a release with other bins, or other fields, wrote it."""
    try:
        state = _state.decode(raw)
    except msgspec.MsgspecError as error:
        raise ValueError(str(error)) from error
    Absorption(state)
    return state


class Absorption:
    """A state while decisions are added to it."""

    def __init__(self, state: State) -> None:
        self._state = state
        self._through = dict(state.through)
        self._monitors = {each.space: _Monitor(each, _alpha(at)) for at, each in enumerate(state.monitors)}
        self._unreadable = state.unreadable
        self._unwatched = state.unwatched

    def take(self, chunks: Iterable[Chunk]) -> None:
        """Add decisions, but those that were added before."""
        spaces: dict[Space, list[Decided]] = {}
        for chunk in chunks:
            if chunk.first_seq <= self._through.get(chunk.lane, 0):
                continue
            self._through.pop(chunk.lane, None)  # the lane heard of last stands last
            self._through[chunk.lane] = chunk.end - 1
            for row in self._read(chunk):
                spaces.setdefault(row.space, []).append(row)
        for space, rows in spaces.items():
            self._add(space, rows)

    def state(self, now_ms: int) -> State:
        """Judge. Gives the state after what was taken."""
        alarms = {alarm.name: alarm for alarm in self._state.alarms}
        for space, monitor in self._monitors.items():
            report = monitor.calibration.report()
            for line in report.alarms:
                found = _alarm(space, line, report.decisions, now_ms)
                alarms.setdefault(found.name, found)
        return State(
            round=self._state.round,
            version=self._state.version + 1,
            monitors=tuple(monitor.kept for monitor in self._monitors.values()),
            through=dict(list(self._through.items())[-MOST_LANES:]),
            alarms=tuple(alarms.values())[:MOST_ALARMS],
            unreadable=self._unreadable,
            unwatched=self._unwatched,
        )

    def _read(self, chunk: Chunk) -> list[Decided]:
        try:
            return decided(chunk.blob)
        except msgspec.MsgspecError:
            self._unreadable += chunk.end - chunk.first_seq
            return []

    def _add(self, space: Space, rows: list[Decided]) -> None:
        monitor = self._monitors.get(space)
        if monitor is None and len(self._monitors) >= MOST_SPACES:
            self._unwatched += len(rows)
            return
        try:
            if min(space.sizes) < 1:
                raise ValueError("no space has a size of zero")
            if monitor is None:
                monitor = self._monitors[space] = _Monitor(Kept(space), _alpha(len(self._monitors)))
            monitor.add(rows)
        except (ValueError, IndexError):  # lengths that do not fit each other
            self._unreadable += len(rows)


def report(state: State) -> dict[str, Report]:
    """Judge what is known, by space."""
    monitors = (_Monitor(kept, _alpha(at)) for at, kept in enumerate(state.monitors))
    return {str(each.space): each.calibration.report() for each in monitors}


def strength(state: State) -> float:
    """The largest evidence, as a share of its threshold; 1 raises the alarm."""
    lines = [line for each in report(state).values() for line in each.lines]
    return max((max(0.0, line.evidence) / line.threshold for line in lines), default=0.0)


def view(policy: str, state: State) -> dict[str, Any]:
    """What is known, as JSON has it."""
    return {
        "policy": policy,
        "alarm": state.alarmed,
        "round": state.round,
        "alpha": ALPHA,
        "unknown": state.unknown,
        "broken": state.broken,
        "unwatched": state.unwatched,
        "alarms": [msgspec.to_builtins(alarm) for alarm in state.alarms],
        "spaces": [
            {"space": space, "decisions": each.decisions, "lines": [_line(line) for line in each.lines if line.tosses]}
            for space, each in report(state).items()
        ],
    }


class _Monitor:
    """The monitor of one space."""

    def __init__(self, kept: Kept, alpha: float) -> None:
        self.space = kept.space
        self._tracked: Tracked | None = None
        if not kept.space.continuous:
            self._tracked = kept.tracked or Tracked.of(sum(kept.space.sizes))
        self._alpha = alpha
        self.calibration = Calibration(self._bins, alpha=alpha, sums=kept.sums)

    def add(self, rows: Sequence[Decided]) -> None:
        """Raises ValueError or IndexError when a record contradicts its own sizes; then nothing was added."""
        if self._tracked is None:
            for tosses in self._point_tosses(rows):
                self.calibration.observe(tosses)
            return
        tosses, tracked = toss(choices(rows, self.space.sizes), self._tracked)
        chosen = tracked.columns != self._tracked.columns
        self._tracked = tracked
        self.calibration.observe(tosses)
        if chosen:  # from now on bins have the names of actions
            self.calibration = Calibration(self._bins, alpha=self._alpha, sums=self.calibration.sums)

    @property
    def kept(self) -> Kept:
        return Kept(self.space, self.calibration.sums, self._tracked)

    @property
    def _bins(self) -> tuple[Bin, ...]:
        if self._tracked is not None:
            return bins(self._tracked, sum(self.space.sizes))
        from safety.calibration_points import BINS  # loads scipy: only with the first continuous policy

        return BINS

    def _point_tosses(self, rows: Sequence[Decided]) -> list[Tosses]:
        """Tosses of decisions over a box; versions may have other transforms, and are tossed apart."""
        from safety.calibration_points import toss as toss_points

        apart: dict[tuple[str, bytes], list[Decided]] = {}
        for row in rows:
            if row.record.fallback is None or row.record.log_propensity is None:  # the fallback is no draw
                apart.setdefault((row.record.transform, row.record.bounds), []).append(row)
        before = self.calibration.sums.decisions
        found = []
        for part in apart.values():
            found.append(toss_points(points(part, self.space.sizes[0]), before))
            before += len(found[-1].masses)
        return found


def _alpha(at: int) -> float:
    return ALPHA / ((at + 1) * (at + 2))


def _alarm(space: Space, line: Line, decisions: int, now_ms: int) -> Alarm:
    return Alarm(now_ms, decisions, str(space), line.scope, line.bin.group, line.bin.name, line.hits, line.expected,
                 line.s, line.v, line.evidence, line.threshold, line.impossible)  # fmt: skip


def _line(line: Line) -> dict[str, Any]:
    plain: dict[str, Any] = msgspec.to_builtins(line)
    return plain | {"bin": line.bin.name, "group": line.bin.group, "alarmed": line.alarmed}
