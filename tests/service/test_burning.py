"""The burn-rate halt: outcomes of explored decisions count once over all replicas, and bad ones halt exploration."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import msgspec
import pytest
import redis
from prometheus_client import CollectorRegistry

from safety.burn import BurnLimit
from service.burning import PAGE, PAGES, READ, Burning, outcome
from service.clock import ManualClock
from service.decision import DecisionEvent, Event, RewardEvent, RewardFlags, encode_events
from service.leases import Leases
from service.ledger import Ledger
from service.metrics import Metrics
from service.redis_streams import RedisStreams, base, connect
from service.shipper import Shipper
from service.valkey import EmbeddedValkey
from tests.service.admins import STATE, Admin, serving
from tests.service.valkeys import SMALL
from tests.surefoot.valkey import LossyProxy, Valkey
from tests.waiting import until

LIMIT = BurnLimit(rate=0.2, bad_reward=0.5)
numbers = count()


@dataclass
class Reader:
    """A replica's reader, and what it needs to have something to read."""

    policy: str
    burning: Burning
    ledger: Ledger
    shipper: Shipper
    clock: ManualClock
    metrics: Metrics

    async def close(self, *rewards: float | None, explored: bool = True, **record: Any) -> None:
        """Let decisions happen and end with these rewards; None: the action was not executed."""
        for reward in rewards:
            name, now = f"d-{next(numbers)}", self.clock.event_ms()
            raw = msgspec.msgpack.encode({"behaviour": bytes(16), "explored": explored, "epsilon": 0.1} | record)
            flags = RewardFlags.NOT_EXECUTED if reward is None else RewardFlags.NONE
            events: list[Event] = [
                DecisionEvent(name, "", -1, now + 1_000, now, "0", bytes(8), b"\1\1", raw),
                RewardEvent(name, "", "x", now, now + 1_000, int(flags), "", b"", repr(reward or 0.0), b""),
            ]
            self.ledger.append_nowait(self.policy, 2, encode_events(events), now)
        while self.ledger.statistics().unshipped_events:
            self.shipper.kick()
            await self.shipper.run_once()

    async def read(self, limit: BurnLimit = LIMIT) -> None:
        await self.burning.run_once({self.policy: limit})

    def seen(self, kind: str) -> float:
        labels = {"policy": self.policy, "outcome": kind}
        return self.metrics.registry.get_sample_value("surefoot_explored_outcomes_total", labels) or 0.0


@asynccontextmanager
async def reader(url: str, policy: str, own_url: str | None = None) -> AsyncIterator[Reader]:
    """own_url: how the reader alone reaches Redis."""
    streams, apart = RedisStreams(connect(url)), RedisStreams(connect(own_url or url))
    clock, metrics = ManualClock(), Metrics(CollectorRegistry())
    ledger = Ledger(None, clock, tier="memory")
    shipper = Shipper(ledger, streams, clock, jitter=lambda: 0.0)
    leases = Leases(apart, clock, lambda: "w")
    try:
        yield Reader(policy, Burning(apart, leases, metrics), ledger, shipper, clock, metrics)
    finally:
        await streams.aclose()
        await apart.aclose()


def counted(store: redis.Redis, policy: str) -> tuple[int, int]:
    """Outcomes, and those of them that burnt, over all buckets."""
    found: Any = store.hgetall(f"{base(policy)}:burn")
    sums = {kind: sum(int(n) for name, n in found.items() if name.endswith(kind)) for kind in (b":n", b":x")}
    return sums[b":n"], sums[b":x"]


# -- what counts


def test_bad_rewards_and_errors_of_explored_decisions_burn(valkey_url: str, store: redis.Redis, policy: str) -> None:
    async def scenario() -> None:
        async with reader(valkey_url, policy) as one:
            await one.close(0.0)
            await one.read()
            assert counted(store, policy) == (0, 0)  # it was over before there was a limit
            await one.close(0.0, 0.0, 1.0, explored=False)
            await one.close(0.49, 0.5, 1.0, None)
            await one.close(1.0, fallback="check_failed")
            await one.read()
            assert counted(store, policy) == (5, 3)
            assert (one.seen("burnt"), one.seen("good")) == (3.0, 2.0)
            await one.close(-9.0, None)
            await one.read(BurnLimit(rate=0.2))
            assert counted(store, policy) == (7, 4)  # without `bad_reward` errors alone burn

    asyncio.run(scenario())


def test_a_decision_without_a_reward_counts_with_the_default(valkey_url: str, store: redis.Redis, policy: str) -> None:
    async def scenario() -> None:
        async with reader(valkey_url, policy) as one:
            await one.read()
            store.xadd(f"{base(policy)}:transitions", {"j": "defaulted", "r": "0.0", "d": record(True)})
            await one.read()
            assert counted(store, policy) == (1, 1)

    asyncio.run(scenario())


