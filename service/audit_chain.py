"""The audit log's one chain over all replicas: followed in Redis, copied to this disk, appended to.

    follow Redis to its end -> copy to this disk -> append what is pending, if nobody was faster -> again

    sf:audit      stream, entry n has the id n-0: `e` the entry, `h` its hash

Duty: keep this replica's copy and Redis's chain the same, and get statements into both. What an entry is, `audit.py`
says.
Strategy: an append names the head that it follows, and a script refuses it where that is not the head any more. Only a
replica whose copy ends at the head can win, so it has seen every entry before its own: which statements stand in the
chain is read, never guessed, and a lost reply, a restart or a statement left behind by another life are one case.
Promise: no statement stands twice, none is lost while a disk that holds it is there. A Redis that has lost entries
gets them back from any copy. Where two chains exist Redis's goes on; the other is set aside and what it states is
chained anew. Nothing is ever trimmed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final, TypeVar

import msgspec
import structlog

from policies.errors import AuditBroken, StoreAway
from service.audit import Broken, Entry, Head, Statement, chain, check, line_of
from service.audit_files import Mirror, keys_in, leftovers
from service.audit_log import SYSTEM, AuditLog
from service.metrics import Metrics
from service.redis_streams import RedisStreams

KEY: Final = "sf:audit"
POLL_S: Final = 0.5
PAGE: Final = 256
BATCH: Final = 64
# Every refusal means that another replica has appended up to BATCH of its own: a thousand changes at once end well
# before.
TRIES: Final = 100

# ARGV: number and hash of the head to follow, then (entry, hash) for each. Gives {} when done, else the head that
# stands.
APPEND: Final = b"""
local seq, hash = '0', string.rep('0', 64)
local last = redis.call('XREVRANGE', KEYS[1], '+', '-', 'COUNT', 1)[1]
if last then
  seq = string.match(last[1], '^(%d+)')
  hash = last[2][4] or ''
end
if seq ~= ARGV[1] or hash ~= ARGV[2] then return {seq, hash} end
for i = 3, #ARGV, 2 do
  local id = string.format('%.0f-0', tonumber(seq) + (i - 1) / 2)
  local done = redis.pcall('XADD', KEYS[1], id, 'e', ARGV[i], 'h', ARGV[i + 1])
  if type(done) == 'table' and done.err then return {'-1', done.err} end
