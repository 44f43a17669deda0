"""What a trainer gets from `transitions_async`: what `transitions` gives, and what cancelled tasks leave behind."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import redis

from surefoot import AsyncTransitions, Batch, Gap, Unreachable, transitions_async
from tests.surefoot.stream_entries import add, key
from tests.surefoot.test_streams import blocked, numbers, pending, reader
from tests.surefoot.valkey import LossyProxy, Valkey

SOON_S = 0.01
DEADLINE_S = 60.0


def awaiting(valkey: Valkey, policy: str, consumer: str = "c", **options: Any) -> AsyncTransitions:
    """A consumer that takes what is there and ends."""
    given: dict[str, Any] = {"redis_url": valkey.url, "block_s": SOON_S, "max_wait_s": 0.0, **options}
    return transitions_async(policy, "g", consumer, **given)


async def steps(stream: AsyncTransitions) -> list[int]:
    """The entries' numbers, in the order they came, each batch acknowledged."""
    async with stream:
        return [int(step) async for batch in stream for step in batch.steps]


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while not condition():
            await asyncio.sleep(0.01)


def test_it_delivers_and_acknowledges_as_the_blocking_one(valkey: Valkey, store: redis.Redis, policy: str) -> None:
    add(store, policy, [0, 1, 0, 2, 3])

    async def read() -> None:
        async with awaiting(valkey, policy, batch_size=2) as stream:
            assert (await anext(stream)).steps.tolist() == [0, 1]
            assert pending(store, policy) == 2
            assert (await anext(stream)).steps.tolist() == [2, 3]
            assert pending(store, policy) == 2  # the copy went with what it is a copy of
            assert await anext(stream, None) is None
            assert pending(store, policy) == 0
            assert stream.statistics()["copies"] == 1

    asyncio.run(read())


def test_a_restarted_one_gets_what_the_blocking_one_had_not_acknowledged(
    valkey: Valkey, store: redis.Redis, policy: str
) -> None:
    add(store, policy, range(5))
    with reader(valkey, policy, batch_size=2) as stream:
        next(stream)
        next(stream)
    assert asyncio.run(steps(awaiting(valkey, policy))) == [2, 3, 4]
    assert pending(store, policy) == 0


def test_a_batch_is_acknowledged_by_its_reader_alone(valkey: Valkey, store: redis.Redis, policy: str) -> None:
    add(store, policy, range(4))

    async def read() -> None:
        async with awaiting(valkey, policy, batch_size=2, auto_ack=False) as stream:
            first, second = [batch async for batch in stream]
            with pytest.raises(RuntimeError, match=r"await reader\.ack"):
                first.ack()
            await stream.ack(second)
            assert pending(store, policy) == 2
            await stream.ack()
            assert pending(store, policy) == 0

    asyncio.run(read())


def test_a_cancelled_wait_takes_nothing_and_the_next_one_goes_on(
    valkey: Valkey, store: redis.Redis, policy: str
) -> None:
    async def read() -> None:
        async with awaiting(valkey, policy, block_s=60.0, max_wait_s=None, batch_size=1) as stream:
            waiting = asyncio.create_task(anext(stream))
            await until(lambda: blocked(store))
            waiting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiting
            add(store, policy, [0])
            assert (await anext(stream)).steps.tolist() == [0]
            assert stream.statistics()["reconnects"] == 0

    asyncio.run(read())


@pytest.mark.parametrize("claim_idle_s", [0.0001, 3600.0], ids=["claiming", "alone"])
def test_cancelled_at_any_moment_nothing_is_lost_or_doubled(
    valkey: Valkey, store: redis.Redis, policy: str, claim_idle_s: float
) -> None:
    add(store, policy, range(300))
    with reader(valkey, policy, "dead", batch_size=50) as dead:
        next(dead)
    found: list[int] = []

    async def read() -> None:
        async with awaiting(valkey, policy, batch_size=1, claim_idle_s=claim_idle_s) as stream:
            cancelled = 0
            for turns in range(200):
                asked: asyncio.Task[Batch] = asyncio.create_task(anext(stream))
                for _ in range(turns % 40):
                    await asyncio.sleep(0)
                asked.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    found.extend((await asked).steps.tolist())
                cancelled += asked.cancelled()
            assert 0 < cancelled < 200
            found.extend([int(step) async for batch in stream for step in batch.steps])

    asyncio.run(read())
    left = 0 if claim_idle_s < 1.0 else 50  # with the dead consumer
    assert sorted(found) == list(range(left, 300))
    assert pending(store, policy) == left


