"""Tier `replicated`: what is acknowledged is on a replica's disk; what is not is sent again wherever it is missing."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from policies.errors import Unconfirmed
from service.clock import ManualClock, SystemClock
from service.shipcall import Confirm
from tests.service.clusters import server
from tests.service.pairs import DURABLE, Pair, pair, transitions
from tests.service.test_shipper import POLICY, World, once, open_world
from tests.service.test_shipper import until as until_done

PATIENT = Confirm(1, 20.0)
HASTY = Confirm(1, 1.0)  # a hundred times what a pair takes that is well
DEADLINE_S = 60.0


@pytest.fixture
def both(tmp_path: Path) -> Iterator[Pair]:
    with pair(tmp_path) as found:
        yield found


def with_world(data_dir: Path, url: str, scenario: Callable[[World], Awaitable[None]], **options: Any) -> None:
    async def run() -> None:
        options.setdefault("confirm", PATIENT)
        async with asyncio.timeout(DEADLINE_S), open_world(data_dir, url, tier="replicated", **options) as world:
            await scenario(world)

    asyncio.run(run())


async def kept(world: World, rows: int = 1) -> list[asyncio.Future[None]]:
    """Append decisions with their rewards, and wait until they are on this machine's disk."""
    futures = []
    for _ in range(rows):
        name = f"d{len(world.ids)}"
        world.ids.append(name)
        futures += [world.append([each]).committed for each in (world.decision(name), world.reward(name))]
    lane = world.ledger.register(POLICY)
    await until_done(lambda: lane.end == lane.assigned)
    return futures


async def turn(world: World) -> None:
    """Let a second pass, and make the calls that are due."""
    assert isinstance(world.clock, ManualClock)
    world.clock.advance(1000)
    await world.shipper.run_once()


async def confirming(world: World) -> None:
    """Make calls until replicas confirm: a new one writes its file anew first."""
    while not world.ledger.recording(POLICY):
        await turn(world)


async def in_vain(futures: list[asyncio.Future[None]]) -> None:
    for future in futures:
        with pytest.raises(Unconfirmed):
            await future


# Replicas confirm


def test_a_row_counts_once_a_replica_has_it_on_disk_and_goes_out_at_once(both: Pair, tmp_path: Path) -> None:
    async def scenario(world: World) -> None:
        assert not world.ledger.recording(POLICY), "nothing is known yet"
        await world.shipper.run_once()
        assert world.ledger.recording(POLICY), "a heartbeat was confirmed"
        futures = await kept(world, 3)
        assert not any(future.done() for future in futures)
        assert world.ledger.statistics().unconfirmed_events == 6
        await world.shipper.run_once()
        assert all(future.done() and not future.exception() for future in futures)
        assert transitions(both.replica, POLICY) == once(world.ids)
        assert world.ledger.statistics().unconfirmed_events == 0
        acks = world.shipper.statistics().acks
        assert acks is not None
        assert (acks.enough, acks.local, acks.replicas, acks.by) == (True, 1, 1, "waitaof")

    with_world(tmp_path / "data", both.url, scenario)


def test_the_running_loop_confirms_without_being_asked(both: Pair, tmp_path: Path) -> None:
    async def scenario(world: World) -> None:
        running = asyncio.create_task(world.shipper.run())
        await world.decide(50)
        assert transitions(both.replica, POLICY) == once(world.ids), "what is acknowledged is there"
        assert await world.shipper.drain(DEADLINE_S)
        await running

    with_world(tmp_path / "data", both.url, scenario, clock=SystemClock())


def test_servers_that_sync_once_a_second_confirm_when_they_are_given_the_time(tmp_path: Path) -> None:
    async def scenario(world: World) -> None:
        running = asyncio.create_task(world.shipper.run())
        await world.decide(2)
        await world.decide(2)
        assert world.shipper.statistics().failures == {}, "a wait longer than a socket's deadline breaks nothing"
        assert await world.shipper.drain(DEADLINE_S)
        await running

    with pair(tmp_path) as both:
        for node in (both.primary, both.replica):
            node.ask("CONFIG", "SET", "appendfsync", "everysec")
        with_world(tmp_path / "data", both.url, scenario, clock=SystemClock())


