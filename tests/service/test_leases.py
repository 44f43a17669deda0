"""Leases at the edge, against a real Valkey that dies, forgets, is set back or does not answer."""

from __future__ import annotations

import asyncio
import itertools
import socket
import tempfile
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import redis

from safety.bank import TERM_S
from safety.budget import UNLIMITED
from safety.burn import BurnLimit
from safety.exploration import Exploration, parse_exploration
from safety.lease import Holder
from service.clock import ManualClock, SystemClock
from service.leases import Leases
from service.redis_streams import RedisStreams, base, connect
from tests.service.banks import START_MS, Bank, Fleet, Replica
from tests.surefoot.valkey import Valkey

MONTH = {"rate": {"limit": 10**9, "window_s": 31 * 86_400}, "start": "now"}  # no test sees the end of that window
names = itertools.count(1)


@pytest.fixture
def short() -> Iterator[Path]:
    """A directory whose name is short enough for a socket."""
    with tempfile.TemporaryDirectory(prefix="sf-") as directory:
        yield Path(directory)


def with_leases(url: str, scenario: Callable[[Leases, ManualClock], Awaitable[None]]) -> None:
    async def run() -> None:
        streams, clock = RedisStreams(connect(url)), ManualClock()
        try:
            await scenario(Leases(streams, clock, lambda: f"w-{next(names)}"), clock)
        finally:
            await streams.aclose()

    asyncio.run(run())


def explored(holder: Holder, clock: ManualClock, rows: int = 1) -> int:
    """How many of these rows explore, when every one that may does."""
    ones = np.ones(rows)
    settled = holder.allot(clock.monotonic_s(), ones, np.zeros(rows), ones, ones)
    holder.spend(settled, settled.allotted.reserved, ones)
    return settled.allotted.count


def document(**fields: Any) -> Exploration:
    return parse_exploration(MONTH | fields)


def test_a_server_that_has_forgotten_the_script_is_given_it_again(
    valkey_url: str, store: redis.Redis, policy: str
) -> None:
    async def scenario(leases: Leases, clock: ManualClock) -> None:
        leases.open(policy, document(), 1)
        for _ in range(2):
            store.script_flush()
            clock.advance(700)
            assert await leases.run_once() == 1
        assert leases.statistics().failures == 0

    with_leases(valkey_url, scenario)


# Redis away


def test_without_redis_exploration_ends_within_a_term_and_comes_back_by_itself(short: Path, policy: str) -> None:
    server = Valkey(short, durable=True)

    async def scenario(leases: Leases, clock: ManualClock) -> None:
        holder = leases.open(policy, document(), 1)
        assert explored(holder, clock) == 0  # nothing is leased yet
        assert await leases.run_once() == 1
        assert explored(holder, clock) == 1
        server.kill()
        clock.advance(700)
        assert await leases.run_once() == 1
        assert explored(holder, clock) == 1  # what was leased is still good
        clock.advance(int(TERM_S * 1000) - 701)
        assert explored(holder, clock) == 1
        clock.advance(1)
        assert explored(holder, clock) == 0
        assert leases.statistics().standing[policy].state == "lapsed"
        assert await leases.run_once() == 1
        assert (leases.statistics().failures, leases.statistics().lapses) == (2, 1)
        server.start()
        clock.advance(200)
        assert await leases.run_once() == 1
        assert explored(holder, clock) == 1
        await leases.aclose()

    with server:
        with_leases(server.url, scenario)
        with server.client() as client:
            (key,) = client.keys(f"{base(policy)}:explore:rate:*")
            assert client.hmget(key, "g", "u") == [b"4", b"4"]  # all that was not used is given back


def test_a_redis_that_has_forgotten_grants_nothing_more_in_the_running_window(short: Path, policy: str) -> None:
    server = Valkey(short)

    async def scenario(leases: Leases, clock: ManualClock) -> None:
        holder = leases.open(policy, document(), 1)
        await leases.run_once()
        assert explored(holder, clock) == 1
        server.kill()
        server.start()
        for _ in range(2):  # the first call meets the old connection
            clock.advance(700)
            assert await leases.run_once() == 1
        now = leases.statistics().standing[policy]
        assert (now.state, now.closed, explored(holder, clock)) == ("held", True, 0)
        assert now.left.rate == 0

    with server:
        with_leases(server.url, scenario)