def test_one_task_asks_at_a_time_and_another_may_acknowledge(valkey: Valkey, store: redis.Redis, policy: str) -> None:
    add(store, policy, [0])

    async def read() -> None:
        options: dict[str, Any] = {"block_s": 60.0, "max_wait_s": None, "batch_size": 1, "auto_ack": False}
        async with awaiting(valkey, policy, **options) as stream:
            first = await anext(stream)
            waiting: asyncio.Task[Batch] = asyncio.create_task(anext(stream))
            await until(lambda: blocked(store))
            with pytest.raises(RuntimeError, match="another task"):
                await anext(stream)
            await stream.ack(first)
            assert pending(store, policy) == 0
            add(store, policy, [1])
            assert (await waiting).steps.tolist() == [1]

    asyncio.run(read())


def test_what_the_checkpoint_holds_is_dropped_and_acknowledged(valkey: Valkey, store: redis.Redis, policy: str) -> None:
    add(store, policy, range(6))

    async def crash() -> bytes:
        async with awaiting(valkey, policy, batch_size=2, auto_ack=False) as stream:
            await anext(stream)
            await anext(stream)
            state = stream.state()
            await anext(stream)
            return state

    state = asyncio.run(crash())
    assert asyncio.run(steps(awaiting(valkey, policy, state=state))) == [4, 5]
    assert pending(store, policy) == 0


@pytest.mark.parametrize("command", [b"CREATE", b"HGETALL", b"XREADGROUP", b"XAUTOCLAIM", b"XACK", b"EXEC\r\n"])
def test_a_lost_reply_loses_and_doubles_nothing(
    valkey: Valkey, store: redis.Redis, policy: str, command: bytes
) -> None:
    add(store, policy, range(3))
    if command == b"CREATE":
        expected = list(range(9))
    else:
        assert numbers(reader(valkey, policy, "early")) == [0, 1, 2]
        expected = list(range(3, 9))
    add(store, policy, range(3, 9))
    proxy = LossyProxy(valkey.socket_path)
    proxy.lose = command
    options: dict[str, Any] = {"redis_url": proxy.url, "claim_idle_s": 0.0001, "max_wait_s": 0.5, "batch_size": 2}
    with contextlib.closing(proxy):
        assert sorted(asyncio.run(steps(awaiting(valkey, policy, **options)))) == expected
    assert proxy.lost == 1
    assert pending(store, policy) == 0


def test_it_outlives_a_killed_redis_and_tells_a_gap(short_path: Path, policy: str) -> None:
    async def read(server: Valkey, store: redis.Redis) -> None:
        async with awaiting(server, policy, batch_size=2, max_wait_s=DEADLINE_S) as stream:
            assert (await anext(stream)).steps.tolist() == [0, 1]
            server.kill()
            asked: asyncio.Task[Batch] = asyncio.create_task(anext(stream))
            await until(lambda: stream.statistics()["reconnects"] >= 2)
            await asyncio.to_thread(server.start)
            assert (await asked).steps.tolist() == [2, 3]
            store.xtrim(key(policy), maxlen=0, approximate=False)
            add(store, policy, [9])
            with pytest.raises(Gap) as caught:
                await anext(stream)
            assert (caught.value.reason, caught.value.lost) == ("trimmed", 1)
            assert (await anext(stream)).steps.tolist() == [9]

    with Valkey(short_path, durable=True) as server, server.client() as store:
        add(store, policy, range(5))
        asyncio.run(read(server, store))


def test_redis_away_for_max_wait_s_is_unreachable(short_path: Path, policy: str) -> None:
    with pytest.raises(Unreachable):
        asyncio.run(steps(awaiting(Valkey(short_path), policy)))
