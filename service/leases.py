"""EDGE: this worker's leases on all policies' exploration, renewed in the background; and the counters of the halt.

Duty: carry requests of the holders (`safety/lease.py`) to the bank (`leases.lua`) and its answers back, in time. What a
lease allows is asked of the holder, which answers at once and never waits for this file.
Strategy: one call per policy every two thirds of a second, all policies at the same time, none longer than `CALL_S`; at
most one in flight for each. Whether an answer was lost or never sent makes no difference to the holder.
Promise: without Redis exploration ends within one term (2 s) and comes back by itself; every wait has a deadline.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Coroutine, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import msgspec
import structlog

from policies.errors import StoreAway
from safety.bank import TERM_S, Reply, Request
from safety.burn import BurnLimit
from safety.exploration import Exploration
from safety.lease import Holder, Standing
from service.clock import Clock
from service.redis_streams import RedisStreams, base

log = structlog.get_logger(__name__)

CALL_S: Final = TERM_S / 2
LEAST_PAUSE_S: Final = 0.01  # a window that ends makes all its leases due at once, perhaps twice
STALE: Final = b"STALE"
BANK: Final = (Path(__file__).parent / "leases.lua").read_bytes()

# ARGV: expected cursor, new cursor, bucket width in ms, outcomes, burnt, for how long to keep them in ms. Gives the
# cursor that stands: the new one when the outcomes were added. Whoever counts from a stream passes how far it has read,
# so that of several readers each outcome is counted once.
COUNT: Final = b"""
local stands = redis.call('HGET', KEYS[1] .. ':explore', 'burn_cursor') or ''
if stands ~= ARGV[1] then return stands end
local time = redis.call('TIME')
local now = tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000)
local bucket = ARGV[3] .. ':' .. string.format('%.0f', math.floor(now / tonumber(ARGV[3])))
if tonumber(ARGV[4]) > 0 then
  redis.call('HINCRBY', KEYS[1] .. ':burn', bucket .. ':n', ARGV[4])
  redis.call('HINCRBY', KEYS[1] .. ':burn', bucket .. ':x', ARGV[5])
  redis.call('PEXPIRE', KEYS[1] .. ':burn', ARGV[6])
end
redis.call('HSET', KEYS[1] .. ':explore', 'burn_cursor', ARGV[2])
return ARGV[2]
"""


@dataclass(frozen=True, slots=True)
class LeaseStatistics:
    """What leases have come to. calls, failures: of the bank, for all policies since the start."""

    calls: int
    failures: int
    stale: int  # requests that a later one of the same holder had overtaken
    lapses: int
    standing: Mapping[str, Standing]


class Leases:
    """One holder for each policy. Use from the event loop's thread only."""

    def __init__(self, streams: RedisStreams, clock: Clock, name: Callable[[], str]) -> None:
        self._streams = streams
        self._clock = clock
        self._name = name  # a new name at each call, never given before by anybody
        self._holders: dict[str, Holder] = {}
        self._turn = asyncio.Lock()
        self._wake = asyncio.Event()
        self._calls = self._failures = self._stale = self._lapses = 0

    def open(self, policy: str, exploration: Exploration, generation: int) -> Holder:
        """Have a holder for a policy, living by this document. It explores nothing until it is leased something."""
        holder = self._holders.get(policy)
        if holder is None:
            holder = self._holders[policy] = Holder(self._name(), exploration, generation)
        else:
            holder.configure(exploration, generation)
        self._wake.set()
        return holder

    async def close(self, policy: str) -> None:
        """Give a policy's lease back. Never raises: what cannot be given back is burnt."""
        async with self._turn:
            holder = self._holders.pop(policy, None)
            if holder is not None:
                self._lapses += holder.lapses
                await self._release(policy, holder)

    def statistics(self) -> LeaseStatistics:
        now_s = self._clock.monotonic_s()
        standing = {policy: holder.standing(now_s) for policy, holder in self._holders.items()}
        lapses = self._lapses + sum(holder.lapses for holder in self._holders.values())
        return LeaseStatistics(self._calls, self._failures, self._stale, lapses, standing)

    async def run(self) -> None:
        """Renew for ever."""
        while True:
            self._wake.clear()
            await self.run_once()
            due_s = min((holder.due_s for holder in self._holders.values()), default=float("inf"))
            pause_s = max(LEAST_PAUSE_S, min(TERM_S, due_s - self._clock.monotonic_s()))
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._wake.wait(), pause_s)

    async def run_once(self) -> int:
        """Renew every lease that is due, each within `CALL_S`. Return how many were. Never raises for what may pass."""
        async with self._turn:
            now_s = self._clock.monotonic_s()
            due = [(policy, holder) for policy, holder in self._holders.items() if holder.due_s <= now_s]
            await _together(self._renew(policy, holder) for policy, holder in due)
            return len(due)

    async def aclose(self) -> None:
        """Give everything back, within `CALL_S`."""
        async with self._turn:
            holders, self._holders = self._holders, {}
            await _together(self._release(policy, holder) for policy, holder in holders.items())

    async def count(self, policy: str, limit: BurnLimit, outcomes: int, burnt: int, after: str, through: str) -> str:
        """Add outcomes of explored decisions to the halt's counters, unless somebody has counted past `after`.

        Returns the cursor that stands: `through` when these were added, empty when Redis knows of none: go on from
        there. Raises StoreAway: then try again with the same.
        """
        rest = after, through, limit.width_ms, outcomes, burnt, int(2 * limit.long_s * 1000)
        stands: bytes = await self._streams.script(COUNT, base(policy), *rest)
        return stands.decode()

    async def _renew(self, policy: str, holder: Holder) -> None:
        request = holder.ask(self._clock.monotonic_s())
        try:
            reply = await self._call(policy, request)
        except BaseException as error:
            holder.failed(self._clock.monotonic_s())
            self._failures += 1
            if not isinstance(error, StoreAway | TimeoutError):
                raise
            log.debug("lease_not_renewed", policy=policy, reason=str(error) or "no answer in time")
            return
        if reply is None:
            self._stale += 1
            holder.failed(self._clock.monotonic_s())
        else:
            holder.granted(reply)

    async def _release(self, policy: str, holder: Holder) -> None:
        request = holder.release(self._clock.monotonic_s())
        try:
            await self._call(policy, request)
        except (StoreAway, TimeoutError) as error:
            log.warning("lease_not_given_back", policy=policy, reason=str(error) or "no answer in time")

    async def _call(self, policy: str, request: Request) -> Reply | None:
        """Ask the bank; None when it has heard a later request already."""
        self._calls += 1
        async with asyncio.timeout(CALL_S):
            return decode(await self._streams.script(BANK, base(policy), encode(request)))


async def _together(calls: Iterable[Coroutine[None, None, None]]) -> None:
    """Run all to their end, whatever one of them raises; then raise it."""
    for outcome in await asyncio.gather(*calls, return_exceptions=True):
        if isinstance(outcome, BaseException):
            raise outcome


encode = msgspec.msgpack.Encoder().encode
_reply = msgspec.msgpack.Decoder(Reply)


def decode(raw: bytes) -> Reply | None:
    """Read the bank's answer; None for STALE."""
    return None if raw == STALE else _reply.decode(raw)
