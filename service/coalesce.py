"""Rows that arrive together are decided together: one network call, one spool row, one commit.

Duty: gather rows of one policy into batches and hand each to the pipeline. It knows nothing of what a row is.
Strategy: a batch is cut two turns of the event loop after its first row came (no timer: a lone row waits for nothing;
two turns instead of one fill batches more than twice as full under load). While a network runs off the loop, the next
batch fills. Batches are cut at 20 ms of predicted inference, and at `max_batch` rows.
Promise: every row submitted gets its outcome.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence

from service.act import Decider
from service.plan import Outcome, Row

CUT_S = 0.020


class Coalescer:
    """Batches for one policy's pipeline. Use from the event loop's thread only."""

    def __init__(self, decider: Decider, max_batch: int) -> None:
        self.decider = decider
        self._max_batch = max_batch
        self._waiting: deque[tuple[Sequence[Row], asyncio.Future[list[Outcome]]]] = deque()
        self._scheduled = False
        self._inferring = False
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def limit(self) -> int:
        """Most rows in one batch, by the champion's predicted duration."""
        plan = self.decider.plan
        return min(self._max_batch, plan.versions[plan.routes.champion].engine.rows_within(CUT_S))

    def submit(self, rows: Sequence[Row]) -> asyncio.Future[list[Outcome]]:
        """Queue rows to be decided in one batch, at most `limit` of them. Gives their outcomes in order."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[list[Outcome]] = loop.create_future()
        self._waiting.append((rows, future))
        self._schedule(loop)
        return future

    async def decide(self, rows: Sequence[Row]) -> list[Outcome]:
        """Decide on any number of rows, in as many batches as it takes."""
        limit = self.limit
        parts = [self.submit(rows[start : start + limit]) for start in range(0, len(rows), limit)]
        return [outcome for part in parts for outcome in await part]

    def statistics(self) -> dict[str, int]:
        return {"waiting": sum(len(rows) for rows, _ in self._waiting), "running": len(self._tasks)}

    async def aclose(self) -> None:
        """Wait until every row that was submitted has its outcome."""
        while self._waiting or self._tasks:
            await asyncio.gather(*self._tasks) if self._tasks else await asyncio.sleep(0)

    def _schedule(self, loop: asyncio.AbstractEventLoop) -> None:
        if not (self._scheduled or self._inferring):
            self._scheduled = True
            loop.call_soon(loop.call_soon, self._flush)

    def _flush(self) -> None:
        self._scheduled = False
        if not self._waiting:
            return
        batch: list[Sequence[Row]] = []
        futures: list[asyncio.Future[list[Outcome]]] = []
        count, limit = 0, self.limit
        while self._waiting and (not batch or count + len(self._waiting[0][0]) <= limit):
            rows, future = self._waiting.popleft()
            batch.append(rows)
            futures.append(future)
            count += len(rows)
        self._inferring = True
        task = asyncio.get_running_loop().create_task(self._run(batch, futures))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _run(self, batch: list[Sequence[Row]], futures: list[asyncio.Future[list[Outcome]]]) -> None:
        try:
            try:
                groups = await self.decider.infer([row for rows in batch for row in rows])
            finally:
                self._inferring = False
                if self._waiting:
                    self._schedule(asyncio.get_running_loop())
            outcomes = await self.decider.settle(groups)
        except BaseException as error:
            for future in futures:
                if not future.done():
                    future.set_exception(error)
            if not isinstance(error, Exception):
                raise
            return
        start = 0
        for rows, future in zip(batch, futures, strict=True):
            if not future.done():  # a caller who left
                future.set_result(outcomes[start : start + len(rows)])
            start += len(rows)
