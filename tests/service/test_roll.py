"""The roll of workers, on a real Valkey of its own: who is waited for, who is named, for how long."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import redis
from prometheus_client import CollectorRegistry

from policies.deployment import Deployment
from service.clock import ManualClock
from service.metrics import Metrics
from service.redis_streams import RedisStreams, connect
from service.roll import KEEP_S, TERM_S, WORKERS, Roll
from service.standing import Document, Known, PolicyState
from tests.surefoot.valkey import Valkey

AWAY = "unix:///nowhere/redis.sock"


@pytest.fixture
def url(tmp_path: Path) -> Iterator[str]:
    with Valkey(tmp_path) as server:
        yield server.url


def state(generation: int, served: int | None = None) -> PolicyState:
    """A policy whose document is of a generation, of which this worker serves `served`."""
    documents = [Document(g, Deployment(1, "toy", "v1"), 0, "me") for g in (generation, served or 0)]
    return PolicyState("toy", known=Known(1, documents[0]), served=documents[1] if served else None)


class Worker:
    """A worker's roll, and the state that it tells of."""

    def __init__(self, streams: RedisStreams, name: str, served: int) -> None:
        self.clock, self.state = ManualClock(), state(served, served)
        self.metrics = Metrics(CollectorRegistry())
        self.roll = Roll(streams, {"toy": self.state}, self.metrics, self.clock, name)

    def gauge(self, name: str, **labels: str) -> float | None:
        self.roll.refresh_metrics()
        return self.metrics.registry.get_sample_value(f"surefoot_{name}", labels)


Make = Callable[[str, int], Worker]


@asynccontextmanager
async def making(url: str) -> AsyncIterator[Make]:
    streams = RedisStreams(connect(url))
    try:
        yield lambda name, served: Worker(streams, name, served)
    finally:
        await streams.aclose()


def run(url: str, scenario: Callable[[Make], Awaitable[None]]) -> None:
    async def work() -> None:
        async with making(url) as make, asyncio.timeout(60):
            await scenario(make)

    asyncio.run(work())


async def passing(worker: Worker, told: asyncio.Task[dict[str, list[str]]]) -> dict[str, list[str]]:
    """Let the worker's clock run until it has its answer."""
    while not told.done():
        worker.clock.advance(50)
        await asyncio.sleep(0)
    return await told


def test_who_is_alone_waits_for_nobody(url: str) -> None:
    async def scenario(make: Make) -> None:
        one = make("one", 3)
        assert await one.roll.told(one.state) == {"behind": []}  # its clock stands still: waiting would not end
        assert one.gauge("live_workers") == 1

    run(url, scenario)


def test_it_is_answered_once_all_confirm(url: str) -> None:
    async def scenario(make: Make) -> None:
        one, two = make("one", 3), make("two", 2)
        await two.roll.run_once()
        told = asyncio.create_task(one.roll.told(one.state))  # with a clock that stands still it may wait for ever
        while one.gauge("workers_behind", policy="toy") != 1:
            await asyncio.sleep(0)
        assert not told.done()
        two.state.served = one.state.served
        await two.roll.run_once()
        assert await told == {"behind": []}
        assert (one.gauge("live_workers"), one.gauge("workers_behind", policy="toy")) == (2, 0)

    run(url, scenario)


def test_who_does_not_confirm_is_named_so_that_an_operator_finds_it(url: str) -> None:
    async def scenario(make: Make) -> None:
        one, two, three = make("one", 3), make("two", 2), make("three", 9)
        for other in (two, three):
            await other.roll.run_once()
        answer = await passing(one, asyncio.create_task(one.roll.told(one.state)))
        assert answer == {"behind": [two.roll.name]}
        assert two.roll.name.endswith("/two")
        assert one.gauge("changes_behind_total", policy="toy") == 1

    run(url, scenario)


