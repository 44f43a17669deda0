"""Rows that arrive together are decided together: one network call, one spool row, one commit.

Duty: gather rows of one policy into batches and hand each to the pipeline. It knows nothing of what a row is.
Strategy: a batch is cut two turns of the event loop after its first row came (no timer: a lone row waits for nothing;
two turns instead of one fill batches more than twice as full under load), and not while the one before is inferred, or
until it is committed where that is quick: 64 callers then share batches of 53 instead of 37. Each batch is one task,
each part of it one call when it is decided: nothing is made for a row. Batches are cut at 20 ms of predicted inference,
and at `max_batch` rows.
Promise: every row that was put gets its outcome.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence

import structlog

from service.act import Decider
from service.plan import Outcome, Row

CUT_S = 0.020
# A batch that took less with its commit keeps the next one waiting: an inline network, and a commit that waits for no
# disk and no replica. What takes longer overlaps.
QUICK_S = 0.005

Done = Callable[[Sequence[Outcome] | BaseException], None]  # told the outcomes in order, or what the pipeline raised
Part = tuple[Sequence[Row], Done]

log = structlog.get_logger(__name__)


class Coalescer:
    """Batches for one policy's pipeline. Use from the event loop's thread only."""

    def __init__(self, decider: Decider, max_batch: int) -> None:
        self.decider = decider
        self._max_batch = max_batch
        self._waiting: deque[Part] = deque()
        self._scheduled = False
        self._inferring = False
        self._quick = True  # as far as the last batch tells
        self._tasks: set[asyncio.Task[None]] = set()
        self._next: asyncio.Task[None] | None = None  # which the loop alone would forget

    @property
    def limit(self) -> int:
        """Most rows in one batch, by the champion's predicted duration."""
        plan = self.decider.plan
        return min(self._max_batch, plan.versions[plan.routes.champion].engine.rows_within(CUT_S))

    def put(self, rows: Sequence[Row], done: Done) -> None:
        """Queue rows to be decided in one batch, at most `limit` of them."""
        self._waiting.append((rows, done))
        if not self._scheduled:
            self._schedule()

    def submit(self, rows: Sequence[Row]) -> asyncio.Future[Sequence[Outcome]]:
        """Queue rows as `put` does. Gives their outcomes in order."""
        future: asyncio.Future[Sequence[Outcome]] = asyncio.get_running_loop().create_future()

        def done(outcomes: Sequence[Outcome] | BaseException) -> None:
            if future.done():  # a caller who left
                return
            if isinstance(outcomes, BaseException):
                future.set_exception(outcomes)
            else:
                future.set_result(outcomes)

        self.put(rows, done)
        return future

    async def decide(self, rows: Sequence[Row]) -> list[Outcome]:
        """Decide on any number of rows, in as many batches as it takes."""
        limit = self.limit
        parts = [self.submit(rows[start : start + limit]) for start in range(0, len(rows), limit)]
        return [outcome for part in parts for outcome in await part]

    def statistics(self) -> dict[str, int]:
        return {"waiting": sum(len(rows) for rows, _ in self._waiting), "running": len(self._tasks)}

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
        waiting, limit = self._waiting, self.limit
        self._scheduled = False
        batch = [waiting.popleft()]
        count = len(batch[0][0])
        while waiting and (count := count + len(waiting[0][0])) <= limit:
            batch.append(waiting.popleft())
        return batch

    async def _run(self) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self._inferring = True
        began_s = task.get_loop().time()
        batch = self._cut()
        try:
            _share_out(batch, await self._decide(batch))
        except BaseException as error:
            for _, done in batch:
                _tell(done, error)
            if not isinstance(error, Exception):
                raise
        finally:
            self._quick = task.get_loop().time() - began_s < QUICK_S
            self._tasks.discard(task)
            self._schedule()

    async def _decide(self, batch: list[Part]) -> list[Outcome]:
        try:
            groups = await self.decider.infer([row for rows, _ in batch for row in rows])
        finally:
            self._inferring = False
            self._schedule()
        return await self.decider.settle(groups)


def _share_out(batch: list[Part], outcomes: list[Outcome]) -> None:
    start = 0
    for rows, done in batch:
        end = start + len(rows)
        _tell(done, outcomes[start:end])
        start = end


def _tell(done: Done, outcomes: Sequence[Outcome] | BaseException) -> None:
    try:
        done(outcomes)
    except Exception:  # one caller's trouble is not the others'
        log.exception("answer_failed")
