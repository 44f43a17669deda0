"""EDGE: what a rollout's controller reads of a policy in Redis, and what it keeps there. Scripts and codecs.

    sf:{policy}:rollout          hash: `turn` (grows), `of` (rollout and generation), `kept` (`shadow.evidence.Kept`),
                                 `low` (from where on to read again), `view` (for people)
    sf:{policy}:rollout:through  sorted set: units of the step that are through, by when they were last seen
    group `surefoot.rollout`     of the transitions stream: keeps it from being trimmed past `low`

Duty: bytes in Redis to values and back. What they mean is `rollouts.py`'s; the commands go through `RedisStreams`.
Promise: what is kept stands there wholly or not at all, and only if nobody has kept anything since it was read.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any, Final, NamedTuple

import msgspec
import structlog

from service.redis_streams import RedisStreams, base
from shadow.evidence import Kept, Shown
from shadow.gate import Verdict

PAGE: Final = 512  # entries for each call of the script, which takes some 2 ms for them
GROUP: Final = "surefoot.rollout"
MOST: Final = 10_000  # names for one command
FIELDS: Final = 7  # of an entry, behind its id

# ARGV: read after, most entries. Gives the event time through which every decision has closed, how many entries there
# are, and these in one string: stream id and what `outcomes.py` reads, each part behind its length. As 4,000 strings
# they would cost the event loop 11 ms. A decision that was due at the horizon has closed, unless it is still listed.
READ: Final = b"""
local through = tonumber(redis.call('GET', KEYS[1] .. ':horizon') or '0')
local due = redis.call('ZRANGE', KEYS[1] .. ':due', 0, 0, 'WITHSCORES')
if due[2] then through = math.min(through, tonumber(due[2]) - 1) end
local entries, told = redis.call('XRANGE', KEYS[1] .. ':transitions', '(' .. ARGV[1], '+', 'COUNT', ARGV[2]), {}
for _, entry in ipairs(entries) do
  local f = {}
  for i = 1, #entry[2], 2 do f[entry[2][i]] = entry[2][i + 1] end
  for _, part in ipairs({entry[1], f.i, f.ep, f.t, f.r, f.j, f.x, f.d}) do
    told[#told + 1] = struct.pack('<I4', #part)
    told[#told + 1] = part
  end
end
return {string.format('%.0f', through), #entries, table.concat(told)}
"""
# ARGV: expected turn, next turn, of, kept, low, view, group, anew, before which last seen to forget, then (last seen,
# name) of units that are through. Gives whether it was kept.
KEEP: Final = b"""
local key, stream = KEYS[1] .. ':rollout', KEYS[1] .. ':transitions'
if (redis.call('HGET', key, 'turn') or '0') ~= ARGV[1] then return 0 end
redis.call('HSET', key, 'turn', ARGV[2], 'of', ARGV[3], 'kept', ARGV[4], 'low', ARGV[5], 'view', ARGV[6])
if ARGV[8] == '1' then redis.call('DEL', key .. ':through') end
redis.call('ZREMRANGEBYSCORE', key .. ':through', '-inf', '(' .. ARGV[9])
for i = 10, #ARGV, 2 do redis.call('ZADD', key .. ':through', ARGV[i], ARGV[i + 1]) end
if ARGV[5] ~= '' and redis.pcall('XGROUP', 'SETID', stream, ARGV[7], ARGV[5]).err then
  redis.pcall('XGROUP', 'CREATE', stream, ARGV[7], ARGV[5], 'MKSTREAM')
end
return 1
"""
# ARGV: group. What was kept for going on goes; what was shown stays.
REST: Final = b"""
redis.call('DEL', KEYS[1] .. ':rollout:through')
redis.call('HDEL', KEYS[1] .. ':rollout', 'kept', 'low')
redis.pcall('XGROUP', 'DESTROY', KEYS[1] .. ':transitions', ARGV[1])
return 1
"""

log = structlog.get_logger(__name__)
_encode, _decode = msgspec.msgpack.Encoder().encode, msgspec.msgpack.Decoder(Kept).decode
_json = msgspec.json.Encoder().encode


class View(msgspec.Struct, frozen=True):
    """What the leader says of a rollout, for every replica to show."""

    of: str
    next: str = ""
    evidence: Shown | None = None
    gate: Verdict | None = None


_view = msgspec.json.Decoder(View).decode


class Stored(NamedTuple):
    """What stands of a step. kept: None where nobody has begun it."""

    turn: int
    kept: Kept | None = None
    low: str = ""
    through: Mapping[str, int] = {}


class Page(NamedTuple):
    """Closed decisions in the stream's order. through_ms: all that were due by then are in the stream."""

    through_ms: int
    size: int
    told: bytes

    def entries(self) -> Iterator[tuple[str, list[bytes]]]:
        """Stream id and fields of each, as `outcomes.py` reads them."""
        parts = _parts(self.told)
        for stream_id in parts:
            yield stream_id.decode(), list(islice(parts, FIELDS))


class RolloutStore:
    """The rollouts of all policies. Every call raises StoreAway."""

    def __init__(self, streams: RedisStreams) -> None:
        self._streams = streams

    async def stored(self, policy: str, of: str) -> Stored:
        """Give what stands of a step, to go on from."""
        turn, whose, raw, low = await self._streams.command(
            "HMGET", f"{base(policy)}:rollout", "turn", "of", "kept", "low"
        )
        kept = _kept(policy, raw) if whose == of.encode() and raw else None
        if kept is None:
            return Stored(int(turn or 0))
        flat = await self._streams.command("ZRANGE", f"{base(policy)}:rollout:through", 0, -1, "WITHSCORES")
        through = {name.decode(): int(float(seen)) for name, seen in _pairs(flat)}
        return Stored(int(turn or 0), kept, low.decode(), through)

    async def beginning(self, age_ms: int) -> str:
        """The id before all entries of the last so many milliseconds: entries bear the server's time."""
        seconds, micros = await self._streams.command("TIME")
        return f"{int(seconds) * 1000 + int(micros) // 1000 - age_ms}-0"

    async def page(self, policy: str, after: str) -> Page:
        """Give at most `PAGE` closed decisions behind an id."""
        through_ms, count, told = await self._streams.script(READ, base(policy), after, PAGE)
        return Page(int(through_ms), count, told)

    async def keep(
        self,
        policy: str,
        turn: int,
        view: View,
        kept: Kept | None,
        low: str,
        through: Mapping[str, int],
        *,
        anew: bool,
        forget_ms: int = 0,
    ) -> int | None:
        """Keep what is known, if nobody has kept anything since `turn`. Gives the turn that stands then, or None.

        anew: nothing was kept of the step before. forget_ms: units that are through and were last seen before that go.
        """
        raw, shown = b"" if kept is None else _encode(kept), _json(view)
        for names in _slices(list(through.items())):
            flat = [part for name, seen in names for part in (seen, name)]
            arguments = (turn, turn + 1, view.of, raw, low, shown, GROUP, int(anew), forget_ms, *flat)
            if not await self._streams.script(KEEP, base(policy), *arguments):
                return None
            turn, anew = turn + 1, False
        return turn

    async def view(self, policy: str) -> View | None:
        """What the leader said last."""
        raw = await self._streams.command("HGET", f"{base(policy)}:rollout", "view")
        return _view(raw) if raw else None

    async def rest(self, policy: str) -> None:
        """Let the stream be trimmed, once a rollout has ended."""
        await self._streams.script(REST, base(policy), GROUP)


def _kept(policy: str, raw: bytes) -> Kept | None:
    try:
        return _decode(raw)
    except msgspec.DecodeError as error:  # another release's: the step begins again, from now on
        log.error("rollout_state_unreadable", policy=policy, reason=str(error))
        return None


def _parts(told: bytes) -> Iterator[bytes]:
    """Strings, each behind its length."""
    at = 0
    while at < len(told):
        size = int.from_bytes(told[at : at + 4], "little")
        yield told[at + 4 : at + 4 + size]
        at += 4 + size


def before(stream_id: str) -> str:
    """The last id there can be before this one."""
    ms, seq = map(int, stream_id.split("-"))
    return f"{ms}-{seq - 1}" if seq else f"{ms - 1}-{2**64 - 1}"


def _pairs(flat: Any) -> Iterator[tuple[bytes, bytes]]:
    """Names and scores, as RESP2 or RESP3 gives them."""
    if flat and isinstance(flat[0], (list, tuple)):
        yield from ((name, seen) for name, seen in flat)
    else:
        yield from zip(flat[::2], flat[1::2], strict=True)


def _slices(items: list[tuple[str, int]]) -> Iterator[list[tuple[str, int]]]:
    """Parts of what one command may carry; one that is empty where there is nothing."""
    for at in range(0, max(1, len(items)), MOST):
        yield items[at : at + MOST]
