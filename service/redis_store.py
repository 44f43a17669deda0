"""EDGE: the store of versions in Redis, the usual one. Key names and scripts; the commands go through `RedisStreams`.

    sf:{policy}:versions            label -> StoredVersion as JSON
    sf:{policy}:blob:<sha256>:<n>   piece n of a file, by content

Duty: keep, list, fetch and delete versions. It knows nothing of what is live: who deletes has asked before.
Strategy: a file may have 256 MB and a call half a second, so files travel in pieces of 2 MiB. Pieces of a version that
is not registered yet expire by themselves; registering, one script, makes them last, or says that one is missing (a
deletion of the only other version with that file came between) and they are sent again. Deleting, one script, too,
removes the pieces that no version needs. All keys of a policy share its hash tag.
Promise: a version that stands has all its pieces, whoever pushes or deletes beside.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from hashlib import sha256

import msgspec

from policies.errors import BundlesAway
from policies.store import FileRef, StoredVersion, damaged
from service.redis_streams import POLICIES, RedisStreams, base

PIECE_BYTES = 2 << 20
# Pieces of a push that never came to its end go after this long; a push of 256 MB takes seconds.
DRAFT_MS = 10 * 60 * 1000
TRIES = 5

# A piece that lasts keeps lasting; writing it again mends one that was damaged.
PUT_PIECE = """
local lasts = redis.call('PTTL', KEYS[1]) == -1
redis.call('SET', KEYS[1], ARGV[1])
if not lasts then redis.call('PEXPIRE', KEYS[1], ARGV[2]) end
return 1
"""
# ARGV: label, entry, then (sha256, pieces) for each file. Gives the entry that stands, or `missing`.
REGISTER = """
local standing = redis.call('HGET', KEYS[1] .. ':versions', ARGV[1])
if standing then return standing end
local pieces = {}
for i = 3, #ARGV, 2 do
  for n = 0, tonumber(ARGV[i + 1]) - 1 do pieces[#pieces + 1] = KEYS[1] .. ':blob:' .. ARGV[i] .. ':' .. n end
end
for _, piece in ipairs(pieces) do
  if redis.call('EXISTS', piece) == 0 then return 'missing' end
end
for _, piece in ipairs(pieces) do redis.call('PERSIST', piece) end
redis.call('HSET', KEYS[1] .. ':versions', ARGV[1], ARGV[2])
return ARGV[2]
"""
# ARGV: label, digest, bytes of a piece.
DELETE = """
local standing = redis.call('HGET', KEYS[1] .. ':versions', ARGV[1])
if not standing then return 0 end
local gone = cjson.decode(standing)
if gone.digest ~= ARGV[2] then return 0 end
redis.call('HDEL', KEYS[1] .. ':versions', ARGV[1])
local needed = {}
for _, entry in ipairs(redis.call('HVALS', KEYS[1] .. ':versions')) do
  for _, file in pairs(cjson.decode(entry).files) do needed[file.sha256] = true end
end
for _, file in pairs(gone.files) do
  if not needed[file.sha256] then
    for n = 0, math.max(1, math.ceil(file.size / tonumber(ARGV[3]))) - 1 do
      redis.call('UNLINK', KEYS[1] .. ':blob:' .. file.sha256 .. ':' .. n)
    end
  end
end
return 1
"""


class RedisStore:
    """Versions in the Redis that holds everything else."""

    def __init__(self, streams: RedisStreams) -> None:
        self._streams = streams

    async def policies(self) -> set[str]:
        """Name the policies that have, or have had, versions."""
        return {name.decode() for name in await self._streams.command("SMEMBERS", POLICIES)}

    async def versions(self, policy: str) -> dict[str, StoredVersion]:
        """List a policy's versions by label."""
        found = await self._streams.command("HVALS", f"{base(policy)}:versions")
        entries = [msgspec.json.decode(raw, type=StoredVersion) for raw in found]
        return {entry.version: entry for entry in entries}

    async def put(self, entry: StoredVersion, files: Mapping[str, bytes]) -> StoredVersion:
        """Add a version, unless its label is taken. Gives the entry that stands."""
        key, raw = base(entry.policy), msgspec.json.encode(entry)
        standing = await self._streams.command("HGET", f"{key}:versions", entry.version)
        if standing is not None:
            return msgspec.json.decode(standing, type=StoredVersion)
        await self._streams.command("SADD", POLICIES, entry.policy)
        counts = [part for file in entry.files.values() for part in (file.sha256, pieces_of(file))]
        for _ in range(TRIES):
            for name, content in files.items():
                await self._send(key, entry.files[name], content)
            stands = await self._streams.command("EVAL", REGISTER, 1, key, entry.version, raw, *counts)
            if stands != b"missing":
                return msgspec.json.decode(stands, type=StoredVersion)
        raise BundlesAway(f"{entry.policy}/{entry.version}: others kept deleting the same files; push again")

    async def fetch(self, entry: StoredVersion) -> dict[str, bytes]:
        """Read a version's files. Raises BundleError when they are gone or damaged."""
        return {name: await self._read(entry, file) for name, file in entry.files.items()}

    async def delete(self, entry: StoredVersion) -> None:
        """Remove a version, and the files that no other version needs."""
        key = base(entry.policy)
        await self._streams.command("EVAL", DELETE, 1, key, entry.version, entry.digest, PIECE_BYTES)

    async def _send(self, key: str, file: FileRef, content: bytes) -> None:
        for n in range(pieces_of(file)):
            piece = memoryview(content)[n * PIECE_BYTES : (n + 1) * PIECE_BYTES]
            await self._streams.command("EVAL", PUT_PIECE, 1, f"{key}:blob:{file.sha256}:{n}", bytes(piece), DRAFT_MS)

    async def _read(self, entry: StoredVersion, file: FileRef) -> bytes:
        pieces: list[bytes] = []
        for n in range(pieces_of(file)):
            piece = await self._streams.command("GET", f"{base(entry.policy)}:blob:{file.sha256}:{n}")
            if piece is None:
                raise damaged(entry)
            pieces.append(piece)
        content, digest = await asyncio.to_thread(_joined, pieces)  # 256 MB take half a second
        if digest != file.sha256:
            raise damaged(entry)
        return content


def _joined(pieces: list[bytes]) -> tuple[bytes, str]:
    content = b"".join(pieces)
    return content, sha256(content).hexdigest()


def pieces_of(file: FileRef) -> int:
    """In how many pieces a file lies; an empty one in one."""
    return max(1, -(-file.size // PIECE_BYTES))
