"""EDGE: how each policy is deployed at run time: one small document per policy in Redis, and a copy of it on disk.

    sf:{policy}:control        hash: `deployment` (the document, with its generation), `rev` (changes with anything)
    sf:{policy}:gone:<label>   a version that is being deleted: for a while no deployment may name it
    sf:told                    stream of one entry: the policy that was changed last; who waits for it reads at once

Duty: read all documents at once, change one by compare-and-set on its generation, say that versions came or went
(`touch`). What a document means is decided in `catalog.py`.
Strategy: `rev` grows with every change of a policy, so that replicas list its versions only when something happened.
That something did is told by a stream, not by pub/sub (docs/decisions/0018): a hint, and whoever misses it polls.
Promise: of two changes from one generation one wins and the other is told the generation that stands; a deployment and
the deletion of a version that it names never both succeed.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import msgspec
import structlog

from policies.errors import GenerationMoved, InvalidField, StoreAway, VersionLive
from service.audit_log import AuditLog
from service.redis_streams import POLICIES, TIMEOUT_S, RedisStreams, base
from service.standing import Document, Known

log = structlog.get_logger(__name__)

# A deletion asks, then removes the files: seconds, but for a store far away.
GONE_MS = 60_000
SNAPSHOT = "control.json"
UNREADABLE = (-1, None)
TOLD = "sf:told"
FIRST = "0-0"
READERS = 16  # documents that are asked for at a time

# ARGV: expected generation, generation of a policy without a document, document, gone-keys' labels.
# Gives {} when it is done, {generation} when that is not the expected one, {label, 0} when that label is going.
CHANGE = """
local raw = redis.call('HGET', KEYS[1] .. ':control', 'deployment')
local standing = raw and cjson.decode(raw).generation or tonumber(ARGV[2])
if standing ~= tonumber(ARGV[1]) then return {tostring(standing)} end
for i = 4, #ARGV do
  if redis.call('EXISTS', KEYS[1] .. ':gone:' .. ARGV[i]) == 1 then return {ARGV[i], 'gone'} end
end
redis.call('HSET', KEYS[1] .. ':control', 'deployment', ARGV[3])
redis.call('HINCRBY', KEYS[1] .. ':control', 'rev', 1)
return {}
"""
# ARGV: label, for how long. Refuses (0) what the document names.
RETIRE = """
local raw = redis.call('HGET', KEYS[1] .. ':control', 'deployment')
if raw then
  local now = cjson.decode(raw).deployment
  if now.champion == ARGV[1] or now.baseline == ARGV[1] then return 0 end
  for _, each in ipairs(now.challengers or {}) do if each.version == ARGV[1] then return 0 end end
  for _, label in ipairs(now.shadows or {}) do if label == ARGV[1] then return 0 end end
end
redis.call('SET', KEYS[1] .. ':gone:' .. ARGV[1], '1', 'PX', ARGV[2])
return 1
"""
# ARGV: rev, document, its generation. A Redis that has lost its memory is told again, unless it knows better. Its `rev`
# may be the higher one all the same: who has listed by that must look again.
REMIND = """
local raw = redis.call('HGET', KEYS[1] .. ':control', 'deployment')
if ARGV[2] ~= '' and (not raw or cjson.decode(raw).generation < tonumber(ARGV[3])) then
  redis.call('HSET', KEYS[1] .. ':control', 'deployment', ARGV[2])
  redis.call('HINCRBY', KEYS[1] .. ':control', 'rev', 1)
end
if tonumber(redis.call('HGET', KEYS[1] .. ':control', 'rev') or '0') < tonumber(ARGV[1]) then
  redis.call('HSET', KEYS[1] .. ':control', 'rev', ARGV[1])