# They do not


def test_without_a_replica_nothing_is_acknowledged_nobody_waits_long_and_all_is_shipped(
    both: Pair, tmp_path: Path
) -> None:
    async def scenario(world: World) -> None:
        await confirming(world)
        unconfirmed = world.shipper.statistics().failures.get("unconfirmed", 0)
        both.replica.kill()
        futures = await kept(world)
        await turn(world)
        assert not world.ledger.recording(POLICY)
        await in_vain(futures)
        await in_vain(await kept(world))  # they do not wait at all
        assert world.ledger.accepting, "the events themselves are taken"
        await world.shipper.run_once()
        assert transitions(both.primary, POLICY) == once(world.ids), "and shipped, without waiting for replicas"
        assert world.ledger.statistics().unconfirmed_events == 4
        assert world.shipper.statistics().failures["unconfirmed"] == unconfirmed + 1, "one call a second waits"
        both.replica.start()
        both.follow()
        await confirming(world)
        assert world.ledger.statistics().unconfirmed_events == 0
        (again, _) = await kept(world)
        await world.shipper.run_once()
        await again

    with_world(tmp_path / "data", both.url, scenario, confirm=HASTY)


def test_redis_that_does_not_answer_stops_exploring_and_ends_the_waiting(both: Pair, tmp_path: Path) -> None:
    async def scenario(world: World) -> None:
        await confirming(world)
        failures = sum(world.shipper.statistics().failures.values())
        both.proxy.down()
        futures = await kept(world)
        await world.shipper.run_once()
        assert not world.ledger.recording(POLICY)
        assert sum(world.shipper.statistics().failures.values()) == failures + 1
        await in_vain(futures)
        both.proxy.heal()
        await confirming(world)
        assert transitions(both.replica, POLICY) == once(world.ids)

    with_world(tmp_path / "data", both.url, scenario, confirm=HASTY)


def test_counts_are_compared(both: Pair, tmp_path: Path) -> None:
    async def scenario(world: World) -> None:
        await in_vain(await kept(world))
        while not (acks := world.shipper.statistics().acks) or acks.replicas < 1:
            await turn(world)
        assert (acks.enough, acks.local, acks.replicas, acks.by) == (False, 1, 1, "waitaof")
        assert "1 of 2" in acks.detail
        assert not world.ledger.recording(POLICY)

    with_world(tmp_path / "data", both.url, scenario, confirm=Confirm(2, 1.0))


def test_a_primary_without_an_append_only_file_confirms_nothing(both: Pair, tmp_path: Path) -> None:
    async def scenario(world: World) -> None:
        await world.shipper.run_once()
        both.primary.ask("CONFIG", "SET", "appendonly", "no")
        futures = await kept(world)
        await world.shipper.run_once()
        acks = world.shipper.statistics().acks
        assert acks is not None
        assert (acks.enough, acks.by) == (False, "none")
        assert "appendonly" in acks.detail
        await in_vain(futures)

    with_world(tmp_path / "data", both.url, scenario, confirm=HASTY)


def test_a_server_without_waitaof_is_asked_what_replicas_have_in_memory(tmp_path: Path) -> None:
    async def scenario(world: World) -> None:
        await world.shipper.run_once()
        assert not world.ledger.recording(POLICY)
        await turn(world)
        acks = world.shipper.statistics().acks
        assert acks is not None
        assert (acks.enough, acks.replicas, acks.by) == (True, 1, "wait")
        futures = await kept(world)
        await world.shipper.run_once()
        await asyncio.gather(*futures)

    with pair(tmp_path, "--rename-command", "WAITAOF", "") as both:
        with_world(tmp_path / "data", both.url, scenario)


def test_a_row_that_redis_refuses_is_not_acknowledged(both: Pair, tmp_path: Path) -> None:
    async def scenario(world: World) -> None:
        await world.shipper.run_once()
        poison = world.ledger.append_nowait(POLICY, 1, b"\xc1 no msgpack", world.clock.event_ms())
        (good, other) = await kept(world)
        await world.ship_all()
        with pytest.raises(Unconfirmed, match="refuses"):
            await poison.committed
        await asyncio.gather(good, other)

    with_world(tmp_path / "data", both.url, scenario)


