"""EDGE: which workers are alive, and which generation of each policy each of them serves.

    sf:workers     hash: worker -> when it was heard of last (the server's ms), then its name and generations

Duty: tell the others what this worker serves, and say of a change who does not have it yet. It changes nothing.
Strategy: an entry is written each second, and at once when a policy is served by another generation; the same call
reads everybody's. The field is the producer, so that a worker that was restarted takes its own place again. One that
has not been heard of for TERM_S is waited for no more; one that leaves signs off.
Promise: of a change, `told` names every worker that was alive and did not confirm it within WAIT_S; it never waits
longer (but for one call that hangs), nor when no other worker is alive, and never raises: without Redis it names those
that were alive when it was heard of last.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import Mapping
from itertools import chain, repeat
from typing import Final

import msgspec
import structlog

from policies.errors import StoreAway
from service.audit_log import noted
from service.clock import Clock
from service.metrics import Metrics
from service.redis_streams import RedisStreams
from service.standing import PolicyState

WORKERS: Final = "sf:workers"
BEAT_S: Final = 1.0
TERM_S: Final = 3.0  # two beats may be lost
KEEP_S: Final = 60.0
WAIT_S: Final = 2.0  # what is promised of a halt
# Between looks: a hint reaches the others within a millisecond or two, and what they serve they tell at once.
PAUSES_S: Final = (0.002, 0.005, 0.01, 0.02)
PAUSE_S: Final = 0.05

log = structlog.get_logger(__name__)

# ARGV: worker, its entry (empty: it leaves), for how long to keep one in ms. Gives worker, age in ms, entry of each.
BEAT: Final = b"""
local time = redis.call('TIME')
local now = tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000)
if ARGV[2] == '' then redis.call('HDEL', KEYS[1], ARGV[1])
else redis.call('HSET', KEYS[1], ARGV[1], string.format('%.0f', now) .. ' ' .. ARGV[2]) end
redis.call('PEXPIRE', KEYS[1], ARGV[3])
local found, all = {}, redis.call('HGETALL', KEYS[1])
for i = 1, #all, 2 do
  local at = string.match(all[i + 1], '^%d+')
  local age = math.max(0, now - tonumber(at))
  if age > tonumber(ARGV[3]) then redis.call('HDEL', KEYS[1], all[i]) else
    found[#found + 1] = all[i]
    found[#found + 1] = string.format('%.0f', age)
    found[#found + 1] = string.sub(all[i + 1], #at + 2)
  end
end
return found
"""


class Entry(msgspec.Struct, frozen=True):
    """What a worker says of itself. serves: the generation by policy."""

    name: str
    serves: dict[str, int] = {}


class Heard(msgspec.Struct, frozen=True):
    """An entry, and how old Redis said that it is."""

    entry: Entry
    age_s: float

    @property
    def alive(self) -> bool:
        return self.age_s <= TERM_S


class Roll:
    """The roll, as one worker keeps it. Use from the event loop's thread only."""

    def __init__(
        self, streams: RedisStreams, states: Mapping[str, PolicyState], metrics: Metrics, clock: Clock, worker: str
    ) -> None:
        """worker: whose place in the roll it is, the same after a restart."""
        self._streams = streams
        self._states = states
        self._metrics = metrics
        self._clock = clock
        self._worker = worker
        self._wake = asyncio.Event()
        self._others: dict[str, Heard] = {}
        self.name = f"{socket.gethostname()}:{os.getpid()}/{worker}"

    def wake(self) -> None:
        """Tell the others soon: something is served that was not."""
        self._wake.set()

    async def run(self) -> None:
        """Tell the others for ever."""
        while True:
            self._wake.clear()
            await self.run_once()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._wake.wait(), BEAT_S)

    async def run_once(self) -> None:
        """Tell what is served here, and hear what is elsewhere. Without Redis, what was heard last stands."""
        try:
            await self._call(msgspec.json.encode(Entry(self.name, self._serves())))
        except StoreAway as error:
            log.debug("workers_not_read", reason=error.detail)

    async def told(self, state: PolicyState) -> dict[str, list[str]]:
        """Wait until every live worker serves a policy as it is known here. Gives `behind`: the names of those that
        do not. Call it once a change is made: what is written down of it is completed before.
        """
        generation, published = state.generation, state.halts_published
        await noted().keep()
        behind = await (self._behind(state.name, generation) if published else self._all_others())
        if behind:
            self._metrics.changes_behind.labels(state.name).inc()
            log.warning("workers_behind", policy=state.name, generation=generation, workers=behind)
        return {"behind": behind}

    async def aclose(self) -> None:
        """Sign off."""
        with contextlib.suppress(StoreAway):
            await self._call(b"")

    def refresh_metrics(self) -> None:
        """Set the gauges that are read, not counted."""
        alive = [each.entry for each in self._others.values() if each.alive]
        self._metrics.live_workers.set(1 + len(alive))
        for policy, generation in self._serves().items():
            behind = sum(each.serves.get(policy, 0) < generation for each in alive)
            self._metrics.workers_behind.labels(policy).set(behind)

    async def _behind(self, policy: str, generation: int) -> list[str]:
        deadline_s = self._clock.monotonic_s() + WAIT_S
        missing: dict[str, str] = {}  # who was alive, and has not confirmed or left since
        for pause_s in chain(PAUSES_S, repeat(PAUSE_S)):
            await self.run_once()
            mine = Heard(Entry(self.name, self._serves()), 0.0)
            everybody = {**self._others, self._worker: mine}
            lacking = {name: each for name, each in everybody.items() if each.entry.serves.get(policy, 0) < generation}
            missing |= {name: each.entry.name for name, each in lacking.items() if each.alive}
            missing = {name: told for name, told in missing.items() if name in lacking}
            waits = any(each.alive for each in lacking.values())
            if not waits or self._clock.monotonic_s() + pause_s > deadline_s:
                break
            await asyncio.sleep(pause_s)
        return sorted(missing.values())

    async def _all_others(self) -> list[str]:
        """Name whoever may not have what only this worker knows."""
        await self.run_once()
        return sorted(each.entry.name for each in self._others.values())

    def _serves(self) -> dict[str, int]:
        served = {name: state.served for name, state in self._states.items()}
        return {name: document.generation for name, document in served.items() if document is not None}

    async def _call(self, entry: bytes) -> None:
        reply = await self._streams.script(BEAT, WORKERS, self._worker, entry, int(KEEP_S * 1000))
        heard: dict[str, Heard] = {}
        for i in range(0, len(reply), 3):
            with contextlib.suppress(msgspec.DecodeError):  # of another release
                heard[reply[i].decode()] = Heard(_decode(reply[i + 2]), int(reply[i + 1]) / 1000)
        heard.pop(self._worker, None)
        self._others = heard


_decode = msgspec.json.Decoder(Entry).decode