def test_a_redis_that_does_not_answer_keeps_nobody_waiting(policy: str) -> None:
    async def scenario(leases: Leases, clock: ManualClock) -> None:
        for n in range(20):
            leases.open(f"{policy}-{n}", document(), 1)
        assert await leases.run_once() == 20  # all at the same time: this takes as long as one
        assert leases.statistics().failures == 20
        await leases.aclose()

    with socket.create_server(("127.0.0.1", 0), backlog=100) as silent:
        with_leases(f"redis://127.0.0.1:{silent.getsockname()[1]}", scenario)


def test_a_policy_without_caps_explores_only_while_redis_answers(short: Path, policy: str) -> None:
    server = Valkey(short)

    async def scenario(leases: Leases, clock: ManualClock) -> None:
        holder = leases.open(policy, Exploration(), 1)
        assert explored(holder, clock, 100) == 0
        await leases.run_once()
        assert explored(holder, clock, 100) == 100
        assert holder.standing(clock.monotonic_s()).left.rate == UNLIMITED
        server.kill()
        clock.advance(2_000)
        await leases.run_once()
        assert explored(holder, clock, 100) == 0

    server.start()
    with_leases(server.url, scenario)


def test_a_freeze_holds_at_once(valkey_url: str, policy: str) -> None:
    async def scenario(leases: Leases, clock: ManualClock) -> None:
        holder = leases.open(policy, document(), 1)
        await leases.run_once()
        assert explored(holder, clock) == 1
        assert leases.open(policy, document(freeze=True), 2) is holder
        assert explored(holder, clock) == 0
        assert await leases.run_once() == 1  # a change is told at once
        leases.open(policy, document(), 3)
        assert explored(holder, clock) == 1

    with_leases(valkey_url, scenario)


def test_a_closed_policy_gives_its_lease_back(valkey_url: str, policy: str, store: redis.Redis) -> None:
    async def scenario(leases: Leases, clock: ManualClock) -> None:
        holder = leases.open(policy, document(), 1)
        await leases.run_once()
        explored(holder, clock)
        await leases.close(policy)
        await leases.close("never opened")
        assert explored(holder, clock) == 0
        assert leases.statistics().standing == {}
        assert await leases.run_once() == 0

    with_leases(valkey_url, scenario)
    (key,) = store.keys(f"{base(policy)}:explore:rate:*")
    assert store.hget(key, "g") == b"1"


def test_what_cannot_be_given_back_is_burnt(short: Path, policy: str) -> None:
    server = Valkey(short)

    async def scenario(leases: Leases, clock: ManualClock) -> None:
        leases.open(policy, document(), 1)
        await leases.run_once()
        server.kill()
        await leases.aclose()
        assert leases.statistics().calls == 2

    server.start()
    with_leases(server.url, scenario)


def test_a_holder_that_is_overtaken_by_itself_asks_again(valkey_url: str, policy: str) -> None:
    """Its answer was lost with the number under which it asked, as after a fork of the process."""

    async def scenario(leases: Leases, clock: ManualClock) -> None:
        name = next(names)
        twin = Leases(leases._streams, clock, lambda: f"twin-{name}")
        leases._name = twin._name
        leases.open(policy, document(), 1)
        twin.open(policy, document(), 1)
        await leases.run_once()
        await twin.run_once()
        assert twin.statistics().stale == 1
        clock.advance(200)
        await twin.run_once()
        assert twin.statistics().standing[policy].state == "held"

    with_leases(valkey_url, scenario)


def test_the_loop_renews_by_itself_and_wakes_for_a_new_policy(valkey_url: str, policy: str) -> None:
    async def run() -> None:
        streams = RedisStreams(connect(valkey_url))
        leases = Leases(streams, SystemClock(), lambda: f"w-{next(names)}")
        loop = asyncio.create_task(leases.run())
        try:
            async with asyncio.timeout(60):
                await asyncio.sleep(0)
                leases.open(policy, document(rate={"limit": 100, "window_s": 1}), 1)
                while leases.statistics().calls < 4:
                    await asyncio.sleep(0.01)
        finally:
            loop.cancel()
            await asyncio.gather(loop, return_exceptions=True)
        assert leases.statistics().failures == 0
        await leases.aclose()
        await streams.aclose()

    asyncio.run(run())


