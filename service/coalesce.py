"""Rows that arrive together are decided together: one network call, one spool row, one commit.

Duty: gather rows of one policy into batches and hand each to the pipeline. It knows nothing of what a row is.
Strategy: a batch is cut two turns of the event loop after its first row came (no timer: a lone row waits for nothing;
two turns instead of one fill batches more than twice as full under load), and not while the one before is inferred, or
until it is committed where that is quick: 64 callers then share batches of 53 instead of 37. Each batch is one task,
each part of it one call when it is decided: nothing is made for a row. Batches are cut at 20 ms of predicted inference,
and at `max_batch` rows.
Promise: every row that was put gets its outcome. Rows whose deadline passes before they are drawn are not drawn.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from collections.abc import Callable, Sequence

import structlog

from policies.errors import Overloaded
from service.act import Decider
from service.plan import Group, Outcome, Row

CUT_S = 0.020
# A batch that took less with its commit keeps the next one waiting: an inline network, and a commit that waits for no
# disk and no replica. What takes longer overlaps.
QUICK_S = 0.005

Done = Callable[[list[Outcome] | BaseException], None]  # told the outcomes in order, or what the pipeline raised
Part = tuple[Sequence[Row], Done, float]  # the last: when it is too late to decide on them

log = structlog.get_logger(__name__)


class Coalescer:
    """Batches for one policy's pipeline. Use from the event loop's thread only."""

    def __init__(self, decider: Decider, max_batch: int, monotonic_s: Callable[[], float] = time.monotonic) -> None:
        self.decider = decider
        self._monotonic_s = monotonic_s
        self._max_batch = max_batch
        self._waiting: deque[Part] = deque()
        self._scheduled = False
        self._inferring = False
        self._inferred = 0  # rows
        self._infer_s = 0.0  # what the last inference took
        self._quick = True  # as far as the last batch tells
        self._tasks: set[asyncio.Task[None]] = set()
        self._next: asyncio.Task[None] | None = None  # which the loop alone would forget

    @property
    def limit(self) -> int:
        """Most rows in one batch, by the champion's predicted duration."""
        plan = self.decider.plan
        return min(self._max_batch, plan.versions[plan.routes.champion].engine.rows_within(CUT_S))

    def put(self, rows: Sequence[Row], done: Done, deadline_s: float = math.inf) -> None:
        """Queue rows to be decided in one batch, at most `limit` of them.

        deadline_s: if they cannot be drawn before, none is, nothing is recorded, and `done` is told Overloaded.
        """
        self._waiting.append((rows, done, deadline_s))
        if not self._scheduled:
            self._schedule()

    def submit(self, rows: Sequence[Row], deadline_s: float = math.inf) -> asyncio.Future[list[Outcome]]:
        """Queue rows as `put` does. Gives their outcomes in order."""
        future: asyncio.Future[list[Outcome]] = asyncio.get_running_loop().create_future()

        def done(outcomes: list[Outcome] | BaseException) -> None:
            if future.done():  # a caller who left
                return
            if isinstance(outcomes, BaseException):
                future.set_exception(outcomes)
            else:
                future.set_result(outcomes)

        self.put(rows, done, deadline_s)
        return future

    async def decide(self, rows: Sequence[Row], deadline_s: float = math.inf) -> list[Outcome]:
        """Decide on any number of rows, in as many batches as it takes; what takes several is not left half done."""
        limit = self.limit
        if len(rows) <= limit:
            return await self.submit(rows, deadline_s)
        parts = [self.submit(rows[start : start + limit]) for start in range(0, len(rows), limit)]
        return [outcome for part in parts for outcome in await part]

    @property
    def away(self) -> int:
        """Rows that wait for a network off the loop: one on it would let nobody ask."""
        if not self._inferring:
            return 0
        return self._inferred + sum(len(part[0]) for part in self._waiting)

    def statistics(self) -> dict[str, int]:
        return {"waiting": sum(len(part[0]) for part in self._waiting), "running": len(self._tasks)}

    async def aclose(self) -> None:
        """Wait until every row that was put has its outcome."""
        while self._waiting or self._tasks:
            await asyncio.wait(self._tasks) if self._tasks else await asyncio.sleep(0)

    def _schedule(self) -> None:
        """See to it that what waits is begun, now or when the batch before is far enough."""
        if self._waiting and not (self._scheduled or self._inferring or (self._quick and self._tasks)):
            self._scheduled = True
            asyncio.get_running_loop().call_soon(self._begin)

    def _begin(self) -> None:
        """Start a batch, which is cut when its task begins: one turn later."""
        self._next = asyncio.get_running_loop().create_task(self._run())

    def _cut(self) -> list[Part]:
        self._scheduled = False
        waiting, limit = self._waiting, self.limit
        # Whoever has less time than the network took the last time would be decided too late. Half of that the next
        # time, so that one bad call is forgotten although nobody is let in who could disprove it.
        enough_s = self._monotonic_s() + self._infer_s
        self._infer_s /= 2
        batch: list[Part] = []
        count = 0
        while waiting and (not batch or count + len(waiting[0][0]) <= limit):
            part = waiting.popleft()
            if part[2] <= enough_s:
                _tell(part[1], _late())
            else:
                batch.append(part)
                count += len(part[0])
        return batch

    async def _run(self) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self._inferring = True
        began_s = self._monotonic_s()
        batch: list[Part] = []
        try:
            batch = self._cut()
            groups = await self._infer(batch)
            in_time, groups = _without_late(batch, groups, self._monotonic_s())
            batch = in_time
            _share_out(batch, await self.decider.settle(groups) if groups else [])
        except BaseException as error:
            for _, done, _ in batch:
                _tell(done, error)
            if not (batch and isinstance(error, Exception)):
                raise
        finally:
            self._inferring = False
            self._quick = self._monotonic_s() - began_s < QUICK_S
            self._tasks.discard(task)
            self._schedule()

    async def _infer(self, batch: list[Part]) -> list[Group]:
        rows = [row for rows, _, _ in batch for row in rows]
        self._inferred, began_s = len(rows), self._monotonic_s()
        try:
            return await self.decider.infer(rows) if rows else []
        finally:
            if rows:
                self._infer_s = self._monotonic_s() - began_s
            self._inferring = False
            self._schedule()


def _without_late(batch: list[Part], groups: list[Group], now_s: float) -> tuple[list[Part], list[Group]]:
    """Tell parts whose deadline has passed meanwhile, and go on without their rows."""
    if all(part[2] > now_s for part in batch):
        return batch, groups
    kept: list[int] = []  # rows that go on, by their old places
    in_time, start = [], 0
    for part in batch:
        rows, done, deadline_s = part
        if deadline_s > now_s:
            in_time.append(part)
            kept += range(start, start + len(rows))
        else:
            _tell(done, _late())
        start += len(rows)
    places = {old: new for new, old in enumerate(kept)}
    left = [group.some([i for i, place in enumerate(group.index) if place in places]) for group in groups]
    for group in left:
        group.index = [places[place] for place in group.index]
    return in_time, [group for group in left if group.rows]


def _late() -> Overloaded:
    return Overloaded("there was no time for it before its deadline")


def _share_out(batch: list[Part], outcomes: list[Outcome]) -> None:
    start = 0
    for rows, done, _ in batch:
        end = start + len(rows)
        _tell(done, outcomes[start:end])
        start = end


def _tell(done: Done, outcomes: list[Outcome] | BaseException) -> None:
    try:
        done(outcomes)
    except Exception:  # one caller's trouble is not the others'
        log.exception("answer_failed")
