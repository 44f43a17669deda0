"""EDGE: what became of explored decisions, from the stream of transitions to the counters of the burn-rate halt.

Duty: for each policy with a `burn` limit, read what the join has closed, say which outcomes burn, have them counted.
When exploration halts is `safety/burn.py`'s to say; who keeps the counters is `leases.py`.
Strategy: every replica reads, from the cursor that stands in Redis, and only the first to count up to a place moves it:
so each outcome counts once, whoever reads, dies, or loses an answer. Redis hands out what was explored alone, without
states. An outcome is a transition of an explored decision. It is an error when the action was not executed as answered
(`void`), its reward was out of the policy's range (`quarantined`), or it was replaced by the fallback after the draw
(`check_failed`); else its reward is looked at, the default one where none came in time.
Promise: at most once over all replicas; what nobody has read for `long_s` is not counted any more.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import Any, Final

import msgspec
import structlog

from policies.errors import StoreAway
from safety.burn import BurnLimit
from service.leases import Leases
from service.metrics import Metrics
from service.redis_streams import RedisStreams, base

PAUSE_S: Final = 0.5  # half of the shortest window
PAGE: Final = 256  # entries for each call of the script, which takes some 2 ms for them
PAGES: Final = 40  # for each turn
BEGINNING: Final = "0-0"

# ARGV: cursor, most entries, the greatest age in ms. Gives the id read last, and (join state, reward, record) of all
# that explored, as far as bytes tell: the record is msgpack with fields that Lua cannot read, so it is searched.
READ: Final = b"""
local time = redis.call('TIME')
local oldest = tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000) - tonumber(ARGV[3])
local from = '(' .. ARGV[1]
if tonumber(string.match(ARGV[1], '^(%d+)')) < oldest then from = string.format('%.0f-0', oldest) end
local last, found = ARGV[1], {}
for _, entry in ipairs(redis.call('XRANGE', KEYS[1] .. ':transitions', from, '+', 'COUNT', ARGV[2])) do
  last = entry[1]
  local fields = {}
  for i = 1, #entry[2], 2 do fields[entry[2][i]] = entry[2][i + 1] end
  if string.find(fields.d, '\\168explored\\195', 1, true) then
    found[#found + 1] = {fields.j, fields.r, fields.d}
  end
end
return {last, found}
"""

log = structlog.get_logger(__name__)


class Explored(msgspec.Struct, frozen=True):
    """What is read of a record (`service.decision.Record`)."""

    explored: bool
    fallback: str | None = None


_record = msgspec.msgpack.Decoder(Explored)


class Burning:
    """The readers of a worker. Use from the event loop's thread only."""

    def __init__(self, streams: RedisStreams, leases: Leases, metrics: Metrics) -> None:
        self._streams = streams
        self._leases = leases
        self._metrics = metrics
        self._cursors: dict[str, str] = {}

    async def run(self, limits: Callable[[], Mapping[str, BurnLimit]]) -> None:
        """Count for ever. limits: by policy, as they are at the moment."""
        while True:
            await self.run_once(limits())
            await asyncio.sleep(PAUSE_S)

    async def run_once(self, limits: Mapping[str, BurnLimit]) -> None:
        """Count what has been closed since somebody counted last. Never raises for what may pass."""
        self._cursors = {policy: cursor for policy, cursor in self._cursors.items() if policy in limits}
        try:
            for policy, limit in limits.items():
                await self._read(policy, limit)
        except StoreAway as error:
            log.debug("outcomes_wait", reason=error.detail)

    async def _read(self, policy: str, limit: BurnLimit) -> None:
        cursor = await self._where(policy, limit)
        for _ in range(PAGES):
            found = await self._streams.script(READ, base(policy), cursor, PAGE, int(limit.long_s * 1000))
            last, outcomes = found[0].decode(), [each for each in map(outcome, found[1]) if each is not None]
            if last == cursor:
                break
            burnt = sum(limit.burns(error=error, reward=reward) for error, reward in outcomes)
            stands = await self._leases.count(policy, limit, len(outcomes), burnt, cursor, last)
            self._cursors[policy] = stands
            if stands != last:  # another replica was faster, and goes on from there
                break
            self._metrics.explored_outcomes.labels(policy, "burnt").inc(burnt)
            self._metrics.explored_outcomes.labels(policy, "good").inc(len(outcomes) - burnt)
            cursor = last

    async def _where(self, policy: str, limit: BurnLimit) -> str:
        """How far outcomes have been counted. With a policy's first limit: what comes from now on counts."""
        mine = self._cursors.get(policy, "")
        stands = await self._leases.count(policy, limit, 0, 0, mine, mine)
        if not stands:
            newest = await self._streams.command("XREVRANGE", f"{base(policy)}:transitions", "+", "-", "COUNT", 1)
            end = newest[0][0].decode() if newest else BEGINNING
            stands = await self._leases.count(policy, limit, 0, 0, "", end)
        self._cursors[policy] = stands
        return stands


def outcome(entry: list[Any]) -> tuple[bool, float | None] | None:
    """Whether an explored decision ended in an error, and its reward; None for one that did not explore."""
    join, reward, raw = entry
    record = _record.decode(raw)
    if not record.explored:
        return None
    return join in (b"void", b"quarantined") or record.fallback is not None, float(reward) if reward else None
