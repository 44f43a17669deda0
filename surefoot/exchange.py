"""What is asked of Redis, apart from how it is sent: requests as values, and the two ways to carry them out.

Duty: let the logic of reading a stream stand once, for programs with and without an event loop. An `Exchange` is a
generator: it yields what it wants done, is sent the reply, and is thrown what failed. It opens no connection and knows
no clock. The two functions that drive it are all that the synchronous and the asynchronous reader do not share.
Promise: whatever ends a request, also a cancelled task or Ctrl-C, is thrown into the exchange, which then knows that a
reply may have been lost.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any, TypeVar

import redis
import redis.asyncio

from surefoot.errors import Refused, SurefootError, Unreachable
from surefoot.topology import async_client, client

T = TypeVar("T")

_AWAY = (
    redis.ConnectionError,  # also LOADING
    redis.TimeoutError,
    redis.exceptions.ReadOnlyError,
    redis.exceptions.TryAgainError,
    redis.exceptions.ClusterDownError,
    redis.exceptions.AskError,  # the policy's slot is being moved
)
# How answers begin that redis-py has no class for, and that pass: too few replicas, a snapshot that fails, a primary
# that is gone, a script that runs long, a server that became a replica while a command waited.
_WITHIN = " of pipeline caused error: "  # what redis-py puts before the words of a command in a transaction
_PASSING = frozenset({"NOREPLICAS", "MISCONF", "MASTERDOWN", "BUSY", "UNBLOCKED", "OOM"})


class Command:
    """One command, by the name of redis-py's method for it, which both of its clients have."""

    __slots__ = ("arguments", "name", "options")

    def __init__(self, name: str, *arguments: Any, **options: Any) -> None:
        self.name, self.arguments, self.options = name, arguments, options

    def on(self, client: Any) -> Any:
        return getattr(client, self.name)(*self.arguments, **self.options)


@dataclass(frozen=True, slots=True)
class Transaction:
    """Commands between which nothing else happens. Its reply is the list of theirs."""

    commands: tuple[Command, ...]

    def on(self, client: Any) -> Any:
        pipe = client.pipeline(transaction=True)
        for command in self.commands:
            command.on(pipe)
        return pipe.execute()


@dataclass(frozen=True, slots=True)
class Pause:
    """Nothing is sent for so long."""

    seconds: float


Request = Command | Transaction | Pause
Exchange = Generator[Request, Any, T]


def run(exchange: Exchange[T], client: redis.Redis, sleep: Callable[[float], None] = time.sleep) -> T:
    """Carry an exchange out, blocking."""
    resume: Callable[[Any], Request] = exchange.send
    value: Any = None
    while True:
        try:
            request = resume(value)
        except StopIteration as done:
            result: T = done.value
            return result
        try:
            value = None
            if isinstance(request, Pause):
                sleep(request.seconds)
            else:
                value = request.on(client)
            resume = exchange.send
        except BaseException as error:
            value, resume = error, exchange.throw


async def run_async(exchange: Exchange[T], client: redis.asyncio.Redis) -> T:
    """Carry an exchange out, awaiting."""
    resume: Callable[[Any], Request] = exchange.send
    value: Any = None
    while True:
        try:
            request = resume(value)
        except StopIteration as done:
            result: T = done.value
            return result
        try:
            value = await (asyncio.sleep(request.seconds) if isinstance(request, Pause) else request.on(client))
            resume = exchange.send
        except BaseException as error:
            value, resume = error, exchange.throw


def connect(redis_url: str, timeout_s: float) -> redis.Redis:
    """Make a client that fails at once: whoever uses it knows better what may be repeated, and how often."""
    return client(redis_url, timeout_s)


def connect_async(redis_url: str, timeout_s: float) -> redis.asyncio.Redis:
    """`connect` for an event loop."""
    return async_client(redis_url, timeout_s)


def is_away(error: redis.RedisError) -> bool:
    """Whether waiting may help: Redis restarts, loads its files, or a failover is under way."""
    if isinstance(error, redis.AuthenticationError | redis.exceptions.AuthorizationError):
        return False
    said = str(error).rpartition(_WITHIN)[2]
    return isinstance(error, _AWAY) or said.split(" ", 1)[0] in _PASSING


def translated(error: redis.RedisError) -> SurefootError:
    """Give an error of redis-py as one of this package's."""
    if is_away(error):
        return Unreachable(f"Redis does not answer: {error}", maybe_received=True)
    return Refused(f"Redis refuses: {error}")
