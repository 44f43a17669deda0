"""`Idempotency-Key` on /act: a repeat returns the stored answer.

Strategy: the first request claims the key in Redis (one round trip before it decides) and stores its answer behind it;
a repeat finds claim or answer. The same worker joins a repeat to the running request. Without Redis the key holds
within the worker, and the answer says `idempotency: "local"`.
Promise: one key and body get one decision for as long as the store remembers; another body under the key is refused.
Only answers are stored: a refused request may be tried again.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from hashlib import blake2b
from typing import Protocol

import structlog

from policies.errors import InvalidField, KeyInUse, KeyReused, StoreAway

log = structlog.get_logger(__name__)
Reply = tuple[int, bytes, tuple[tuple[bytes, bytes], ...]]
REPLAYED = (b"idempotency-replayed", b"true")
# 10,000 answers of some 600 bytes: 6 MB at most.
CAPACITY = 10_000
MAX_KEY = 255


class IdempotencyStore(Protocol):
    """What is needed of Redis."""

    async def idempotent_begin(self, policy: str, key: str, digest: str) -> tuple[str, bytes | None] | None:
        """Claim a key: None when it is ours now, else the digest that holds it and its answer, if there is one yet."""

    async def idempotent_finish(self, policy: str, key: str, digest: str, response: bytes, ttl_s: float) -> None: ...

    async def idempotent_release(self, policy: str, key: str, digest: str) -> None: ...


class Idempotency:
    """Answers each key once."""

    def __init__(self, store: IdempotencyStore, ttl_s: float, capacity: int = CAPACITY) -> None:
        self._store = store
        self._ttl_s = ttl_s
        self._capacity = capacity
        self._local: OrderedDict[tuple[str, str], tuple[str, asyncio.Task[Reply]]] = OrderedDict()
        self._background: set[asyncio.Task[None]] = set()

    async def once(self, policy: str, raw_key: bytes, body: bytes, decide: Callable[[], Awaitable[Reply]]) -> Reply:
        """Decide, or return what was decided under this key. Raises KeyReused, KeyInUse or what `decide` raises."""
        key, digest = _key(raw_key), blake2b(body, digest_size=16).hexdigest()
        running = self._local.get((policy, key))
        if running is not None:
            self._same(running[0], digest)
            status, answer, headers = await asyncio.shield(running[1])
            return status, answer, (*(each for each in headers if each != REPLAYED), REPLAYED)
        task = asyncio.create_task(self._decide(policy, key, digest, decide))
        self._local[policy, key] = (digest, task)
        while len(self._local) > self._capacity:
            self._local.popitem(last=False)
        try:
            return await asyncio.shield(task)
        except Exception:
            self._local.pop((policy, key), None)
            raise

    async def aclose(self) -> None:
        """Wait for answers that are still being stored."""
        while self._background:
            await asyncio.gather(*self._background)

    async def _decide(self, policy: str, key: str, digest: str, decide: Callable[[], Awaitable[Reply]]) -> Reply:
        try:
            held = await self._store.idempotent_begin(policy, key, digest)
        except StoreAway:
            status, answer, headers = await decide()
            return status, answer[:-1] + b',"idempotency":"local"}', headers
        if held is not None:
            self._same(held[0], digest)
            if held[1] is None:
                raise KeyInUse("the first request with this Idempotency-Key is still running", "Idempotency-Key")
            return 200, held[1], (REPLAYED,)
        try:
            reply = await decide()
        except Exception:
            self._behind(self._store.idempotent_release(policy, key, digest))
            raise
        self._behind(self._store.idempotent_finish(policy, key, digest, reply[1], self._ttl_s))
        return reply

    def _behind(self, work: Awaitable[None]) -> None:
        async def run() -> None:
            try:
                await work
            except StoreAway as error:
                log.warning("idempotency_not_stored", error=error.detail)

        task = asyncio.create_task(run())
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    @staticmethod
    def _same(held: str, digest: str) -> None:
        if held != digest:
            raise KeyReused("this Idempotency-Key was used with another body", "Idempotency-Key")


def _key(raw: bytes) -> str:
    """The key, quoted as the draft standard has it or bare."""
    try:
        key = raw.decode("ascii").strip().strip('"')
    except UnicodeDecodeError:
        key = ""
    if not 1 <= len(key) <= MAX_KEY:
        raise InvalidField(f"the key must be 1 to {MAX_KEY} ASCII characters", "Idempotency-Key")
    return key