# The primary is lost


def test_what_the_promoted_replica_lacks_is_sent_again(both: Pair, tmp_path: Path) -> None:
    async def scenario(world: World) -> None:
        await confirming(world)
        acked = await kept(world, 5)
        await world.shipper.run_once()
        await asyncio.gather(*acked)
        both.part()
        lacking = await kept(world, 5)
        await turn(world)
        await in_vain(lacking)
        assert transitions(both.primary, POLICY) == once(world.ids)
        assert set(transitions(both.replica, POLICY)) == set(world.ids[:5]), "it lacks what was not confirmed"
        both.fail_over()
        await in_vain(await kept(world, 5))
        while not world.shipper.statistics().gaps:
            await turn(world)
        await world.ship_all()
        assert transitions(both.primary, POLICY) == once(world.ids)
        assert world.shipper.statistics().gaps == 1
        assert world.ledger.statistics().lost_events == 0
        assert not world.ledger.recording(POLICY), "it has no replica yet"
        both.replica.start()
        both.follow()
        await confirming(world)
        assert transitions(both.replica, POLICY) == once(world.ids)

    with_world(tmp_path / "data", both.url, scenario, confirm=HASTY)


def test_acknowledged_rows_that_another_replica_had_are_sent_again_too(tmp_path: Path) -> None:
    """One of two replicas confirms; the other, which was cut off, is promoted."""

    async def scenario(world: World) -> None:
        await confirming(world)
        both.replica.ask("REPLICAOF", "127.0.0.1", 1)
        acked = await kept(world, 5)
        await turn(world)
        await asyncio.gather(*acked)
        assert not transitions(both.replica, POLICY)
        third.kill()
        both.fail_over()
        while not world.shipper.statistics().gaps:
            await turn(world)
        await world.ship_all()
        assert transitions(both.primary, POLICY) == once(world.ids)
        assert world.ledger.statistics().lost_events == 0

    with pair(tmp_path) as both, server(tmp_path / "three", *DURABLE) as third:
        both.follow(third)
        with_world(tmp_path / "data", both.url, scenario, confirm=HASTY)


# The spool


def test_the_spool_keeps_what_replicas_have_not_confirmed_however_old(both: Pair, tmp_path: Path) -> None:
    async def scenario(world: World) -> None:
        assert isinstance(world.clock, ManualClock)
        both.part()
        for _ in range(5):
            await in_vain(await kept(world, 4))
        await turn(world)
        assert transitions(both.primary, POLICY) == once(world.ids)
        before = world.ledger.statistics().files
        for _ in range(2):
            world.clock.advance(121_000)
            await world.ledger.tidy()
        assert world.ledger.statistics().files == before > 1, "applied long ago, but by one machine alone"
        both.follow()
        await confirming(world)
        for _ in range(2):
            world.clock.advance(121_000)
            await world.ledger.tidy()
        assert world.ledger.statistics().files < before

    with_world(tmp_path / "data", both.url, scenario, confirm=HASTY, rotate_bytes=5_000)


def test_what_a_dead_worker_left_is_let_go_once_replicas_have_it(both: Pair, tmp_path: Path) -> None:
    async def left(world: World) -> None:
        await in_vain(await kept(world, 5))

    async def scenario(world: World) -> None:
        assert isinstance(world.clock, ManualClock)
        for _ in range(4):
            await turn(world)
            world.clock.advance(121_000)
        assert set(transitions(both.primary, POLICY)) == {f"d{n}" for n in range(5)}
        assert [lane.live for lane in world.ledger.lanes()] == [True, False], "by one machine alone"
        both.follow()
        while len(world.ledger.lanes()) > 1:
            await turn(world)
            world.clock.advance(121_000)
        assert transitions(both.replica, POLICY) == transitions(both.primary, POLICY)

    both.part()
    with_world(tmp_path / "data", both.url, left, confirm=HASTY)
    with_world(tmp_path / "data", both.url, scenario, confirm=Confirm(1, 0.2))
