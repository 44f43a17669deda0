"""EDGE: which node of a Redis Cluster has a key's slot, and a pool of connections for each node.

Duty: find the node, follow MOVED, ask for the map of slots again when it may be wrong.
Strategy: redis-py's own cluster client sends again what may have been executed, and sends ASKING over another
connection than the command. Here a call is sent once, and again only after MOVED, which says that it was not executed.
ASK is not followed, on purpose: while a slot moves key by key, a script would run on a node that has some of a policy's
keys only. Such a call is away until the slot has moved as a whole; moving a slot atomically (Valkey 9, Redis 8.4) never
answers ASK.
Promise: every policy's keys are read and written on one node, all of them; one node's silence does not keep calls from
the others for longer than their deadline.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Final

from redis.asyncio import Redis
from redis.crc import key_slot
from redis.exceptions import ClusterDownError, MovedError, RedisError, ResponseError

from service.redis_pool import Pool, PoolStatistics, Send, T
from surefoot.redis_url import Address

SLOTS: Final = 16384
# Two changes of the map at the same time, and one to spare.
REDIRECTS: Final = 3
# For the map: short, so that within a call's deadline another node is asked when the first is silent.
ASK_S: Final = 0.12


class Cluster:
    """Use from the event loop's thread only."""

    def __init__(self, seeds: Sequence[Address], make: Callable[[Address], Redis]) -> None:
        self._seeds = tuple(seeds)
        self._make = make
        self._pools: dict[Address, Pool] = {}
        self._owners: list[Address | None] = [None] * SLOTS
        self._stale = True
        self._order = deque(self._seeds)  # whom to ask for the map; who has failed comes last
        self._turn = asyncio.Lock()

    async def run(self, key: bytes | None, send: Send[T]) -> T:
        """Make a call where `key` lies; without one, at the first primary. Raises what redis-py raises."""
        address = await self._owner(key)
        for attempt in range(REDIRECTS + 1):
            try:
                return await self._pool(address).run(send)
            except MovedError as moved:
                self._stale = True
                if attempt == REDIRECTS:
                    raise
                address = self._owners[moved.slot_id] = (moved.host or address[0], moved.port)
            except BaseException as error:
                # An answer is an answer, but for one that says that the cluster is in trouble.
                self._stale |= not isinstance(error, ResponseError) or isinstance(error, ClusterDownError)
                raise
        raise AssertionError("unreachable")

    async def aclose(self) -> None:
        for pool in self._pools.values():
            await pool.aclose()

    def statistics(self) -> PoolStatistics:
        each = [pool.statistics() for pool in self._pools.values()]
        return PoolStatistics(
            sum(one.running for one in each), sum(one.waiting for one in each), sum(one.renewed for one in each)
        )

    async def _owner(self, key: bytes | None) -> Address:
        if self._stale:
            await self._refresh()
        if key is not None:
            owner = self._owners[key_slot(key)]
        else:
            owner = min((each for each in self._owners if each), default=None)
        if owner is None:
            self._stale = True
            raise ClusterDownError("no node is known to serve this slot")
        return owner

    async def _refresh(self) -> None:
        """Ask one node after the other for the map. Raises what the last one raised."""
        async with self._turn:
            failure: Exception | None = None
            for _ in range(len(self._order)):
                if not self._stale:
                    return
                address = self._order[0]
                self._order.rotate(-1)
                try:
                    async with asyncio.timeout(ASK_S):
                        answer = await self._pool(address).run(_slots)
                except (RedisError, OSError) as error:
                    failure = error
                    continue
                self._take(answer, address)
            if self._stale:
                raise failure or ClusterDownError("no node answers")

    def _take(self, answer: list[Any], told_by: Address) -> None:
        owners: list[Address | None] = [None] * SLOTS
        for first, last, (host, port, *_), *_ in answer:
            # An empty host means the one that was asked.
            owner = (host.decode() if host else told_by[0], int(port))
            owners[first : last + 1] = [owner] * (last + 1 - first)
        self._owners, self._stale = owners, False
        known = {each for each in owners if each} | set(self._seeds)
        self._order = deque([*sorted(known - {*self._order}), *(each for each in self._order if each in known)])
        for gone in self._pools.keys() - known:
            if self._pools[gone].empty:
                del self._pools[gone]
            else:
                self._pools[gone].renew()

    def _pool(self, address: Address) -> Pool:
        pool = self._pools.get(address)
        if pool is None:
            pool = self._pools[address] = Pool(lambda: self._make(address))
        return pool


async def _slots(redis: Redis) -> Any:
    return await redis.execute_command("CLUSTER", "SLOTS")  # type: ignore[no-untyped-call]
