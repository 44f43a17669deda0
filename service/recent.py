"""EDGE: a policy's recent decisions out of Redis, open and closed. The commands go through `RedisStreams`.

Duty: the newest decisions that Redis still holds, whatever became of their rewards, each once, in order of time. What
is kept of one is said by who asks.
Strategy: open ones stand in `due`, closed ones left by the stream of transitions; both are read from their new end, in
pages small enough for Redis to answer others in between. Open ones first: one that closes meanwhile is met again in the
stream, and known by its id.
Promise: at most `last` decisions, and no more pages once MOST_BYTES have been read; then `cut` says so.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Generic, TypeVar

from service.decision import Record, decode_record
from service.redis_streams import RedisStreams, base

PAGE: Final = 256
FIRST_PAGE: Final = 16  # tells how large a decision is
PAGE_BYTES: Final = 1 << 20
MOST_BYTES: Final = 256 << 20

_OPEN: Final = b"""
local found = {}
local ids = redis.call('ZRANGE', KEYS[1] .. ':due', ARGV[1], ARGV[2], 'REV')
for i, id in ipairs(ids) do
  local raw = redis.call('GET', KEYS[1] .. ':d:' .. id)
  if raw then
    local d = cmsgpack.unpack(string.sub(raw, 2))
    found[#found + 1] = {id, string.format('%.0f', d[4]), d[11], d[12], d[13], d[5], d[6], d[8]}
  end
end
return {#ids, '', found}
"""
_CLOSED: Final = b"""
local found = {}
local entries = redis.call('XREVRANGE', KEYS[1] .. ':transitions', ARGV[1], '-', 'COUNT', ARGV[2])
for i, entry in ipairs(entries) do
  local f = {}
  for k = 1, #entry[2], 2 do f[entry[2][k]] = entry[2][k + 1] end
  found[#found + 1] = {f.i, f.t, f.p, f.e, f.q, f.a, f.s, f.d}
end
return {#entries, #entries > 0 and entries[#entries][1] or '', found}
"""

T = TypeVar("T")
Order = tuple[int, str, int, int]  # event time, then lane and place in it
Take = Callable[[str, Order, str, bytes, Record], T]


@dataclass(frozen=True, slots=True)
class Recent(Generic[T]):
    """Decisions in order of time. cut: Redis holds more of them, which were too large to be read."""

    decisions: list[T]
    cut: bool


async def recent_decisions(
    streams: RedisStreams, policy: str, last: int, take: Take[T], most_bytes: int = MOST_BYTES
) -> Recent[T]:
    """Read the newest decisions. take: what is kept of one: of its id, order, action, state and record.

    Raises StoreAway.
    """
    found: dict[str, tuple[Order, T]] = {}
    open_cut = await _read(_Pages(streams, policy, _OPEN, last, most_bytes // 2), take, found)
    closed_cut = await _read(_Pages(streams, policy, _CLOSED, last, most_bytes // 2), take, found)
    return Recent(await asyncio.to_thread(_newest, found, last), open_cut or closed_cut)


def _newest(found: dict[str, tuple[Order, T]], last: int) -> list[T]:
    return [each for _, each in sorted(found.values(), key=lambda each: each[0])[-last:]]


@dataclass(slots=True)
class _Pages:
    """What is left to read of one kind. While it is read more may come, and pages by rank then show some again."""

    streams: RedisStreams
    policy: str
    script: bytes
    left: int
    bytes_left: int
    size: int = FIRST_PAGE
    asked: int = 0
    cursor: str = "+"

    async def next(self) -> list[list[bytes]]:
        """Read a page; empty: there is none."""
        count = min(self.size, self.left)
        where = (self.asked, self.asked + count - 1) if self.script is _OPEN else (self.cursor, count)
        got, cursor, rows = await self.streams.script(self.script, base(self.policy), *where)
        self.asked += count
        self.left = self.left if got == count else 0
        self.cursor = f"({cursor.decode()}"
        read = sum(len(row[6]) + len(row[7]) for row in rows)
        self.bytes_left -= read
        self.size = max(1, min(PAGE, PAGE_BYTES * len(rows) // max(1, read)))
        return rows  # type: ignore[no-any-return]


async def _read(pages: _Pages, take: Take[T], found: dict[str, tuple[Order, T]]) -> bool:
    """Read what there is; say whether it was cut off."""
    while pages.left > 0:
        if pages.bytes_left <= 0:
            return True
        before = len(found)
        found |= await asyncio.to_thread(_taken, await pages.next(), take)
        pages.left -= len(found) - before
    return False


def _taken(rows: list[list[bytes]], take: Take[T]) -> dict[str, tuple[Order, T]]:
    found = {}
    for each, at, producer, epoch, seq, action, state, record in rows:
        decision_id, order = each.decode(), (int(float(at)), producer.decode(), int(epoch), int(seq))
        found[decision_id] = order, take(decision_id, order, action.decode(), state, decode_record(record))
    return found
