"""Open units of the estimators: decisions that wait until their unit is complete, and scores that wait for them. Pure.

Duty: collect closed decisions by episode, key or decision; say which units are complete, in the order in which they
started. It knows no Redis, no tally, and no clock: `closed_ms` is event time through which all decisions are closed.
Strategy: units that started in the same `BUCKET_MS` are complete together, once time has passed the bucket by unit
time, reward window and patience with scores. So whoever reads, in whatever portions, and whoever goes on after him,
adds the same units in the same batches. When more comes than fits, or is dealt with in time, a share is kept, by a hash
of the unit's name; a unit counts only if the least share during its time keeps it: long ones have no smaller chance.
Promise: a unit is given once. Memory is bounded: `MOST_BYTES` of decisions, as much of scores, `MOST_NAMES` names.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field
from hashlib import blake2b
from itertools import groupby
from operator import attrgetter
from typing import Final, Literal

import msgspec

from service.estimate_rows import Said, Seen

BUCKET_MS: Final = 1_000
SPAN_MS: Final = 10_000  # shares are remembered by stretches of this length
MOST_BYTES: Final = 64 << 20
MOST_NAMES: Final = 100_000
LEAST_SHARE: Final = 2.0**-20
_SCALE: Final = 2.0**-64
_LARGEST: Final = 2**64 - 1  # number of an id
Id = tuple[int, int]


class Units(msgspec.Struct, frozen=True, kw_only=True):
    """What a unit is, and when it is complete.

    named: units are episodes or keys, and last `time_ms`; else each decision is one. patience_ms: for scores, which
    come after decisions and need not be as soon as rewards.
    """

    objective: Literal["episode", "step"]
    route_by: Literal["key", "episode", "decision"] | None
    named: bool
    time_ms: int
    window_ms: int
    decisions: int
    patience_ms: int

    @property
    def lasts_ms(self) -> int:
        return self.time_ms if self.named else 0

    @property
    def age_ms(self) -> int:
        """How old a unit is when all of it is known."""
        return self.lasts_ms + self.window_ms + self.patience_ms

    def name_of(self, row: Seen) -> str | None:
        """The unit that a decision belongs to; None: it is one by itself."""
        if self.objective == "episode":
            return f"e:{row.episode}" if row.episode else None
        if self.route_by == "decision":
            return None
        key = f"k:{row.record.key}" if row.record.key is not None else None
        episode = f"e:{row.episode}" if row.episode else None
        if self.route_by is not None:
            return key if self.route_by == "key" else episode
        return key or episode


@dataclass(slots=True)
class Open:
    """A unit under way. Invariant: rows are of one unit, in no order."""

    name: str | None
    first_id: Id  # of the entry that was read first
    start: tuple[int, str]
    rows: list[Seen] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Complete:
    """A unit of which all is known that will be. rows: in their order, and of its time alone."""

    name: str  # what must not stand on both sides of a fold
    start_ms: int
    rows: list[Seen]
    heights: float  # the hash that decides whether a shadow's share keeps it


@dataclass
class Thinning:
    """Shares that were kept, where not all was, by stretches of time."""

    spans: dict[int, float] = field(default_factory=dict)

    def note(self, at_ms: int, share: float) -> None:
        if share < 1.0:
            span = at_ms // SPAN_MS
            self.spans[span] = min(share, self.spans.get(span, 1.0))

    def least(self, start_ms: int, end_ms: int) -> float:
        if not self.spans:
            return 1.0
        return min(self.spans.get(span, 1.0) for span in range(start_ms // SPAN_MS, end_ms // SPAN_MS + 1))

    def forget(self, before_ms: int) -> None:
        for span in [span for span in self.spans if (span + 1) * SPAN_MS <= before_ms]:
            del self.spans[span]


class Scores:
    """Scores of one shadow that wait for their unit, by decision, in the order of their stream."""

    def __init__(self, thinning: Thinning) -> None:
        self.thinning = thinning
        self.read: Id = (0, 0)  # id read last
        self._waiting: OrderedDict[str, tuple[Id, Said]] = OrderedDict()
        self._bytes = 0

    def add(self, stream_id: Id, score: Said) -> int:
        """Take a score; one that stands twice counts once. Gives how many had to go for it."""
        self.read = max(self.read, stream_id)
        self.thinning.note(stream_id[0], score.share)
        if score.decision_id in self._waiting:
            return 0
        self._waiting[score.decision_id] = stream_id, score
        self._bytes += score.size
        gone = 0
        while self._bytes > MOST_BYTES:
            self._bytes -= self._waiting.popitem(last=False)[1][1].size
            gone += 1
        return gone

    def take(self, decisions: Iterable[str]) -> dict[str, Said]:
        found = {}
        for name in decisions:
            held = self._waiting.pop(name, None)
            if held is not None:
                self._bytes -= held[1].size
                found[name] = held[1]
        return found

    def forget(self, before_ms: int) -> None:
        """Drop scores that nobody has asked for."""
        while self._waiting:
            (ms, _), score = next(iter(self._waiting.values()))
            if ms >= before_ms:
                return
            self._waiting.popitem(last=False)
            self._bytes -= score.size

    @property
    def low(self) -> Id:
        """Whoever goes on must read what comes after."""
        return before(next(iter(self._waiting.values()))[0]) if self._waiting else self.read


class Book:
    """Units under way. `add` decisions in the order of their stream, then take buckets while there are any.

    since_ms: decisions before do not count, nor do units that had begun. mark_ms: units that started before are
    through. counted: entries up to here have been counted by whoever went before.
    """

    def __init__(
        self,
        units: Units,
        since_ms: int,
        mark_ms: int,
        *,
        counted: Id = (0, 0),
        through: Iterable[tuple[bytes, int]] = (),
        share: float = 1.0,
        thinning: Thinning | None = None,
        most_bytes: int = MOST_BYTES,
    ) -> None:
        self.units, self.since_ms, self.mark_ms = units, since_ms, mark_ms
        self.share, self.thinning = share, thinning or Thinning()
        self.counts: Counter[str] = Counter()  # of what takes no part, by reason
        self.touched: dict[bytes, int] = {}  # names that are through, seen since they were last kept elsewhere
        self.read: Id = (0, 0)
        self.counted, self._most_bytes = counted, most_bytes
        self.named = units.named  # or a name has appeared
        self._through: OrderedDict[bytes, int] = OrderedDict(through)
        self._open: dict[str, Open] = {}  # in the order in which their first entries stand in the stream
        self._bytes = 0
        self.held = 0

    @property
    def low(self) -> Id:
        """Whoever goes on must read what comes after."""
        return before(next(iter(self._open.values())).first_id) if self._open else self.read

    @property
    def first(self) -> Id | None:
        """The first entry that is needed."""
        return next(iter(self._open.values())).first_id if self._open else None

    def add(self, row: Seen) -> None:
        """Take one closed decision."""
        self.read = max(self.read, row.stream_id)
        name = self.units.name_of(row)
        digest = None if name is None else digest_of(name)
        self.named |= name is not None
        if digest is not None and digest in self._through:
            self._pass(digest, row.at_ms)
            return
        unit = self._open.get(name or row.id)
        why = self._refusal(row)
        if why is not None:
            self._count(why, row)
            if digest is not None:
                self._drop(name or row.id, unit)
                self._pass(digest, row.at_ms)
            return
        if self.share < 1.0:
            self.thinning.note(row.at_ms, self.share)
            if height(name or row.id) >= self.share:
                return
        if unit is None:
            unit = self._open[name or row.id] = Open(name, row.stream_id, (row.at_ms, row.id))
        unit.rows.append(row)
        unit.start = min(unit.start, (row.at_ms, row.id))
        self.held += 1
        self._bytes += row.size
        while self._bytes > self._most_bytes and self.share > LEAST_SHARE:
            self.halve()

    def halve(self) -> None:
        """Keep half as much, of what is held, too."""
        self.share /= 2.0
        times = [row.at_ms for unit in self._open.values() for row in unit.rows]
        for span in range(min(times, default=0) // SPAN_MS, max(times, default=-1) // SPAN_MS + 1):
            self.thinning.note(span * SPAN_MS, self.share)
        for name, unit in list(self._open.items()):
            if height(name) >= self.share:
                self._drop(name, unit)

    def double(self) -> None:
        """Keep twice as much from now on, if there is room for it."""
        if self._bytes < self._most_bytes / 4:
            self.share = min(1.0, self.share * 2.0)

    def buckets(self, closed_ms: int) -> Iterator[list[Complete]]:
        """Take complete units out, those that started together at once, in the order of their start.

        Stop asking when there is no time left: what has not been asked for stays.
        """
        limit_ms = (closed_ms - self.units.age_ms) // BUCKET_MS * BUCKET_MS
        ripe = sorted((unit.start, name) for name, unit in self._open.items() if unit.start[0] < limit_ms)
        for bucket, each in groupby(ripe, key=lambda one: one[0][0] // BUCKET_MS):
            self.mark_ms = max(self.mark_ms, (bucket + 1) * BUCKET_MS)
            found = [self._complete(name) for _, name in each]
            yield [unit for unit in found if unit is not None]

    def settle(self, closed_ms: int) -> None:
        """Let time pass: units that start where everything is complete come too late, and names are forgotten."""
        self.mark_ms = max(self.mark_ms, (closed_ms - self.units.age_ms) // BUCKET_MS * BUCKET_MS)
        self.thinning.forget(self.mark_ms)
        while len(self._through) > MOST_NAMES:
            self._through.popitem(last=False)

    def kept(self) -> dict[bytes, int]:
        """Names that have come through since this was asked last."""
        touched, self.touched = self.touched, {}
        return touched

    def _refusal(self, row: Seen) -> str | None:
        """Why a decision's unit takes no part, as far as its time tells."""
        if row.at_ms < self.since_ms:
            return "begun"
        if row.at_ms < self.mark_ms:
            return "late"
        return None

    def _complete(self, name: str) -> Complete | None:
        unit = self._open.pop(name)
        self._forget(unit)
        rows = self._own(unit.rows)
        first, start_ms = rows[0], unit.start[0]
        if unit.name is not None:
            self._pass(digest_of(name), max(row.at_ms for row in unit.rows))
        if height(name) >= self.thinning.least(start_ms, start_ms + self.units.lasts_ms):
            self.counts["thinned"] += 1
            return None
        if unit.name is not None and self._headless(first):
            self.counts["begun"] += 1
            return None
        key = first.record.key
        fold = first.id if unit.name is None and key is None else f"k:{key}" if key is not None else name
        return Complete(fold, start_ms, rows, shadow_height(first.episode or first.id))

    def _own(self, rows: Collection[Seen]) -> list[Seen]:
        """A unit's rows in their order: those of its time."""
        start_ms = min(row.at_ms for row in rows)
        own = [row for row in rows if not self.units.named or row.at_ms < start_ms + self.units.time_ms]
        own.sort(
            key=attrgetter("step", "at_ms", "id") if self.units.objective == "episode" else attrgetter("at_ms", "id")
        )
        return own[: self.units.decisions] if self.units.objective == "step" else own

    def _headless(self, first: Seen) -> bool:
        """Whether an episode had begun before its first decision that is known."""
        if self.units.objective != "episode":
            return False
        return first.step > 0 or (first.step < 0 and first.at_ms < self.since_ms + self.units.time_ms)

    def _pass(self, digest: bytes, at_ms: int) -> None:
        seen_ms = max(at_ms, self._through.pop(digest, 0))
        self._through[digest] = self.touched[digest] = seen_ms

    def _drop(self, name: str, unit: Open | None) -> None:
        if unit is not None:
            del self._open[name]
            self._forget(unit)

    def _forget(self, unit: Open) -> None:
        self.held -= len(unit.rows)
        self._bytes -= sum(row.size for row in unit.rows)

    def _count(self, why: str, row: Seen) -> None:
        if row.stream_id > self.counted:
            self.counts[why] += 1


def before(stream_id: Id) -> Id:
    """The last id before another."""
    ms, number = stream_id
    return (ms, number - 1) if number else (ms - 1, _LARGEST)


def digest_of(name: str) -> bytes:
    """A name as it is kept once its unit is through."""
    return blake2b(name.encode(), digest_size=8, person=b"sf-through").digest()


def height(name: str) -> float:
    """The hash in [0, 1) that decides whether a unit is kept; it has nothing to do with routing, draws or folds."""
    return int.from_bytes(blake2b(name.encode(), digest_size=8, person=b"sf-estimate").digest(), "big") * _SCALE


def shadow_height(unit: str) -> float:
    """The hash by which shadows keep a share (`shadow.waiting`)."""
    from shadow.waiting import heights

    return float(heights([unit])[0])