def test_this_worker_is_named_where_it_does_not_serve_it_itself(url: str) -> None:
    async def scenario(make: Make) -> None:
        one = make("one", 2)
        wanted = state(3, 2)
        assert await passing(one, asyncio.create_task(one.roll.told(wanted))) == {"behind": [one.roll.name]}

    run(url, scenario)


def test_who_left_is_neither_waited_for_nor_named(url: str) -> None:
    async def scenario(make: Make) -> None:
        one, two = make("one", 3), make("two", 2)
        await two.roll.run_once()
        await two.roll.aclose()
        assert await one.roll.told(one.state) == {"behind": []}

    run(url, scenario)


def test_who_was_restarted_takes_its_own_place(url: str) -> None:
    async def scenario(make: Make) -> None:
        one, killed, again = make("one", 3), make("two", 2), make("two", 3)
        await killed.roll.run_once()
        await again.roll.run_once()
        assert await one.roll.told(one.state) == {"behind": []}
        assert one.gauge("live_workers") == 2

    run(url, scenario)


def aged(url: str, worker: str, age_s: float) -> None:
    """Let a worker have been heard of so long ago."""
    with redis.Redis.from_url(url, protocol=2) as client:
        entry = client.hget(WORKERS, worker)
        assert isinstance(entry, bytes)
        at_ms = int((time.time() - age_s) * 1000)
        client.hset(WORKERS, worker, b"%d %s" % (at_ms, entry.partition(b" ")[2]))


def test_who_has_not_been_heard_of_for_a_term_is_waited_for_no_more(url: str) -> None:
    async def scenario(make: Make) -> None:
        one, two = make("one", 3), make("two", 2)
        await two.roll.run_once()
        aged(url, "two", TERM_S + 1)
        assert await one.roll.told(one.state) == {"behind": []}
        assert one.gauge("live_workers") == 1
        aged(url, "two", KEEP_S + 1)
        await one.roll.run_once()
        with redis.Redis.from_url(url, protocol=2) as client:
            assert client.hkeys(WORKERS) == [b"one"]

    run(url, scenario)


def test_who_falls_silent_meanwhile_is_named_at_once(url: str) -> None:
    async def scenario(make: Make) -> None:
        one, two = make("one", 3), make("two", 2)
        await two.roll.run_once()
        told = asyncio.create_task(one.roll.told(one.state))
        while one.gauge("live_workers") != 2:
            await asyncio.sleep(0)
        aged(url, "two", TERM_S + 1)
        assert await told == {"behind": [two.roll.name]}  # and its clock has stood still

    run(url, scenario)


def test_without_redis_those_are_named_that_were_alive(tmp_path: Path) -> None:
    async def scenario() -> None:
        with Valkey(tmp_path) as server:
            async with making(server.url) as make:
                one, two = make("one", 3), make("two", 2)
                await two.roll.run_once()
                await one.roll.run_once()
                server.kill()
                answer = await passing(one, asyncio.create_task(one.roll.told(one.state)))
                assert answer == {"behind": [two.roll.name]}

    asyncio.run(scenario())


def test_of_what_redis_was_not_told_nobody_else_has_heard(url: str) -> None:
    async def scenario(make: Make) -> None:
        one, two = make("one", 3), make("two", 3)
        await two.roll.run_once()
        one.state.halted_here = frozenset({"baseline_only"})
        assert await one.roll.told(one.state) == {"behind": [two.roll.name]}

    run(url, scenario)


def test_a_worker_that_never_heard_of_redis_is_alone() -> None:
    async def scenario(make: Make) -> None:
        one = make("one", 3)
        assert await one.roll.told(one.state) == {"behind": []}
        await one.roll.aclose()

    run(AWAY, scenario)


def test_an_entry_of_another_release_is_passed_over(url: str) -> None:
    async def scenario(make: Make) -> None:
        one = make("one", 3)
        with redis.Redis.from_url(url, protocol=2) as client:
            client.hset(WORKERS, "odd", b'%d {"nothing": 1}' % int(time.time() * 1000))
        assert await one.roll.told(one.state) == {"behind": []}

    run(url, scenario)
