"""EDGE: a Redis of whichever shape, reached by one URL; deadlines; redis-py's errors in this project's words.

Duty: `connect` makes the client, `answered` turns what goes wrong into StoreAway or Refused. What is sent, and what an
answer means, is `redis_streams.py`'s to know.
Strategy: redis-py retries by default, ten times for a single server, and would repeat a script whose reply was lost.
Here its retries are off, its Sentinel client does nothing but name the primary, and its cluster client is not used at
all (`redis_cluster.py` says why). Who calls decides what is tried again: the shipper, whose batches are numbered.
Promise: a call ends within TIMEOUT_S, whatever the network does, and was sent once, or not at all. A call that failed
leaves no connection behind that leads to a server which has been demoted, moved or lost.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Final, Protocol

from redis.asyncio import ConnectionPool, Redis, Sentinel, SSLConnection, UnixDomainSocketConnection
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import DataError, MovedError, NoScriptError, RedisError, ResponseError

from policies.errors import ConfigError, StoreAway
from service.redis_cluster import Cluster
from service.redis_pool import OTHER, Pool, PoolStatistics, Send, T, demoted, reason_of, untrusted
from service.shipcall import Refused
from surefoot.redis_url import Address, RedisUrl, parse

TIMEOUT_S: Final = 0.5
# Of Sentinels each is asked for so long, so that silent ones leave time for the others, and for the primary.
SENTINEL_S: Final = 0.1
FIELD: Final = "SUREFOOT_REDIS_URL"

# Commands that are about a server, not about a key.
KEYLESS: Final = frozenset(
    {"CLIENT", "COMMAND", "CONFIG", "DBSIZE", "INFO", "LATENCY", "PING", "ROLE", "SCRIPT", "TIME", "WAIT", "WAITAOF"}
)
# Where the key stands, for commands that do not have it first.
KEY_AT: Final[Mapping[str, int]] = {"EVAL": 3, "EVALSHA": 3, "XINFO": 2, "XGROUP": 2, "OBJECT": 2, "MEMORY": 2}


class Topology(Protocol):
    """Where calls go."""

    async def run(self, key: bytes | None, send: Send[T]) -> T: ...

    async def aclose(self) -> None: ...

    def statistics(self) -> PoolStatistics: ...


class Client:
    """Sends commands. Use from the event loop's thread only; nothing is sent before the first call."""

    def __init__(self, topology: Topology, beside: Callable[[], Awaitable[None]] | None = None) -> None:
        self._topology = topology
        self._beside = beside  # what else has to be closed

    async def execute_command(self, *command: Any, timeout_s: float = TIMEOUT_S, **options: Any) -> Any:
        """Run one command where its key lies. Raises what redis-py raises, or TimeoutError.

        command: as on the wire. options: for redis-py's reading of the reply.
        """

        async def send(redis: Redis) -> Any:
            answer = await redis.execute_command(*command, **options)  # type: ignore[no-untyped-call]
            if demoted(command[0], answer):
                raise Demoted(answer)
            return answer

        try:
            async with asyncio.timeout(timeout_s):
                return await self._topology.run(key_of(command), send)
        except Demoted as told:  # an answer all the same; the connections are left behind by now
            return told.answer

    async def in_order(
        self,
        *commands: tuple[Any, ...],
        timeout_s: float = TIMEOUT_S,
        until: Callable[[Any], bool] = lambda reply: False,
    ) -> list[Any]:
        """Run commands on one connection, at the first one's key, each once the one before is answered.

        Gives the replies, up to the first that `until` holds of; a command that Redis refuses has its error in its
        place, and where that is the first, none is sent behind it. Raises what redis-py raises.
        """

        async def send(redis: Redis) -> list[Any]:
            answers: list[Any] = []
            async with redis.client() as held:  # its connection, once lost, fails the call: it is not made anew
                for command in commands:
                    try:
                        answers.append(await held.execute_command(*command))  # type: ignore[no-untyped-call]
                    except ResponseError as error:
                        if not answers and (isinstance(error, MovedError) or untrusted(error)):
                            raise
                        answers.append(error)
                        if len(answers) == 1:
                            break
                    if until(answers[-1]):
                        break
            return answers

        async with asyncio.timeout(timeout_s):
            return await self._topology.run(key_of(commands[0]), send)

    async def aclose(self) -> None:
        await self._topology.aclose()
        if self._beside is not None:
            await self._beside()

    def statistics(self) -> PoolStatistics:
        return self._topology.statistics()