def test_what_only_looks_explored_does_not_count() -> None:
    assert outcome([b"joined", b"0.0", record(False, context={"explored": True})]) is None
    assert outcome([b"joined", b"0.25", record(True)]) == (False, 0.25)
    assert outcome([b"void", b"", record(True)]) == (True, None)
    assert outcome([b"quarantined", b"", record(True)]) == (True, None)


def record(explored: bool, **fields: Any) -> bytes:
    return msgspec.msgpack.encode({"behaviour": b"\xa8", "explored": explored} | fields)


# -- once


def test_of_many_readers_each_outcome_counts_once(valkey_url: str, store: redis.Redis, policy: str) -> None:
    async def scenario() -> None:
        async with reader(valkey_url, policy) as one, reader(valkey_url, policy) as two:
            await asyncio.gather(one.read(), two.read())
            for _ in range(10):
                await asyncio.gather(one.close(*[0.0] * 30), two.close(*[1.0] * 30), one.read(), two.read())
            await asyncio.gather(one.read(), two.read())
            assert counted(store, policy) == (600, 300)
            async with reader(valkey_url, policy) as later:  # one that was started again
                await later.read()
            assert counted(store, policy) == (600, 300)

    asyncio.run(scenario())


def test_a_reader_that_was_overtaken_goes_on_from_there(valkey_url: str, store: redis.Redis, policy: str) -> None:
    async def scenario() -> None:
        async with reader(valkey_url, policy) as slow, reader(valkey_url, policy) as fast:
            script = slow.burning._streams.script
            waiting = [0.0, 1.0, 0.0]

            async def overtaken(source: bytes, *arguments: Any) -> Any:
                found = await script(source, *arguments)
                if source is READ and waiting:
                    await fast.close(waiting.pop())
                    await fast.read()
                return found

            await slow.read()
            await slow.close(0.0, 1.0)
            slow.burning._streams.script = overtaken  # type: ignore[assignment,method-assign]
            for _ in range(4):
                await slow.read()
            assert (waiting, counted(store, policy)) == ([], (5, 3))
            assert slow.seen("good") + slow.seen("burnt") + fast.seen("good") + fast.seen("burnt") == 5

    asyncio.run(scenario())


def test_a_lost_answer_counts_once(tmp_path: Path, policy: str) -> None:
    async def scenario() -> None:
        async with reader(server.url, policy, proxy.url) as one:
            await one.read()
            for turn in range(1, 4):
                await one.close(0.0)
                proxy.lose = b"\r\n$1\r\n1\r\n$1\r\n1\r\n"  # one outcome, one burnt
                await one.read()
                assert proxy.lost == turn
                await one.read()
                with server.client() as client:
                    assert counted(client, policy) == (turn, turn)

    with tempfile.TemporaryDirectory(prefix="sf-") as short, Valkey(Path(short)) as server:
        proxy = LossyProxy(server.socket_path)
        try:
            asyncio.run(scenario())
        finally:
            proxy.close()


def test_a_long_backlog_is_read_in_pages(valkey_url: str, store: redis.Redis, policy: str) -> None:
    stream = f"{base(policy)}:transitions"

    async def scenario() -> None:
        async with reader(valkey_url, policy) as one:
            await one.read()
            with store.pipeline() as pipe:
                for _ in range(PAGE * PAGES + 5):
                    pipe.xadd(stream, {"j": "joined", "r": "1.0", "d": record(True)})
                pipe.execute()
            await one.read()
            assert counted(store, policy) == (PAGE * PAGES, 0)
            await one.read()
            assert counted(store, policy) == (PAGE * PAGES + 5, 0)

    asyncio.run(scenario())


def test_what_nobody_has_read_for_long_does_not_count(valkey_url: str, store: redis.Redis, policy: str) -> None:
    stream = f"{base(policy)}:transitions"

    async def scenario() -> None:
        async with reader(valkey_url, policy) as one:
            await one.read()
            seconds, _ = store.time()
            for age_s in (601, 600, 590):
                store.xadd(stream, {"j": "joined", "r": "0.0", "d": record(True)}, id=f"{(seconds - age_s) * 1000}-1")
            await one.read()
            assert counted(store, policy)[0] in (1, 2)  # of 600 s the second's fraction decides
            await one.burning.run_once({})
            await one.close(0.0)
            await one.read()
            assert counted(store, policy)[0] in (2, 3)

    asyncio.run(scenario())


def test_without_redis_nothing_is_counted_and_nothing_raised(tmp_path: Path, policy: str) -> None:
    async def scenario() -> None:
        async with reader(f"unix://{tmp_path}/nowhere.sock", policy) as one:
            await one.read()

    asyncio.run(scenario())


