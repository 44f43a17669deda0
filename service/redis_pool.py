"""EDGE: the connections to one Redis server, or to whatever a name leads to at the moment; what its errors mean.

Duty: send a call once, over one of a bounded number of connections, and forget connections that cannot be trusted any
more. It knows no keys and no commands.
Strategy: after a failed call, or an answer that only a demoted primary gives, all connections are left behind: the next
call opens a new one, and so asks DNS, the load balancer or the Sentinels again. Calls that are under way on the old
ones end as they would have; then these are closed.
Promise: nothing is sent twice; at most CONNECTIONS calls are under way and WAITING wait for their turn, the next is
refused at once. Deadlines are set by who calls (`redis_connection.py`).
"""

from __future__ import annotations

import asyncio
import errno
import socket
import ssl
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final, TypeVar

from redis.asyncio import Redis
from redis.exceptions import (
    AskError,
    AuthenticationError,
    AuthorizationError,
    BusyLoadingError,
    ClusterDownError,
    ConnectionError,
    MasterDownError,
    MaxConnectionsError,
    MovedError,
    NoPermissionError,
    OutOfMemoryError,
    ReadOnlyError,
    RedisError,
    ResponseError,
    TimeoutError,
    TryAgainError,
)

T = TypeVar("T")
Send = Callable[[Redis], Awaitable[T]]

# A worker has fewer calls under way when all is well: one for the shipper, one per policy for limits, leases and so on.
CONNECTIONS: Final = 32
WAITING: Final = 1024

# The order counts: MASTERDOWN is a CLUSTERDOWN for redis-py, MOVED an ASK.
CLASSES: Final[tuple[tuple[type[Exception], str], ...]] = (
    (OutOfMemoryError, "oom"),
    (ReadOnlyError, "readonly"),
    (BusyLoadingError, "loading"),
    (MasterDownError, "masterdown"),
    (ClusterDownError, "clusterdown"),
    (AuthenticationError, "noauth"),
    (AuthorizationError, "noauth"),
    (NoPermissionError, "noperm"),
    (TryAgainError, "tryagain"),
    (MovedError, "moved"),
    (AskError, "ask"),
    (MaxConnectionsError, "crowded"),
    (TimeoutError, "timeout"),
    (OSError, "away"),  # refined by `_network`; asyncio's TimeoutError is one, too
    (ConnectionError, "away"),
)
# How an answer begins for which redis-py has no class. The command was given back undone and may work later.
WORDS: Final = {
    "BUSY": "busy",
    "UNKILLABLE": "busy",
    "MISCONF": "misconf",
    "NOREPLICAS": "noreplicas",
    "NOAUTH": "noauth",
}
# Words that a script's own error carries further in. Redis 7 says the former for what an ACL forbids to a script.
PARTS: Final = (
    ("ACL failure", "noperm"),
    ("No permissions", "noperm"),
    ("non local key", "moved"),
    ("max number of clients", "crowded"),
)
OTHER: Final = "error"
REASONS: Final = frozenset(
    {*(each for _, each in CLASSES), *WORDS.values(), *(each for _, each in PARTS), OTHER, "refused", "dns", "tls"}
)


def reason_of(error: BaseException) -> str:
    """Give one of REASONS for an error of redis-py or of the network."""
    if isinstance(error.__context__, ReadOnlyError):  # of the Sentinel client, which says "connection lost" for it
        return "readonly"
    named = next((name for kind, name in CLASSES if isinstance(error, kind)), OTHER)
    text = str(error)
    if named == OTHER and (word := text.split(" ", 1)[0]) in WORDS:
        return WORDS[word]
    if named in (OTHER, "away"):
        named = next((name for part, name in PARTS if part in text), named)
    return _network(error) if named == "away" else named


def _network(error: BaseException) -> str:
    for each in _causes(error):
        if isinstance(each, asyncio.TimeoutError | TimeoutError):
            return "timeout"
        if isinstance(each, ssl.SSLError):
            return "tls"
        if isinstance(each, socket.gaierror):
            return "dns"
        if isinstance(each, OSError) and each.errno in (errno.ECONNREFUSED, errno.ENOENT):
            return "refused"
    return "away"


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def untrusted(error: BaseException) -> bool:
    """Whether the connections that stand lead nowhere, or to a server that is the primary no more."""
    if isinstance(error, ReadOnlyError | MasterDownError | ClusterDownError):
        return True
    # BUSY and the like are answers: that server is there, and is the right one.
    return not isinstance(error, ResponseError | MaxConnectionsError | BusyLoadingError)


@dataclass(slots=True)
class _Generation:
    redis: Redis
    running: int = 0


@dataclass(frozen=True, slots=True)
class PoolStatistics:
    running: int
    waiting: int
    renewed: int  # times that all connections were left behind


class Pool:
    """Use from the event loop's thread only."""

    def __init__(self, make: Callable[[], Redis]) -> None:
        self._make = make
        self._now = _Generation(make())
        self._room = asyncio.Semaphore(CONNECTIONS)
        self._running = self._waiting = self._renewed = 0
        self._closing: set[asyncio.Task[None]] = set()
        self._used = False  # since connections were left behind

    @property
    def empty(self) -> bool:
        """Whether there is no connection, and nobody waits for one."""
        return not (self._used or self._closing or self._running or self._waiting)

    async def run(self, send: Send[T]) -> T:
        """Make a call. Raises what redis-py raises."""
        if self._waiting >= WAITING:
            raise MaxConnectionsError("too many calls wait for their turn")
        self._waiting += 1
        try:
            await self._room.acquire()
        finally:
            self._waiting -= 1
        self._running += 1
        try:
            return await self._run(send)
        finally:
            self._running -= 1
            self._room.release()

    def renew(self) -> None:
        """Leave all connections behind."""
        old, self._now = self._now, _Generation(self._make())
        self._renewed += 1
        self._used = False
        if not old.running:
            self._close(old)

    async def aclose(self) -> None:
        """Close all connections. Who still waits for an answer gets an error."""
        self._close(self._now)
        while self._closing:
            await asyncio.gather(*self._closing, return_exceptions=True)

    def statistics(self) -> PoolStatistics:
        return PoolStatistics(self._running, self._waiting, self._renewed)

    async def _run(self, send: Send[T]) -> T:
        mine, self._used = self._now, True
        mine.running += 1
        try:
            return await send(mine.redis)
        except BaseException as error:  # also a deadline, which cancels
            if mine is self._now and untrusted(error):
                self.renew()
            raise
        finally:
            mine.running -= 1
            if mine is not self._now and not mine.running:
                self._close(mine)

    def _close(self, old: _Generation) -> None:
        task = asyncio.get_running_loop().create_task(_closed(old.redis))
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)


async def _closed(redis: Redis) -> None:
    try:
        await redis.aclose()
    except (RedisError, OSError):
        return  # the other side is gone already


def demoted(command: str, answer: Any) -> bool:
    """Whether an answer says that its server is a replica."""
    return command == "INFO" and isinstance(answer, dict) and answer.get("role") == "slave"