class Demoted(RedisError):
    """A server says that it is a replica."""

    def __init__(self, answer: Any) -> None:
        super().__init__("a replica")
        self.answer = answer


class One:
    """A single server, or whichever the Sentinels name."""

    def __init__(self, make: Callable[[], Redis]) -> None:
        self._pool = Pool(make)

    async def run(self, key: bytes | None, send: Send[T]) -> T:
        return await self._pool.run(send)

    async def aclose(self) -> None:
        await self._pool.aclose()

    def statistics(self) -> PoolStatistics:
        return self._pool.statistics()


def connect(url: str) -> Client:
    """Build the client for any URL of `surefoot/redis_url.py`. Raises ConfigError for what is no such URL."""
    try:
        parsed = parse(url)
    except ValueError as error:
        raise ConfigError(f"{FIELD}: {error}", FIELD) from None
    if parsed.kind == "sentinel":
        sentinels = _sentinels(parsed)
        return Client(One(lambda: sentinels.master_for(parsed.service)), sentinels.aclose)
    if parsed.kind == "cluster":
        return Client(Cluster(parsed.addresses, lambda address: _redis(parsed, address)))
    return Client(One(lambda: _redis(parsed, parsed.addresses[0] if parsed.addresses else None)))


async def answered(command: Awaitable[T], events: bool = False) -> T:
    """Wait for a call. Raises StoreAway with its reason; with `events`, Refused when Redis will not take just these."""
    try:
        return await command
    except (NoScriptError, DataError):  # the first is for who sends scripts; the second is a bug of ours
        raise
    except (RedisError, OSError) as error:
        raise translated(error, events) from error


def translated(error: Exception, events: bool = False) -> StoreAway | Refused:
    """Give an error of redis-py as one of ours."""
    reason, text = reason_of(error), str(error) or type(error).__name__
    if events and reason == OTHER and type(error) is ResponseError:
        return Refused(text)
    return StoreAway(f"Redis does not answer: {text}", reason=reason)


def key_of(command: tuple[Any, ...]) -> bytes | None:
    """Give a command's first key, None for one without."""
    name, *rest = str(command[0]).upper().split(" ")
    if name in KEYLESS:
        return None
    if name in ("XREAD", "XREADGROUP"):
        at = 1 + next(i for i, each in enumerate(command) if str(each).upper() == "STREAMS")
    else:
        at = KEY_AT.get(name, 1) - len(rest)
    if len(command) <= at or (name in ("EVAL", "EVALSHA") and not int(command[2])):
        return None
    key = command[at]
    return key if isinstance(key, bytes) else str(key).encode()


def _options(url: RedisUrl) -> dict[str, Any]:
    return {
        **url.options,
        "retry": Retry(NoBackoff(), 0),
        "socket_timeout": None,  # the deadline of a call ends its waits, also one that is to be long
        "socket_connect_timeout": TIMEOUT_S,
        "protocol": 2,  # the same for every server of 7.2 and later; nothing is pushed to us
    }


def _redis(url: RedisUrl, address: Address | None) -> Redis:
    options = _options(url)
    if address is None:
        options |= {"path": url.path, "connection_class": UnixDomainSocketConnection}
    else:
        options |= {"host": address[0], "port": address[1]}
        options |= {"connection_class": SSLConnection} if url.tls else {}
    return Redis.from_pool(ConnectionPool(**options))


def _sentinels(url: RedisUrl) -> Sentinel:
    timeouts = {"socket_timeout": SENTINEL_S, "socket_connect_timeout": SENTINEL_S}
    asked = _options(url) | timeouts | {"ssl": url.tls}
    for name in ("username", "password", "db", "client_name"):
        asked.pop(name, None)
    return Sentinel(  # type: ignore[no-untyped-call]
        url.addresses,
        sentinel_kwargs=asked | dict(url.sentinel_options),
        **_options(url),
        ssl=url.tls,
    )