end
return 1
"""


@dataclass(frozen=True, slots=True)
class Moved:
    """The change was refused: the document is at this generation."""

    generation: int


@dataclass(frozen=True, slots=True)
class Going:
    """The change was refused: this version is being deleted."""

    version: str


class Control:
    """The documents of all policies."""

    def __init__(self, streams: RedisStreams, audit: AuditLog | None = None) -> None:
        self._streams = streams
        self._audit = audit
        self._heard = FIRST  # the last entry of TOLD; from the first on: nothing is missed between two readings

    async def read(self) -> dict[str, tuple[int, Document | None]]:
        """Give each policy's `rev` and document; UNREADABLE where a newer service wrote it. Raises StoreAway."""
        names = sorted(each.decode() for each in await self._streams.command("SMEMBERS", POLICIES))
        found: dict[str, tuple[int, Document | None]] = {}
        for start in range(0, len(names), READERS):
            some = names[start : start + READERS]
            found.update(zip(some, await asyncio.gather(*map(self.read_one, some)), strict=True))
        return found

    async def read_one(self, policy: str) -> tuple[int, Document | None]:
        """Give one policy's `rev` and document, as `read` does. Raises StoreAway."""
        rev, raw = await self._streams.command("HMGET", f"{base(policy)}:control", "rev", "deployment")
        try:
            return int(rev or 0), None if raw is None else msgspec.json.decode(raw, type=Document)
        except msgspec.DecodeError as error:
            log.error("deployment_not_readable", policy=policy, error=str(error))
            return UNREADABLE

    async def heed(self, wait_s: float) -> None:
        """Wait until somebody tells of a change, at most so long. Raises StoreAway."""
        command = ("XREAD", "BLOCK", int(wait_s * 1000), "STREAMS", TOLD, self._heard)
        try:
            reply = await self._streams.command(*command, timeout_s=wait_s + TIMEOUT_S)
        except StoreAway:
            self._heard = FIRST  # the next Redis may be another one, whose clock is behind
            raise
        for _, entries in reply or ():
            self._heard = entries[-1][0].decode()

    async def change(self, policy: str, document: Document, unwritten: int) -> Moved | Going | None:
        """Put a document in force if the standing generation is the one before its own.

        unwritten: the generation of a policy without a document. Gives None when it is done. Raises StoreAway.
        """
        raw, expected = msgspec.json.encode(document), document.generation - 1
        if self._audit is None:
            return await self._replace(policy, document, raw, unwritten)
        async with self._audit.document(policy, expected, document.generation, sha256(raw).hexdigest()) as note:
            refused = await self._replace(policy, document, raw, unwritten)
            if refused is not None:
                note.outcome = GenerationMoved.code if isinstance(refused, Moved) else InvalidField.code
            return refused

    async def _replace(self, policy: str, document: Document, raw: bytes, unwritten: int) -> Moved | Going | None:
        await self._streams.command("SADD", POLICIES, policy)
        labels, expected = sorted(document.deployment.versions), document.generation - 1
        reply = await self._streams.command("EVAL", CHANGE, 1, base(policy), expected, unwritten, raw, *labels)
        if not reply:
            await self._tell(policy)
            return None
        return Going(reply[0].decode()) if len(reply) > 1 else Moved(int(reply[0]))

    async def retire(self, policy: str, label: str) -> None:
        """Keep a version out of deployments while it is deleted. Raises VersionLive, or StoreAway."""
        if not await self._streams.command("EVAL", RETIRE, 1, base(policy), label, GONE_MS):
            raise VersionLive(f"{policy}/{label} is live: promote another version before you delete this one")

    async def touch(self, policy: str) -> None:
        """Tell all replicas that versions of a policy came or went. Raises StoreAway."""
        await self._streams.command("SADD", POLICIES, policy)
        await self._streams.command("HINCRBY", f"{base(policy)}:control", "rev", 1)
        await self._tell(policy)

    async def welcome(self, policy: str, label: str) -> None:
        """Let deployments name a label again that was deleted a moment ago. Raises StoreAway."""
        await self._streams.command("DEL", f"{base(policy)}:gone:{label}")

    async def remind(self, policy: str, known: Known) -> None:
        """Write a document back to a Redis that has an older one, or none. Raises StoreAway."""
        document = known.document
        raw = b"" if document is None else msgspec.json.encode(document)
        generation = 0 if document is None else document.generation
        await self._streams.command("SADD", POLICIES, policy)
        await self._streams.command("EVAL", REMIND, 1, base(policy), known.rev + 1, raw, generation)
        await self._tell(policy)

    async def _tell(self, policy: str) -> None:
        """Hint that a policy has changed. Whoever does not hear it polls."""
        with contextlib.suppress(StoreAway):
            await self._streams.command("XADD", TOLD, "MAXLEN", 1, "*", "policy", policy)


class Snapshot:
    """What was known last, on disk, for a start while Redis is away. Synchronous: call it from a thread."""

    def __init__(self, data_dir: Path) -> None:
        self._path = data_dir / SNAPSHOT

    def write(self, known: Mapping[str, Known]) -> None:
        """Replace the snapshot: its digest on the first line, so that a torn one is noticed."""
        body = msgspec.json.encode(known)
        draft = self._path.with_suffix(f".{os.getpid()}.new")
        try:
            draft.write_bytes(sha256(body).hexdigest().encode() + b"\n" + body)
            draft.replace(self._path)
        except OSError as error:
            log.error("control_snapshot_not_written", error=str(error))

    def confirm(self) -> None:
        """Note that Redis still says the same."""
        with contextlib.suppress(OSError):
            os.utime(self._path)

    def age_s(self) -> float:
        """Seconds since Redis last said so, by this machine's clock; infinite where there is no snapshot."""
        try:
            return max(0.0, time.time() - self._path.stat().st_mtime)
        except OSError:
            return math.inf

    def read(self) -> dict[str, Known]:
        """Read the snapshot; one that is missing or damaged says nothing."""
        try:
            digest, _, body = self._path.read_bytes().partition(b"\n")
            if sha256(body).hexdigest().encode() == digest:
                return msgspec.json.decode(body, type=dict[str, Known])
            log.error("control_snapshot_damaged", path=str(self._path))
        except FileNotFoundError:
            pass
        except (OSError, msgspec.DecodeError) as error:
            log.error("control_snapshot_not_read", error=str(error))
        return {}