end
return {}
"""

log = structlog.get_logger(__name__)
T = TypeVar("T")


class Chain:
    """One worker's part in the chain. Use from the event loop's thread only."""

    def __init__(self, streams: RedisStreams, mirror: Mirror, audit: AuditLog, metrics: Metrics) -> None:
        self._streams = streams
        self._mirror = mirror
        self._stating: asyncio.Task[None] | None = None
        self._audit = audit
        self._metrics = metrics
        self._turn = asyncio.Lock()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="audit-chain")  # one, so that writes never overlap
        self._left: dict[Path, list[Statement]] | None = None  # what other lives have left behind; None: not read yet
        self._told: str | None = None

    @property
    def head(self) -> Head:
        """The last entry on this disk."""
        return self._mirror.head

    async def run(self) -> None:
        """Follow and append for ever."""
        while True:
            await self.run_once()
            try:
                async with asyncio.timeout(POLL_S):
                    await self._audit.wake.wait()
            except TimeoutError:
                continue

    async def run_once(self) -> None:
        """Bring this disk and Redis to the same. What may pass by itself is not raised."""
        async with self._turn:
            self._audit.wake.clear()
            try:
                if self._left is None:
                    await self._start()
                await self._follow()
                await self._append()
                self._audit.reachable = True
                self._tell(None)
            except StoreAway as error:
                self._audit.reachable = False
                log.debug("audit_waits", reason=error.detail)
            except Exception as error:  # whatever it is, decisions go on, and changes are on disk
                self._audit.reachable = False
                self._tell(str(error) or repr(error))
            await self._forget_chained()
            self._metrics.audit_unchained.set(len(self._audit.pending))

    async def read(self, after: int, limit: int, source: str | None = None) -> tuple[str, list[bytes]]:
        """Give entries after a number, of Redis, or of this disk where Redis is away. Raises StoreAway for `redis`."""
        if source != "disk":
            try:
                found = await self._range(f"{after + 1}-0", limit)
                return "redis", [each[1][b"e"] for each in found]
            except StoreAway:
                if source == "redis":
                    raise
        return "disk", await self._aside(lambda: list(self._mirror.lines(after, limit)))

    async def aclose(self) -> None:
        """Append what is left, as far as Redis is there, and close the files."""
        await self.run_once()
        await self._audit.aclose()
        self._thread.shutdown()
        self._mirror.close()

    async def _start(self) -> None:
        """Verify this disk's copy, and take on what other lives have stated and not chained."""
        await self._aside(self._mirror.load)
        self._left = await self._aside(leftovers, self._mirror.folder)
        if self._left:
            self._audit.adopt(statement for each in self._left.values() for statement in each)
            self._audit.settle(await self._aside(lambda: list(keys_in(self._mirror.lines()))))
        if self._mirror.broken is not None:
            self._metrics.audit_faults.labels("file").inc()
            self._state("audit_file_broken", str(self._mirror.broken.seq))

    async def _follow(self) -> None:
        """Copy what Redis has and this disk has not. Raises Broken."""
        while True:
            head = self._mirror.head
            found = await self._range(f"{max(1, head.seq)}-0", PAGE)
            if head.seq:
                if not found or _head(found[0]) != head:
                    await self._reconcile(head)
                    continue
                found = found[1:]
            if not found:
                return
            lines = [each[1][b"e"] for each in found]
            for line in lines:
                head = check(line, head)
            await self._copy(lines, head)

    async def _append(self) -> None:
        """Chain what is pending."""
        for _ in range(TRIES):
            head, lines, arguments = self._mirror.head, [], []
            for statement in list(self._audit.pending.values())[:BATCH]:
                entry = chain(statement, head)
                head = Head(entry.seq, entry.hash)
                lines.append(line_of(entry))
                arguments += [lines[-1], entry.hash]
            if not lines:
                return
            if await self._compare_and_append(self._mirror.head, arguments):
                await self._copy(lines, head)
                self._metrics.audit_entries.inc(len(lines))
            else:
                await self._follow()

    async def _compare_and_append(self, head: Head, arguments: list[Any]) -> bool:
        reply = await self._streams.script(APPEND, KEY, head.seq, head.hash, *arguments)
        if reply and reply[0] == b"-1":
            raise Broken(head.seq + 1, f"Redis does not take it: entries were deleted ({reply[1].decode()})")
        return not reply

    async def _copy(self, lines: list[bytes], head: Head) -> None:
        await self._aside(self._mirror.append, lines, head)
        self._audit.settle(keys_in(lines))

    async def _reconcile(self, mine: Head) -> None:
        """Redis does not have this disk's last entry: give it back what it has lost, or leave the way of our own."""
        newest = await self._streams.command("XREVRANGE", KEY, "+", "-", "COUNT", 1)
        theirs = _head(newest[0]) if newest else Head()
        if theirs.seq < mine.seq and await self._aside(self._mirror.hash_at, theirs.seq) == theirs.hash:
            log.error("redis_lost_audit_entries", have=theirs.seq, had=mine.seq)
            await self._give_back(theirs)
            return
        common = await self._common(min(mine.seq, theirs.seq))
        log.error("audit_forked", after=common, seq=mine.seq, hash=mine.hash)
        self._audit.adopt(await self._aside(self._mirror.set_aside, common))
        self._metrics.audit_faults.labels("fork").inc()
        self._state("audit_forked", f"{mine.seq}:{mine.hash}")

    async def _give_back(self, theirs: Head) -> None:
        lines = await self._aside(lambda: list(self._mirror.lines(theirs.seq, PAGE)))
        entries = [msgspec.json.decode(line, type=Entry) for line in lines]
        pairs = [part for line, entry in zip(lines, entries, strict=True) for part in (line, entry.hash)]
        await self._compare_and_append(theirs, pairs)  # refused: another replica is doing it

    async def _common(self, high: int) -> int:
        """Find the last entry that Redis and this disk both have: equal hashes mean equal chains up to there."""
        low = 0
        while low < high:
            middle = (low + high + 1) // 2
            found = await self._range(f"{middle}-0", 1)
            same = bool(found) and _head(found[0]) == Head(middle, await self._aside(self._mirror.hash_at, middle))
            low, high = (middle, high) if same else (low, middle - 1)
        return low

    async def _aside(self, work: Callable[..., T], *arguments: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work, *arguments)

    async def _range(self, start: str, count: int) -> list[Any]:
        found: list[Any] = await self._streams.command("XRANGE", KEY, start, "+", "COUNT", count)
        return found

    async def _forget_chained(self) -> None:
        """Remove the segments of other lives of which everything stands in the chain."""
        pending = {segment for segment, _ in self._audit.pending}
        for path, statements in list((self._left or {}).items()):
            if not pending & {each.segment for each in statements} and path.parent != self._mirror.folder:
                await self._aside(path.unlink, True)
                del (self._left or {})[path]

    def _state(self, action: str, subject: str) -> None:
        """Write down what the chain has found out about itself, without waiting: it would wait for itself."""

        async def state() -> None:
            try:
                await self._audit.record(SYSTEM, action, subject=subject)
            except AuditBroken as error:
                log.error("audit_not_written", error=error.detail)

        self._stating = asyncio.create_task(state())

    def _tell(self, trouble: str | None) -> None:
        if trouble != self._told:
            if trouble is not None:
                log.error("audit_chain_stopped", reason=trouble)
            self._told = trouble
        self._metrics.audit_stopped.set(trouble is not None)


def _head(item: Any) -> Head:
    name, fields = item
    return Head(int(name.partition(b"-")[0]), fields.get(b"h", b"").decode())