def test_a_cancelled_call_leaves_the_holder_able_to_ask_again(policy: str) -> None:
    async def scenario(leases: Leases, clock: ManualClock) -> None:
        leases.open(policy, document(), 1)
        call = asyncio.create_task(leases.run_once())
        while leases.statistics().standing[policy].state != "asking":
            await asyncio.sleep(0)
        call.cancel()
        await asyncio.gather(call, return_exceptions=True)
        assert leases.statistics().standing[policy].state == "lapsed"

    with socket.create_server(("127.0.0.1", 0)) as silent:
        with_leases(f"redis://127.0.0.1:{silent.getsockname()[1]}", scenario)


# The bank's memory


@pytest.fixture
def bank(store: redis.Redis, policy: str) -> Bank:
    return Bank(store, policy)


def fleet_of(bank: Bank, count: int, **fields: Any) -> list[Replica]:
    fleet = Fleet(bank, parse_exploration({"rate": {"limit": 50, "window_s": 60}, "start": "now"} | fields))
    for _ in range(count):
        fleet.add().renew()
    return fleet.replicas


def pass_ms(bank: Bank, replicas: list[Replica], ms: int) -> None:
    bank.now_ms += ms
    for replica in replicas:
        replica.clock_s += ms / 1000


def back_from_idleness(bank: Bank, one: Replica) -> None:
    """Where there is little, who has not decided for a while gets a portion only after it has."""
    one.renew()
    assert one.decide(1, 1.0, unlucky=True) == 0
    pass_ms(bank, [one], 700)
    one.renew()


def test_a_budget_starts_with_the_next_window(bank: Bank) -> None:
    (one,) = fleet_of(bank, 1, start="next_window")
    assert one.decide(10, 1.0, unlucky=True) == 0
    assert one.holder.standing(one.clock_s).closed
    pass_ms(bank, [one], 60_000)
    back_from_idleness(bank, one)
    assert one.decide(10, 1.0, unlucky=True) > 0
    assert not one.holder.standing(one.clock_s).closed


def test_a_longer_window_starts_with_its_next_one_and_a_higher_limit_at_once(bank: Bank) -> None:
    (one,) = fleet_of(bank, 1, start="next_window")
    pass_ms(bank, [one], 60_000)
    one.renew()
    one.holder.configure(parse_exploration({"rate": {"limit": 90, "window_s": 60}}), 2)
    one.renew()
    standing = one.holder.standing(one.clock_s)
    assert (standing.closed, one.holder._portions["rate"].granted.limit) == (False, 90)
    one.holder.configure(parse_exploration({"rate": {"limit": 90, "window_s": 600}}), 3)
    one.renew()
    assert one.holder.standing(one.clock_s).closed


def test_a_bank_that_was_set_back_closes_its_windows(bank: Bank) -> None:
    one, other = fleet_of(bank, 2)
    saved = bank.save()
    one.renew()
    assert one.decide(3, 1.0, unlucky=True) == 3
    bank.restore(saved)
    one.renew()
    assert one.holder.standing(one.clock_s).closed
    other.renew()
    assert other.holder.standing(other.clock_s).closed
    pass_ms(bank, [one, other], 60_000)
    back_from_idleness(bank, one)
    assert one.decide(1, 1.0, unlucky=True) == 1


def test_a_clock_that_goes_back_stands_still_and_one_far_behind_is_believed(bank: Bank) -> None:
    (one,) = fleet_of(bank, 1)
    before = one.holder.standing(one.clock_s).windows
    bank.now_ms -= 3_600_000
    one.renew()
    assert one.holder.standing(one.clock_s).windows == before
    bank.now_ms -= 100 * 86_400_000
    one.renew()
    assert one.holder.standing(one.clock_s).windows != before
    assert one.decide(1, 1.0, unlucky=True) == 1


def test_the_newest_document_rules_while_somebody_lives_by_it(bank: Bank) -> None:
    old, new = fleet_of(bank, 2)
    new.holder.configure(parse_exploration({"rate": {"limit": 0, "window_s": 60}, "start": "now"}), 2)
    new.renew()
    old.renew()
    assert old.holder._portions["rate"].granted.limit == 0  # of the document that it does not have yet
    pass_ms(bank, [old], 10_001)
    old.renew()
    assert old.holder._portions["rate"].granted.limit == 50  # the newer one is gone, with whoever had it


