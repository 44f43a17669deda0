"""redis-py's clients for any URL of `redis_url.py`: a single server, the primary that Sentinels name, a cluster.

Duty: make the clients, all retries off: whoever uses one knows better what may be repeated, and how often. All keys
that a trainer asks for are of one policy, and so of one slot.
Strategy: so a cluster is one node at a time, to which a plain client leads: redis-py's own cluster client reads the
replies of a transaction in another way than its other clients. MOVED says that nothing was executed, and is followed.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Final, cast

import redis
import redis.asyncio
from redis.asyncio.retry import Retry as AsyncRetry
from redis.backoff import NoBackoff
from redis.exceptions import ClusterDownError, MovedError, ReadOnlyError
from redis.retry import Retry
from redis.sentinel import Sentinel

from surefoot.redis_url import Address, RedisUrl, parse

_REDIRECTS: Final = 4
_LEAVE = (redis.ConnectionError, redis.TimeoutError, ClusterDownError, ReadOnlyError)


def client(redis_url: str, timeout_s: float) -> redis.Redis:
    """Make a client that fails at once. Raises ValueError for what is no URL of a Redis."""
    url = parse(redis_url)
    options = _options(url, timeout_s) | {"retry": Retry(NoBackoff(), 0)}
    if url.kind == "socket":
        return redis.Redis(unix_socket_path=url.path, **options)
    options |= {"ssl": url.tls}
    if url.kind == "server":
        return redis.Redis(*url.addresses[0], **options)
    if url.kind == "sentinel":
        asked = _of_sentinels(url, timeout_s) | {"retry": Retry(NoBackoff(), 0)}
        watchers = Sentinel(url.addresses, sentinel_kwargs=asked, **options)  # type: ignore[no-untyped-call]
        return cast(redis.Redis, watchers.master_for(url.service))  # type: ignore[no-untyped-call]
    made = _Cluster(url.addresses, lambda address: redis.Redis(*address, **options))
    return cast(redis.Redis, made)


def async_client(redis_url: str, timeout_s: float) -> redis.asyncio.Redis:
    """`client` for an event loop."""
    url = parse(redis_url)
    options = _options(url, timeout_s) | {"retry": AsyncRetry(NoBackoff(), 0)}
    if url.kind == "socket":
        return redis.asyncio.Redis(unix_socket_path=url.path, **options)
    options |= {"ssl": url.tls}
    if url.kind == "server":
        return _async_redis(url.addresses[0], options)
    if url.kind == "sentinel":
        asked = _of_sentinels(url, timeout_s) | {"retry": AsyncRetry(NoBackoff(), 0)}
        watchers = redis.asyncio.Sentinel(url.addresses, sentinel_kwargs=asked, **options)  # type: ignore[no-untyped-call]
        primary = cast(_Primary, watchers.master_for(url.service, redis_class=_Primary))
        primary.watchers = watchers
        return primary
    made = _AsyncCluster(url.addresses, lambda address: _async_redis(address, options))
    return cast(redis.asyncio.Redis, made)


def _async_redis(address: Address, options: dict[str, Any]) -> redis.asyncio.Redis:
    return redis.asyncio.Redis(host=address[0], port=address[1], **options)


class _Primary(redis.asyncio.Redis):
    """Closes its connections to the Sentinels, too, which redis-py leaves to the garbage collector."""

    watchers: redis.asyncio.Sentinel

    async def aclose(self, close_connection_pool: bool | None = None) -> None:
        await super().aclose(close_connection_pool)
        await self.watchers.aclose()


class _Cluster:
    """Stands for a client of the node that has the keys asked for, found by what MOVED says.

    A node that fails is left for the next of those that the URL names. A PING finds one that answers before anything
    is sent that might have to be sent again.
    """

    def __init__(self, nodes: Sequence[Address], make: Callable[[Address], Any]) -> None:
        self._nodes = deque(nodes)
        self._make = make
        self._client: Any = None
        self._address = self._nodes[0]

    def __getattr__(self, name: str) -> Callable[..., Any]:
        return lambda *arguments, **options: self.run(lambda client: getattr(client, name)(*arguments, **options))

    def pipeline(self, transaction: bool = True) -> _Pipeline:
        return _Pipeline(self)

    def run(self, send: Callable[[Any], Any]) -> Any:
        for _ in range(_REDIRECTS):
            try:
                return send(self._here())
            except MovedError as moved:
                self._leave()
                self._address = moved.host or self._address[0], moved.port
            except _LEAVE:
                self._fail()
                raise
        raise redis.ConnectionError("the cluster's nodes do not agree on who has this slot")

    def close(self) -> None:
        self._leave()

    def _here(self) -> Any:
        for left in range(len(self._nodes), 0, -1):
            if self._client is not None:
                break
            self._client = self._make(self._address)
            try:
                self._client.ping()
            except redis.RedisError:
                self._fail()
                if left == 1:
                    raise
        return self._client

    def _leave(self) -> None:
        if self._client is not None:
            self._client.close()
        self._client = None

    def _fail(self) -> None:
        self._leave()
        self._nodes.rotate(-1)
        self._address = self._nodes[0]


class _AsyncCluster(_Cluster):
    async def run(self, send: Callable[[Any], Any]) -> Any:
        for _ in range(_REDIRECTS):
            try:
                return await send(await self._here())
            except MovedError as moved:
                await self.aclose()
                self._address = moved.host or self._address[0], moved.port
            except _LEAVE:
                await self._next()
                raise
        raise redis.ConnectionError("the cluster's nodes do not agree on who has this slot")

    async def _here(self) -> Any:
        for left in range(len(self._nodes), 0, -1):
            if self._client is not None:
                break
            self._client = self._make(self._address)
            try:
                await self._client.ping()
            except redis.RedisError:
                await self._next()
                if left == 1:
                    raise
        return self._client

    async def _next(self) -> None:
        await self.aclose()
        self._fail()

    async def aclose(self) -> None:
        gone, self._client = self._client, None
        if gone is not None:
            await gone.aclose()


class _Pipeline:
    """A transaction, kept as it was said, so that it can be said to another node."""

    def __init__(self, cluster: _Cluster) -> None:
        self._cluster = cluster
        self._said: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *arguments, **options: self._said.append((name, arguments, options))

    def execute(self) -> Any:
        return self._cluster.run(self._execute)

    def _execute(self, client: Any) -> Any:
        pipe = client.pipeline(transaction=True)
        for name, arguments, options in self._said:
            getattr(pipe, name)(*arguments, **options)
        return pipe.execute()


def _options(url: RedisUrl, timeout_s: float) -> dict[str, Any]:
    waits = {"socket_timeout": timeout_s, "socket_connect_timeout": timeout_s}
    return {**url.options, **waits, "protocol": 2}


def _of_sentinels(url: RedisUrl, timeout_s: float) -> dict[str, Any]:
    waits = {"socket_timeout": timeout_s, "socket_connect_timeout": timeout_s}
    return {**url.sentinel_options, **waits, "protocol": 2, "ssl": url.tls}
