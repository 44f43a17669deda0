"""EDGE: which worker of all does for a policy what one alone should do: a lease in Redis.

    sf:{policy}:leader     string: the holder's name, for TERM_MS

Duty: hold the lease, or try to. It knows nothing of what leaders do.
Strategy: whoever asks first has it, and keeps it by asking again; one that dies is followed within `TERM_MS`.
Promise: none that there is only one! A process that was stopped for longer than the term may believe that it leads. So
whatever a leader writes is written by compare-and-set, and two leaders cost work, not truth.
"""

from __future__ import annotations

from typing import Final
from uuid import uuid4

from service.redis_streams import RedisStreams, base

TERM_MS: Final = 5_000

# ARGV: who asks, for how long in ms. Gives whether it leads.
LEAD: Final = b"""
local stands = redis.call('GET', KEYS[1] .. ':leader')
if stands and stands ~= ARGV[1] then return 0 end
redis.call('SET', KEYS[1] .. ':leader', ARGV[1], 'PX', ARGV[2])
return 1
"""
RESIGN: Final = b"""
if redis.call('GET', KEYS[1] .. ':leader') == ARGV[1] then redis.call('DEL', KEYS[1] .. ':leader') end
return 1
"""


class Leader:
    """This worker's claim, for all policies."""

    def __init__(self, streams: RedisStreams, name: str | None = None) -> None:
        self._streams = streams
        self.name = name or uuid4().hex

    async def leads(self, policy: str) -> bool:
        """Take or renew the lease of a policy. Call it more often than every `TERM_MS`. Raises StoreAway."""
        return bool(await self._streams.script(LEAD, base(policy), self.name, TERM_MS))

    async def resign(self, policy: str) -> None:
        """Let another lead at once. Raises StoreAway."""
        await self._streams.script(RESIGN, base(policy), self.name)
