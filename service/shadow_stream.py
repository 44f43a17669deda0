"""EDGE: what shadows have scored, to Redis, behind everything else. The commands go through `RedisStreams`.

    sf:{policy}:shadow:<version>     stream: `id` the decision, `d` its score as `shadow/scores.py` writes it

Duty: bring scores to where estimators join them with transitions by decision id. It knows nothing of what they say.
Strategy: best effort. What waits is bounded, the oldest goes first, and what goes so is counted; that depends on when
Redis was away, not on what was scored. A call without an answer is made again, so an entry may stand twice; what Redis
refuses is counted as lost.
Promise: decisions and shadows never wait for this file. A stream is bounded, and goes when its shadow is long gone.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections import deque
from dataclasses import dataclass
from typing import Final

import structlog

from policies.errors import StoreAway
from service.redis_pool import OTHER
from service.redis_streams import RedisStreams, base
from service.shadow_metrics import ShadowMetrics

TURN_S: Final = 0.25
CALL_ENTRIES: Final = 256  # some 2 ms of Redis
MOST_BYTES: Final = 32 << 20
OVERHEAD_BYTES: Final = 150  # of an entry
KEPT_MS: Final = 7 * 86_400_000  # after the last entry, as transitions that nobody reads
CLOSE_S: Final = 1.0

# ARGV: version, about how many entries stay, for how long in ms; then id and score of each entry.
WRITE: Final = b"""
local key = KEYS[1] .. ':shadow:' .. ARGV[1]
for i = 4, #ARGV, 2 do
  redis.call('XADD', key, 'MAXLEN', '~', ARGV[2], '*', 'id', ARGV[i], 'd', ARGV[i + 1])
end
redis.call('PEXPIRE', key, ARGV[3])
return 1
"""

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class _Batch:
    """Scores of one shadow that were made together."""

    policy: str
    version: str
    entries: list[tuple[str, bytes]]

    @property
    def bytes(self) -> int:
        return sum(len(score) + OVERHEAD_BYTES for _, score in self.entries)


class ShadowStream:
    """The writer of a worker. `put` from any thread, all else from the event loop's."""

    def __init__(self, streams: RedisStreams, metrics: ShadowMetrics, keep: int, most_bytes: int = MOST_BYTES) -> None:
        self._streams = streams
        self._metrics = metrics
        self._keep = keep
        self._most_bytes = most_bytes
        self._lock = threading.Lock()  # over what waits; held for microseconds
        self._waiting: deque[_Batch] = deque()
        self._bytes = 0  # Invariant: the sum over _waiting, at most _most_bytes, or one batch's

    def put(self, policy: str, version: str, entries: list[tuple[str, bytes]]) -> None:
        """Queue scores. Never waits."""
        self._queue(_Batch(policy, version, entries), front=False)

    async def run(self) -> None:
        """Write for ever."""
        while True:
            await self.run_once()
            await asyncio.sleep(TURN_S)

    async def run_once(self) -> None:
        """Write what waits, until nothing does or Redis does not take it. Never raises for what may pass."""
        while (batch := self._take()) is not None:
            arguments = [part for entry in batch.entries for part in entry]
            try:
                await self._streams.script(WRITE, base(batch.policy), batch.version, self._keep, KEPT_MS, *arguments)
            except StoreAway as error:
                if error.reason != OTHER:
                    self._queue(batch, front=True)
                    log.debug("shadow_scores_wait", policy=batch.policy, version=batch.version, reason=error.detail)
                    return
                self._lost(batch, error)
            except Exception as error:  # redis-py raises odd things; nothing of a shadow's may end a loop
                self._lost(batch, error)

    async def aclose(self) -> None:
        """Write what is left, within `CLOSE_S`."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(CLOSE_S):
                await self.run_once()

    def statistics(self) -> dict[str, int]:
        with self._lock:
            return {"entries": sum(len(batch.entries) for batch in self._waiting), "bytes": self._bytes}

    def _take(self) -> _Batch | None:
        """The oldest batch, with those of the same shadow that follow it at once, as far as one call goes."""
        with self._lock:
            if not self._waiting:
                return None
            first = self._waiting.popleft()
            entries = list(first.entries)
            while self._waiting and len(entries) + len(self._waiting[0].entries) <= CALL_ENTRIES:
                following = self._waiting[0]
                if (following.policy, following.version) != (first.policy, first.version):
                    break
                entries += self._waiting.popleft().entries
            taken = _Batch(first.policy, first.version, entries)
            self._bytes -= taken.bytes
            return taken

    def _queue(self, batch: _Batch, *, front: bool) -> None:
        dropped: list[_Batch] = []
        with self._lock:
            if front:
                self._waiting.appendleft(batch)
            else:
                self._waiting.append(batch)
            self._bytes += batch.bytes
            while len(self._waiting) > 1 and self._bytes > self._most_bytes:
                dropped.append(self._waiting.popleft())
                self._bytes -= dropped[-1].bytes
        for each in dropped:
            self._metrics.unwritten(each.policy, each.version, len(each.entries))

    def _lost(self, batch: _Batch, error: Exception) -> None:
        """Give up a batch that Redis does not take for a reason that will not pass."""
        log.error("shadow_scores_lost", policy=batch.policy, version=batch.version, error=repr(error))
        self._metrics.unwritten(batch.policy, batch.version, len(batch.entries))
