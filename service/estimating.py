"""EDGE: live estimates of each shadow and each live version, from the streams of transitions and scores.

Duty: read both streams of each policy that has a plan, have complete units added, keep what is known in Redis, tell it.
What a unit is stands in `estimate_units.py`, what it says of a version in `estimate_tallies.py`.
Strategy: the holder of the policy's lease reads and adds; what it knows goes to Redis in one step, if nobody has saved
meanwhile, together with the place from which its successor reads again. So two that believe they lead cost work, not
truth: the slower one's work is dropped. Everybody else reads what was told. Units of one second are added at once, in a
thread, for `WORK_S` of a turn; where that is not enough, half of all units are kept, by a hash, then half of these.
Promise: a unit counts once, whoever reads, dies, or loses an answer. Decisions never wait for this file. A group of the
stream, `surefoot.estimates`, stands at what has to be read again, so that it is not trimmed before.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import msgspec
import structlog

from policies.errors import StoreAway
from service.clock import Clock
from service.estimate_metrics import EstimateMetrics
from service.estimate_rows import Judging, entry_id
from service.estimate_store import EstimateStore, Head, Page, State, page, read_scores
from service.estimate_tallies import Bucket, Line, View, Watched, add, follow, tell
from service.estimate_units import BUCKET_MS, Book, Id, Scores, Thinning, Units
from service.leader import Leader
from service.redis_streams import RedisStreams
from shadow.estimators import Terms
from shadow.gate import Verdict

TURN_S: Final = 1.0
SAVE_S: Final = 2.0  # what a successor does again
PAGE: Final = 128  # some 5 ms of a thread, and 2 ms of Redis
PAGES: Final = 40  # of each stream in a turn
WORK_S: Final = 0.2  # of a thread's time, for each policy and turn
BACKLOG_MS: Final = 30_000  # of complete units: more, and a smaller share is kept
PATIENCE_MS: Final = 5_000  # with scores
SKEW_MS: Final = 60_000  # between clocks of producers and of Redis
OWN: Final = ""  # the reader's own share among those of shadows

log = structlog.get_logger(__name__)
Plans = Callable[[], Mapping[str, Watched | None]]


class Overtaken(Exception):
    """Another worker has saved: what is known here is not what stands."""


@dataclass
class Held:
    """What the leader knows of a policy. Invariant: as `version` in Redis, and what came since."""

    watched: Watched
    asked: str
    units: Units
    terms: Terms
    judging: Judging
    book: Book
    version: int
    lines: dict[str, Line]
    scores: dict[str, Scores]
    counts: Counter[str]
    read: Id  # the entry of `transitions` that was read last
    first: Id | None  # the one that has to come next, where one was read before
    added: int  # how many entries there had ever been up to `book.counted`, or what was read since
    now_ms: int
    closed_ms: int = 0
    mark: tuple[int, Id] | None = None  # a time, and how far to read before everything through it is here
    changed: set[str] = field(default_factory=set)  # labels whose tallies are not in Redis
    gone: set[str] = field(default_factory=set)
    anew: bool = False  # nothing of what stands in Redis is true any more
    dirty: bool = True
    saved_s: float = float("-inf")


class Estimating:
    """The reader of a worker. Use from the event loop's thread only."""

    def __init__(
        self,
        streams: RedisStreams,
        leader: Leader,
        clock: Clock,
        metrics: EstimateMetrics,
        *,
        patience_ms: int = PATIENCE_MS,
        save_s: float = SAVE_S,
        work_s: float = WORK_S,
        page_size: int = PAGE,
    ) -> None:
        self._store = EstimateStore(streams)
        self._leader, self._clock, self._metrics = leader, clock, metrics
        self._patience_ms, self._save_s, self._work_s, self._page = patience_ms, save_s, work_s, page_size
        self._held: dict[str, Held] = {}
        self._views: dict[str, View] = {}
        self._ended: set[str] = set()

    async def run(self, plans: Plans) -> None:
        """Estimate for ever. plans: by policy, as they are at the moment; None: nothing is to be estimated."""
        while True:
            await self.run_once(plans())
            await asyncio.sleep(TURN_S)

    async def run_once(self, plans: Mapping[str, Watched | None]) -> None:
        """Make one turn over all policies. Never raises for what may pass."""
        for policy in {*self._held, *self._views} - plans.keys():
            await self._guarded(policy, None)
        for policy, watched in plans.items():
            await self._guarded(policy, watched)

    def told(self, policy: str) -> View | None:
        """What is known of a policy, a second or two ago; None: nothing is estimated."""
        return self._views.get(policy)

    def view(self, policy: str) -> dict[str, Any]:
        """The same for people: estimates by version, and what was left out."""
        found = self._views.get(policy)
        if found is None:
            return {"policy": policy, "estimates": {}}
        plain: dict[str, Any] = msgspec.to_builtins(found)
        return {"policy": policy, "estimates": plain.pop("versions")} | plain

    def gate_of(self, policy: str, label: str) -> Verdict | None:
        """What the gate before the canary says of a shadow; None: it is no shadow here, or nothing is known yet."""
        found = self._views.get(policy)
        told = None if found is None else found.versions.get(label)
        return None if told is None else told.verdict

    async def _guarded(self, policy: str, watched: Watched | None) -> None:
        """A policy's turn. What was not saved is read again, after whatever happened."""
        done = False
        try:
            if watched is None:
                await self._end(policy)
            elif await self._leader.leads(policy):
                self._ended.discard(policy)
                await self._lead(policy, watched)
            else:
                self._held.pop(policy, None)
                self._ended.discard(policy)
                self._show(policy, await self._store.view(policy))
            done = True
        except Overtaken:
            log.info("estimates_overtaken", policy=policy)
        except StoreAway as error:
            log.debug("estimates_wait", policy=policy, reason=error.detail)
        except Exception:
            log.exception("estimates_failed", policy=policy)
        finally:
            if not done:
                self._held.pop(policy, None)

    async def _end(self, policy: str) -> None:
        """Forget a policy for which nothing is estimated any more, once."""
        self._held.pop(policy, None)
        self._show(policy, None)
        if policy not in self._ended and await self._leader.leads(policy):
            if await self._store.end(policy):
                log.info("estimates_end", policy=policy)
            self._ended.add(policy)

    async def _lead(self, policy: str, watched: Watched) -> None:
        held = self._held.get(policy)
        if held is None or held.watched != watched:
            held = self._held[policy] = await self._follow(policy, watched, held)
        if not await self._read(policy, held):
            held = self._held[policy] = await self._begin(policy, watched, held.version, named=held.units.named)
        elif _names_appear(held):
            held = self._held[policy] = await self._begin(policy, watched, held.version, named=True)
        else:
            await self._ripen(held)
        if held.dirty and self._clock.monotonic_s() - held.saved_s >= self._save_s:
            await self._save(policy, held)

    # -- where to begin, where to go on

    async def _follow(self, policy: str, watched: Watched, held: Held | None) -> Held:
        """Go on with what is known, as far as the question is still the same."""
        if held is not None and held.dirty:
            await self._save(policy, held)
        state = await self._store.load(policy)
        head = state.head
        if head is None or head.asked != _asked(watched, head.named, self._patience_ms):
            return await self._begin(policy, watched, state.version, named=False)
        return await self._resume(policy, watched, state, head)

    async def _begin(self, policy: str, watched: Watched, version: int, *, named: bool) -> Held:
        """Begin anew, with decisions from now on."""
        end, added, now_ms = await self._store.begin(policy)
        asked = _asked(watched, named, self._patience_ms)
        head = Head(
            asked=asked, named=named, since_ms=now_ms, mark_ms=now_ms, low=end, first=None, counted=end, added=added
        )
        log.info("estimates_begin", policy=policy, since_ms=now_ms)
        held = self._of(watched, State(version, head), head, now_ms)
        held.anew = True
        await self._save(policy, held)
        return held

    async def _resume(self, policy: str, watched: Watched, state: State, head: Head) -> Held:
        _, _, now_ms = await self._store.begin(policy)
        return self._of(watched, state, head, now_ms)

    def _of(self, watched: Watched, state: State, head: Head, now_ms: int) -> Held:
        units = watched.units(head.named, self._patience_ms)
        terms = watched.terms(units)
        thinnings = {name: Thinning(dict(spans)) for name, spans in head.thinnings.items()}
        book = Book(
            units,
            head.since_ms,
            head.mark_ms,
            counted=head.counted,
            through=state.through,
            share=head.share,
            thinning=thinnings.get(OWN),
        )
        book.read = head.low
        lines = follow(state.lines, watched, terms, now_ms)
        known = {label for label, line in lines.items() if state.lines.get(label) is line}
        scores: dict[str, Scores] = {}
        for label in watched.shadows:
            on = label in known and label in head.scores
            scores[label] = Scores(thinnings.get(label, Thinning()) if on else Thinning())
            scores[label].read = head.scores[label] if on else (now_ms - SKEW_MS, 0)
        return Held(
            watched=watched,
            asked=head.asked,
            units=units,
            terms=terms,
            judging=watched.judging(terms),
            book=book,
            version=state.version,
            lines=lines,
            scores=scores,
            counts=Counter(head.counts),
            read=head.low,
            first=head.first,
            added=head.added,
            now_ms=now_ms,
            changed=set(lines) - known,
            gone=set(state.lines) - set(lines),
        )

    # -- reading

    async def _read(self, policy: str, held: Held) -> bool:
        """Read what is there, for a bounded time. Gives False when entries are gone that were still needed."""
        with_state = bool(held.judging.features)
        for _ in range(PAGES):
            reply = await self._store.read(policy, held.read, self._page, with_state)
            found = await asyncio.to_thread(page, reply)
            if _torn(held, found, self._page):
                log.warning("estimates_torn", policy=policy, group=found.grouped)
                return False
            self._take(held, found)
            if len(found.ids) < self._page:
                break
        caught_up = [await self._read_scores(policy, held, label) for label in held.scores]
        if held.mark is not None and held.read >= held.mark[1] and all(caught_up):
            held.closed_ms, held.mark = max(held.closed_ms, held.mark[0]), None
        return True

    def _take(self, held: Held, found: Page) -> None:
        held.now_ms = found.now_ms
        if held.mark is None:
            held.mark = found.closed_ms, found.last
        for row in found.rows:
            held.book.add(row)
        held.counts["unreadable"] += sum(each > held.book.counted for each in found.unreadable)
        if found.ids:
            held.added += sum(each > held.book.counted for each in found.ids)
            held.read = held.book.read = found.ids[-1]
            held.first, held.dirty = None, True

    async def _read_scores(self, policy: str, held: Held, label: str) -> bool:
        """Read a shadow's scores. Gives whether all were read."""
        scores = held.scores[label]
        for _ in range(PAGES):
            entries = await self._store.scores(policy, label, scores.read, self._page)
            for stream_id, score in await asyncio.to_thread(read_scores, entries):
                held.counts["scores_dropped"] += scores.add(stream_id, score)
            if entries:
                scores.read = max(scores.read, entry_id(entries[-1][0]))
            if len(entries) < self._page:
                return True
        return False

    # -- adding

    async def _ripen(self, held: Held) -> None:
        """Add complete units, for `work_s` of a thread's time."""
        book, spent_s, before = held.book, 0.0, held.book.mark_ms
        for units in book.buckets(held.closed_ms):
            if units:
                ids = [row.id for unit in units for row in unit.rows]
                bucket = Bucket(
                    units,
                    {label: scores.take(ids) for label, scores in held.scores.items()},
                    {label: scores.thinning for label, scores in held.scores.items()},
                )
                held.lines, took_s = await asyncio.to_thread(_timed, held.lines, bucket, held.units, held.judging)
                held.changed |= set(held.lines)
                spent_s += took_s
            if spent_s >= self._work_s:
                break
        else:
            book.settle(held.closed_ms)
        self._pace(held, spent_s)
        complete_ms = book.mark_ms
        for scores in held.scores.values():
            scores.thinning.forget(complete_ms)
            scores.forget(complete_ms - SKEW_MS)
        held.dirty |= book.mark_ms != before

    def _pace(self, held: Held, spent_s: float) -> None:
        """Keep less when complete units pile up, and more when there is time."""
        behind_ms = held.closed_ms - held.units.age_ms - BUCKET_MS - held.book.mark_ms
        if spent_s >= self._work_s and behind_ms > BACKLOG_MS:
            held.book.halve()
        elif held.book.share < 1.0 and spent_s < self._work_s / 4:
            held.book.double()

    async def _save(self, policy: str, held: Held) -> None:
        """Write what is known. Raises Overtaken when somebody else has written: the next turn goes on from there."""
        book = held.book
        thinnings = {label: scores.thinning.spans for label, scores in held.scores.items()} | {OWN: book.thinning.spans}
        head = Head(
            asked=held.asked,
            named=held.units.named,
            since_ms=book.since_ms,
            mark_ms=book.mark_ms,
            low=book.low,
            first=book.first,
            counted=max(book.read, book.counted),
            added=held.added,
            share=book.share,
            counts={why: n for why, n in (held.counts + book.counts).items() if n},
            scores={label: scores.low for label, scores in held.scores.items()},
            thinnings={label: spans for label, spans in thinnings.items() if spans},
        )
        told = await asyncio.to_thread(tell, held.lines, held.watched.plan)
        view = View(
            at_ms=held.now_ms,
            since_ms=head.since_ms,
            through_ms=head.mark_ms,
            share=head.share,
            waiting=book.held,
            left_out=head.counts,
            versions=told,
        )
        changed = {label: held.lines[label] for label in held.changed if label in held.lines}
        names = book.kept()
        if not await self._store.save(policy, held.version, head, view, names, changed, held.gone, anew=held.anew):
            raise Overtaken
        held.version += 1
        held.changed, held.gone, held.dirty, held.anew = set(), set(), False, False
        held.saved_s = self._clock.monotonic_s()
        self._show(policy, view)

    def _show(self, policy: str, view: View | None) -> None:
        if view is None:
            self._views.pop(policy, None)
        else:
            self._views[policy] = view
        self._metrics.tell(policy, view)


def _timed(lines: Mapping[str, Line], bucket: Bucket, units: Units, judging: Judging) -> tuple[dict[str, Line], float]:
    began_s = time.thread_time()
    return add(lines, bucket, units, judging), time.thread_time() - began_s


def _torn(held: Held, found: Page, most: int) -> bool:
    """Whether entries are gone that have to be read, or read again: streams are trimmed from their beginning."""
    if not found.grouped or (held.first is not None and found.ids[:1] != [held.first]):
        return True
    news = sum(each > held.book.counted for each in found.ids)
    return len(found.ids) < most and held.added + news != found.added


def _names_appear(held: Held) -> bool:
    """Whether there are keys or episodes, and nobody knew: units are another thing then."""
    return not held.units.named and held.book.named


def _asked(watched: Watched, named: bool, patience_ms: int) -> str:
    """What is asked, in words that are equal when the question is."""
    units = watched.units(named, patience_ms)
    terms = watched.terms(units)
    return repr((units, terms, watched.judging(terms), watched.reward.default))
