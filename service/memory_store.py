"""EDGE: where a policy's episodes are kept in Redis for other workers. The commands go through `RedisStreams`.

    sf:{policy}:mem:<digest of the episode>      its last step, as `memory.encode` writes it; expires

Duty: bring what a worker keeps to Redis behind its answers, and look up what others kept. It knows nothing of steps:
what fits is decided in `memory.py`.
Strategy: what waits to be written has one place for each episode, so the newest wins; one call is in flight, and what
came meanwhile goes with the next. A lookup is one round trip of 20 ms at most; one that is not answered by then is
overdue, and until it has ended nobody waits for another.
Promise: nothing here holds up an answer for longer than one lookup; what waits is bounded, and what is dropped is
counted. A value is written whole: step, version and memory are never of two workers.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, Final

import structlog

from policies.errors import StoreAway
from service.memory import Kept, decode, encode
from service.memory_writes import Write, Writes
from service.metrics import Metrics
from service.redis_streams import RedisStreams, base

log = structlog.get_logger(__name__)

ANSWER_S: Final = 0.020  # design section 4
# A call that keeps Redis busy for some milliseconds at most.
CALL_BYTES: Final = 1 << 20
CALL_EPISODES: Final = 256
BACKOFF_S: Final = 0.25
CLOSE_S: Final = 1.0

MOST_ENDS: Final = 1_000  # ends of episodes that are being looked into

# ARGV: for how long in ms; then for each episode its digest, its value, '' to forget it, and the decision that must be
# its last for that, '' for whichever is. `memory.encode` puts the decision in front.
WRITE: Final = b"""
for i = 2, #ARGV, 3 do
  local key, value, last = KEYS[1] .. ':mem:' .. ARGV[i], ARGV[i + 1], ARGV[i + 2]
  if value ~= '' then
    redis.call('SET', key, value, 'PX', ARGV[1])
  elseif last == '' or string.find(redis.call('GETRANGE', key, 0, #last + 7), last, 1, true) then
    redis.call('UNLINK', key)
  end
end
return 1
"""


@dataclass(frozen=True, slots=True)
class StoreStatistics:
    waiting: int  # episodes of which Redis has not been told the last step
    bytes: int
    overdue: int  # lookups
    away: bool


class MemoryStore:
    """The episodes of one policy. Use from the event loop's thread only."""

    def __init__(self, streams: RedisStreams, policy: str, ttl_s: float, metrics: Metrics) -> None:
        self._streams, self._policy, self._base = streams, policy, base(policy)
        self._ttl_ms = max(1, int(ttl_s * 1000))
        self._drops = metrics.memory_drops
        self._writes = Writes()
        self._task: asyncio.Task[None] | None = None
        self._retry: asyncio.TimerHandle | None = None
        self._lookups: set[asyncio.Task[Any]] = set()
        self._overdue: set[asyncio.Task[Any]] = set()
        self._ends: set[asyncio.Task[Any]] = set()
        self._away = self._closed = False

    def put_nowait(self, episode: str, kept: Kept) -> None:
        """Queue an episode's last step."""
        self._dropped(self._writes.put_nowait(episode, kept), "full")
        self._start()

    def forget_nowait(self, episode: str, decision_id: str) -> None:
        """Queue that an episode is forgotten, unless another worker has gone on with it."""
        self._dropped(self._writes.forget_nowait(episode, decision_id), "full")
        self._start()

    def ended_nowait(self, decision_id: str) -> None:
        """Find out, behind the answer, which episode ended with a decision of another worker, and forget it."""
        if len(self._ends) < MOST_ENDS and not self._closed:
            _track(self._ends, self._end(decision_id))

    async def get(self, episodes: Sequence[str]) -> list[Kept | None] | None:
        """Look episodes up. Gives None when Redis does not answer within 20 ms. Never raises."""
        if self._overdue or self._closed:
            return None
        keys = [f"{self._base}:mem:{digest_of(each)}" for each in episodes]
        lookup = _track(self._lookups, self._streams.command("MGET", *keys))
        await asyncio.wait({lookup}, timeout=ANSWER_S)
        if not lookup.done():
            self._overdue.add(lookup)
            lookup.add_done_callback(self._overdue.discard)
            return None
        if lookup.cancelled() or lookup.exception() is not None:
            return None
        return [None if raw is None else decode(raw) for raw in lookup.result()]

    async def flush(self) -> None:
        """Write what waits, and wait until Redis has answered or failed. Never raises."""
        self._again()
        if self._task is not None:
            await asyncio.wait({self._task})

    async def aclose(self) -> None:
        """Write what waits, within CLOSE_S, and stop."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(CLOSE_S):
                await self.flush()
        self._closed = True
        if self._retry is not None:
            self._retry.cancel()
        running = [*self._lookups, *self._ends, *([] if self._task is None else [self._task])]
        for each in running:
            each.cancel()
        await asyncio.gather(*running, return_exceptions=True)
        self._dropped(self._writes.clear(), "closed")

    def statistics(self) -> StoreStatistics:
        return StoreStatistics(len(self._writes), self._writes.bytes, len(self._overdue), self._away)

    def _start(self) -> None:
        if self._writes and self._task is None and self._retry is None and not self._closed:
            self._task = asyncio.get_running_loop().create_task(self._drain())

    def _again(self) -> None:
        if self._retry is not None:
            self._retry.cancel()
            self._retry = None
        self._start()

    async def _drain(self) -> None:
        try:
            while self._writes:
                taken = self._writes.take(CALL_EPISODES, CALL_BYTES)
                try:
                    await self._streams.script(WRITE, self._base, self._ttl_ms, *_arguments(taken))
                except BaseException:
                    self._dropped(self._writes.give_back(taken), "full")
                    raise
                self._away = False
        except Exception as error:
            self._failed(error)
            self._retry = asyncio.get_running_loop().call_later(BACKOFF_S, self._again)
        finally:
            self._task = None  # at once: what comes after the last look starts another

    def _failed(self, error: Exception) -> None:
        if not isinstance(error, StoreAway):  # redis-py raises odd things, too, when a connection goes under it
            log.error("memory_call_failed", policy=self._policy, error=repr(error))
        elif not self._away:
            log.warning("memory_not_written", policy=self._policy, error=error.detail)
        self._away = True

    async def _end(self, decision_id: str) -> None:
        found = await self._streams.read_decision(self._policy, decision_id)
        if found is not None and found.episode:  # one that has not been shipped yet is left to expire
            self.forget_nowait(found.episode, decision_id)

    def _dropped(self, count: int, reason: str) -> None:
        if count:
            self._drops.labels(self._policy, reason).inc(count)


def _arguments(writes: dict[str, Write]) -> list[str | bytes]:
    found: list[str | bytes] = []
    for episode, write in writes.items():
        kept = write.kept
        value = b"" if kept is None or kept.after is None else encode(kept, kept.after)
        found += [digest_of(episode), value, write.last]
    return found


def digest_of(episode: str) -> str:
    """What stands for an episode in its key: names may be long."""
    return blake2b(episode.encode(), digest_size=16).hexdigest()


def _track(tasks: set[asyncio.Task[Any]], work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
    """Run something of which nobody may ever ask how it went."""

    def ended(task: asyncio.Task[Any]) -> None:
        tasks.discard(task)
        if not task.cancelled() and not isinstance(task.exception(), StoreAway | None):
            log.error("memory_call_failed", error=repr(task.exception()))

    task = asyncio.get_running_loop().create_task(work)
    tasks.add(task)
    task.add_done_callback(ended)
    return task
