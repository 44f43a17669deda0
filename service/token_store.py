"""EDGE: where tokens are kept: one document in Redis, changed by compare-and-set, and a copy of it on disk.

    sf:tokens         hash: `generation`, `document`
    sf:tokens:used    hash: token id -> when it was used last, to ten minutes

Duty: read, change, follow. Nothing here is asked on the way of a request: `access.py` is given the table.
Strategy: as with deployments (`control.py`): polled each 500 ms, so that a token that is revoked ends everywhere
within 2 s; a Redis that has fallen back to an older document gets the newer one again, so that a restored backup
revives no token.
Promise: without Redis the tokens known last still hold, from the copy on disk; it holds hashes, and is its owner's
alone.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Iterable
from hashlib import sha256
from pathlib import Path
from typing import Any, Final

import msgspec
import structlog

from policies.errors import StoreAway, TokensMoved
from service.clock import Clock
from service.redis_streams import RedisStreams
from service.tokens import Token, Tokens

KEY: Final = "sf:tokens"
USED: Final = "sf:tokens:used"
SNAPSHOT: Final = "tokens.json"
POLL_S: Final = 0.5
COARSE_MS: Final = 600_000  # who asks when a token was last used asks for days

# ARGV: generation to replace, document. Gives {} when done, else what stands.
CHANGE: Final = b"""
local standing = redis.call('HGET', KEYS[1], 'generation') or '0'
if standing ~= ARGV[1] then return {standing} end
redis.call('HSET', KEYS[1], 'generation', tostring(tonumber(ARGV[1]) + 1), 'document', ARGV[2])
return {}
"""
# ARGV: generation, document. A Redis that knows better keeps what it has.
REMIND: Final = b"""
local standing = tonumber(redis.call('HGET', KEYS[1], 'generation') or '0')
if standing < tonumber(ARGV[1]) then redis.call('HSET', KEYS[1], 'generation', ARGV[1], 'document', ARGV[2]) end
return 1
"""

log = structlog.get_logger(__name__)


class TokenStore:
    """All tokens, as one worker knows them. Use from the event loop's thread only."""

    def __init__(
        self, streams: RedisStreams, data_dir: Path, clock: Clock, publish: Callable[[Iterable[Token]], None]
    ) -> None:
        self._streams = streams
        self._path = data_dir / SNAPSHOT
        self._clock = clock
        self._publish = publish
        self._known = Tokens()
        self._used: dict[str, int] = {}  # what has not been told to Redis yet
        self._told: dict[str, int] = {}

    @property
    def tokens(self) -> list[Token]:
        """All tokens that stand, the oldest first."""
        return sorted(self._known.tokens.values(), key=lambda each: (each.created_at_ms, each.id))

    async def start(self) -> None:
        """Learn the tokens: of the disk first, then of Redis, if it is there."""
        kept = await asyncio.to_thread(self._read)
        self._take(kept, keep=False)
        await self.run_once()

    async def run_once(self) -> None:
        """Follow Redis, and tell it which tokens were used. Does not raise for what may pass."""
        try:
            await self.refresh()
            if self._used:
                used, self._used = self._used, {}
                self._told |= used
                await self._streams.command("HSET", USED, *(part for pair in used.items() for part in pair))
        except StoreAway as error:
            log.debug("tokens_not_read", reason=error.detail)

    async def refresh(self) -> Tokens:
        """Read the tokens as they stand. Raises StoreAway."""
        standing = int(await self._streams.command("HGET", KEY, "generation") or 0)
        if standing < self._known.generation:
            log.error("redis_lost_tokens", generation=standing, known=self._known.generation)
            raw = msgspec.json.encode(self._known)
            await self._streams.script(REMIND, KEY, self._known.generation, raw)
        elif standing > self._known.generation:
            raw = await self._streams.command("HGET", KEY, "document")
            self._take(msgspec.json.decode(raw, type=Tokens))
            await asyncio.to_thread(self._write, self._known)
        return self._known

    async def change(self, step: Callable[[Tokens], Tokens]) -> None:
        """Replace the document by what `step` makes of it; again when somebody was faster.

        Raises what `step` raises, StoreAway, or TokensMoved when it never was the first.
        """
        for _ in range(20):
            wanted = step(await self.refresh())
            raw = msgspec.json.encode(wanted)
            if not await self._streams.script(CHANGE, KEY, wanted.generation - 1, raw):
                self._take(wanted)
                await asyncio.to_thread(self._write, wanted)
                return
        raise TokensMoved("other changes of tokens were faster; send it again")

    def used(self, token_id: str) -> None:
        """Remember that a token was used."""
        now_ms = self._clock.event_ms() // COARSE_MS * COARSE_MS
        if self._told.get(token_id, 0) < now_ms and token_id in self._known.tokens:
            self._used[token_id] = now_ms

    async def last_used(self) -> dict[str, int]:
        """Say when tokens were last used, by id. Raises StoreAway."""
        found: dict[bytes, bytes] = await self._streams.command("HGETALL", USED)
        return {name.decode(): int(at_ms) for name, at_ms in found.items()} | self._used

    def _take(self, tokens: Tokens, *, keep: bool = True) -> None:
        self._known = tokens
        self._told = {name: at_ms for name, at_ms in self._told.items() if name in tokens.tokens}
        self._publish(tokens.tokens.values())
        if keep:
            log.info("tokens", generation=tokens.generation, count=len(tokens.tokens))

    def _write(self, tokens: Tokens) -> None:
        body = msgspec.json.encode(tokens)
        draft = self._path.with_suffix(f".{os.getpid()}.new")
        try:
            with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
                file.write(sha256(body).hexdigest().encode() + b"\n" + body)
                file.flush()
                os.fsync(file.fileno())
            draft.replace(self._path)
        except OSError as error:
            log.error("tokens_not_kept", error=str(error))

    def _read(self) -> Tokens:
        """Read the copy; one that is missing or damaged knows no token."""
        try:
            digest, _, body = self._path.read_bytes().partition(b"\n")
            if sha256(body).hexdigest().encode() == digest:
                return msgspec.json.decode(body, type=Tokens)
            log.error("tokens_damaged", path=str(self._path))
        except FileNotFoundError:
            pass
        except (OSError, msgspec.DecodeError) as error:
            log.error("tokens_not_read", error=str(error))
        return Tokens()


def view(token: Token, last_used_ms: int | None, now_ms: int) -> dict[str, Any]:
    """A token as operators see it: all but its hash."""
    fields: dict[str, Any] = msgspec.to_builtins(token)
    del fields["hash"]
    return fields | {"last_used_at_ms": last_used_ms, "expired": not token.valid(now_ms)}
