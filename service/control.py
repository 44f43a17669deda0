"""EDGE: how each policy is deployed at run time: one small document per policy in Redis, and a copy of it on disk.

    sf:{policy}:control        hash: `deployment` (the document, with its generation), `rev` (changes with anything)
    sf:{policy}:gone:<label>   a version that is being deleted: for a while no deployment may name it

Duty: read all documents at once, change one by compare-and-set on its generation, say that versions came or went
(`touch`). What a document means is decided in `catalog.py`.
Strategy: `rev` grows with every change of a policy, so that replicas list its versions only when something happened.
Promise: of two changes from one generation one wins and the other is told the generation that stands; a deployment and
the deletion of a version that it names never both succeed.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import msgspec
import structlog

from policies.errors import GenerationMoved, InvalidField, VersionLive
from service.audit_log import AuditLog
from service.redis_streams import POLICIES, RedisStreams, base
from service.standing import Document, Known

log = structlog.get_logger(__name__)

# A deletion asks, then removes the files: seconds, but for a store far away.
GONE_MS = 60_000
SNAPSHOT = "control.json"
UNREADABLE = (-1, None)

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
# ARGV: rev, document, its generation. A Redis that has lost its memory is told again, unless it knows better.
REMIND = """
local raw = redis.call('HGET', KEYS[1] .. ':control', 'deployment')
if ARGV[2] ~= '' and (not raw or cjson.decode(raw).generation < tonumber(ARGV[3])) then
  redis.call('HSET', KEYS[1] .. ':control', 'deployment', ARGV[2])
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

    async def read(self) -> dict[str, tuple[int, Document | None]]:
        """Give each policy's `rev` and document; UNREADABLE where a newer service wrote it. Raises StoreAway."""
        found: dict[str, tuple[int, Document | None]] = {}
        for name in sorted(each.decode() for each in await self._streams.command("SMEMBERS", POLICIES)):
            rev, raw = await self._streams.command("HMGET", f"{base(name)}:control", "rev", "deployment")
            found[name] = int(rev or 0), None
            if raw is not None:
                try:
                    found[name] = int(rev or 0), msgspec.json.decode(raw, type=Document)
                except msgspec.DecodeError as error:
                    log.error("deployment_not_readable", policy=name, error=str(error))
                    found[name] = UNREADABLE
        return found

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