# -- through the service

BURN = {"rate": 0.2, "bad_reward": 0.5, "min_volume": 5, "short_s": 2, "long_s": 20, "hold_s": 2}


@pytest.fixture
def shared(tmp_path: Path) -> Iterator[str]:
    mine = EmbeddedValkey(tmp_path / "shared", maxmemory_bytes=SMALL)
    yield mine.start()
    mine.stop()


def explore(admin: Admin, policy: str, **document: Any) -> None:
    admin.pushed(policy, "v1", prefers=1)
    tag = admin.http.get(f"/admin/policies/{policy}/exploration").headers["etag"]
    answer = admin.http.put(f"/admin/policies/{policy}/exploration", json=document, headers={"If-Match": tag})
    assert answer.status_code == 200, answer.text


def play(admin: Admin, policy: str, reward: float, **fields: Any) -> None:
    """Decide on a batch and give explored decisions this reward, others a bad one."""
    answer = admin.http.post("/v1/act/batch", json={"policy": policy, "states": [STATE] * 30})
    assert answer.status_code == 200, answer.text
    decided = zip(answer.json()["decision_id"], answer.json()["explored"], strict=True)
    rewards = [
        {"decision_id": name, "reward": reward if explored else -1.0} | (fields if explored else {})
        for name, explored in decided
    ]
    assert admin.http.post("/v1/reward/batch", json={"rewards": rewards}).status_code == 202


def explores(admin: Admin, policy: str) -> bool:
    return bool(admin.act(policy)["exploration"]["epsilon"] > 0.0)


def metric(admin: Admin, name: str, *labels: str) -> float:
    lines = admin.http.get("/metrics").text.splitlines()
    found = [line for line in lines if line.startswith(f"surefoot_{name}{{") and all(each in line for each in labels)]
    return float(found[0].split()[-1]) if found else 0.0


def test_bad_outcomes_halt_exploration_everywhere_until_a_probe_goes_well(
    tmp_path: Path, policy: str, shared: str
) -> None:
    with (
        serving(tmp_path / "one", redis_url=shared) as one,
        serving(tmp_path / "two", redis_url=shared) as two,
        redis.Redis.from_url(shared, protocol=2) as store,
    ):

        def stands() -> str:
            raw: Any = store.hget(f"{base(policy)}:explore", "burn")
            return str(msgspec.msgpack.decode(raw)[0])

        def played(admin: Admin, reward: float, state: str) -> bool:
            play(admin, policy, reward)
            return stands() == state

        explore(one, policy, epsilon=0.5, burn=BURN)
        where = f"/admin/policies/{policy}"
        until(lambda: two.http.get(where).json().get("generation") == 2, "the other replica")
        for admin in (one, two):
            until(lambda admin=admin: explores(admin, policy), "a lease")  # type: ignore[misc]
        until(lambda: played(one, 0.0, "halted"), "the halt")
        for admin in (one, two):  # a probe may begin meanwhile: it goes wrong
            until(lambda admin=admin: played(one, 0.0, "halted") and not explores(admin, policy), "a halt")  # type: ignore[misc]
        until(lambda: stands() == "probing", "the probe")
        until(lambda: explores(two, policy), "the probe in the other replica")
        until(lambda: played(two, 0.0, "halted"), "a probe that goes wrong")
        until(lambda: played(two, 1.0, "running"), "a probe that goes well")
        for admin in (one, two):
            until(lambda admin=admin: explores(admin, policy), "exploration")  # type: ignore[misc]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Admin]:
    with serving(tmp_path_factory.mktemp("burning")) as mine:
        yield mine


def test_good_outcomes_do_not_halt(alone: Admin, policy: str) -> None:
    """Whatever becomes of decisions that did not explore."""
    explore(alone, policy, epsilon=0.5, burn=BURN)
    until(lambda: explores(alone, policy), "a lease")

    def enough() -> bool:
        play(alone, policy, 1.0)
        assert metric(alone, "exploration_halted", policy) == 0.0
        return metric(alone, "explored_outcomes_total", policy, "good") >= 200

    until(enough, "outcomes")
    assert metric(alone, "explored_outcomes_total", policy, "burnt") == 0.0


def test_actions_that_are_not_executed_halt_without_a_bad_reward(alone: Admin, policy: str) -> None:
    explore(alone, policy, epsilon=0.5, burn={k: v for k, v in BURN.items() if k != "bad_reward"})
    until(lambda: explores(alone, policy), "a lease")

    def halted() -> bool:
        play(alone, policy, 1.0, executed=False)
        return metric(alone, "exploration_halted", policy) == 1.0

    until(halted, "the halt")
    assert metric(alone, "explored_outcomes_total", policy, "burnt") >= BURN["min_volume"]