def test_windows_expire(bank: Bank, store: redis.Redis) -> None:
    fleet_of(bank, 1)
    (window,) = [key for key in bank.stored() if b":rate:" in key]
    assert 0 < int(str(store.pttl(window))) <= 120_000
    assert int(str(store.pttl(f"{base(bank.policy)}:explore"))) > 86_400_000


# Schedules


def test_schedules_come_along_for_all_replicas_and_outlive_the_banks_memory(bank: Bank) -> None:
    one, other = fleet_of(bank, 2, epsilon={"kind": "linear", "start": 1.0, "end": 0.0, "over": {"decisions": 100}})
    one.decide(30, 0.5)
    one.renew()
    other.decide(20, 0.5)
    assert one.holder.standing(one.clock_s).progress.decisions == 30
    pass_ms(bank, [one, other], 500)
    other.renew()
    seen = other.holder.standing(other.clock_s).progress
    assert (seen.decisions, seen.elapsed_ms) == (50, 500)
    bank.forget()
    other.renew()
    one.renew()
    seen = one.holder.standing(one.clock_s).progress
    assert (seen.decisions, seen.elapsed_ms) == (50, 500)
    one.holder.configure(parse_exploration({"epsilon": 0.3}), 2)
    one.renew()
    assert one.holder.standing(one.clock_s).progress.decisions == 0


# The halt

LIMIT = BurnLimit(rate=0.2, bad_reward=0.0, short_s=10, long_s=60, min_volume=10)


def test_outcomes_are_counted_once_whoever_counts_them(valkey_url: str, policy: str, store: redis.Redis) -> None:
    async def scenario(leases: Leases, clock: ManualClock) -> None:
        assert await leases.count(policy, LIMIT, 5, 1, "", "1-0") == "1-0"
        assert await leases.count(policy, LIMIT, 5, 1, "", "1-0") == "1-0"  # another reader, or the same once more
        assert await leases.count(policy, LIMIT, 7, 0, "1-0", "2-0") == "2-0"
        assert await leases.count(policy, LIMIT, 0, 0, "2-0", "3-0") == "3-0"

    with_leases(valkey_url, scenario)
    counts: Any = store.hgetall(f"{base(policy)}:burn")
    assert sum(int(n) for name, n in counts.items() if name.endswith(b":n")) == 12
    assert sum(int(n) for name, n in counts.items() if name.endswith(b":x")) == 1


def test_a_halt_is_shared_and_ends_by_a_probe(bank: Bank, store: redis.Redis) -> None:
    burn = {"rate": 0.2, "bad_reward": 0.0, "short_s": 10, "long_s": 60, "min_volume": 10}
    one, other = both = fleet_of(bank, 2, burn=burn)

    def outcomes(count: int, burnt: int) -> None:
        bucket = f"{LIMIT.width_ms}:{bank.now_ms // LIMIT.width_ms}"
        store.hincrby(f"{base(bank.policy)}:burn", f"{bucket}:n", count)
        store.hincrby(f"{base(bank.policy)}:burn", f"{bucket}:x", burnt)

    outcomes(10, 9)
    one.renew()
    assert one.holder.standing(one.clock_s).burn.name == "halted"
    assert one.decide(5, 1.0, unlucky=True) == 0
    other.holder.configure(parse_exploration({"rate": {"limit": 50, "window_s": 60}, "start": "now"}), 0)
    one.renew()  # tells the bank
    assert store.hget(f"{base(bank.policy)}:explore", "burn") is not None
    late = fleet_of(bank, 1, burn=burn)[0]
    late.holder.name = "late"
    late.renew()
    assert late.holder.standing(late.clock_s).burn.name == "halted"
    pass_ms(bank, [*both, late], 11_000)
    one.renew()
    assert one.holder.standing(one.clock_s).burn.name == "probing"
    one.decide(1, 1.0)
    pass_ms(bank, [*both, late], 1_000)
    one.renew()
    assert one.decide(1, 1.0, unlucky=True) == 1
    pass_ms(bank, [*both, late], 1_000)
    outcomes(10, 0)
    one.renew()
    one.renew()
    late.renew()
    assert late.holder.standing(late.clock_s).burn.name == "running"
    pass_ms(bank, [*both, late], 100_000)
    one.renew()
    assert store.hlen(f"{base(bank.policy)}:burn") == 0  # what no window reaches any more is dropped
    assert bank.now_ms > START_MS
