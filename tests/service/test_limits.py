"""Limits hold over replicas: whatever dies, hangs or is cut off, no window holds more than it may."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any, Literal

import numpy as np
import pytest
import redis

from policies.errors import StoreAway
from safety.limits import Entry, LimitSet
from safety.past import Past
from safety.places import MARGIN_S
from safety.rules import Cooldown, MaxStep, Rate
from service.clock import SystemClock
from service.limit_calls import CHUNK, HOLD_S, LEASE_S, RENEW_S
from service.limit_tells import Tell, charges_of
from service.limits import LimitRow, Limits
from service.redis_streams import RedisStreams, connect
from tests.service.limiting import STEP, WINDOW_S, Holder, World, bound, broken_cooldowns, most_in_a_window, rules


def row(key: str | None = "a") -> LimitRow:
    return LimitRow(key, (0,))


def with_world(
    url: str,
    policy: str,
    limits: LimitSet,
    scenario: Callable[[World], Awaitable[None]],
    seed: int = 0,
    holders: int = 2,
) -> None:
    async def run() -> None:
        world = World(url.removeprefix("unix://"), policy, limits, seed)
        try:
            for _ in range(holders):
                await world.add()
            await world.quiet()
            await scenario(world)
        finally:
            await world.close()

    asyncio.run(run())


def rate(limit: int = 3, **more: object) -> LimitSet:
    return bound(Rate(name="rate", actions=["up"], limit=limit, window_s=WINDOW_S, **more))  # type: ignore[arg-type]


async def work(world: World, holder: Holder, keys: list[str | None]) -> None:
    """Reserve, or draw what is reserved, and settle, or not."""
    roll, prefer = world.random, world.random.sample([1, 2, 3], 3)
    deed = roll.random()
    if deed < 0.6:
        batch = await world.reserve(holder, [row(key) for key in roll.sample(keys, roll.randint(1, len(keys)))])
        if deed < 0.45:
            world.settle(holder, batch, prefer)
    elif holder.open and deed < 0.97:
        world.settle(holder, roll.choice(holder.open), prefer)
    elif holder.open:
        world.draw(holder, roll.choice(holder.open), prefer)  # executed, and nobody is told


async def chaos(world: World, steps: int, keys: list[str | None], faults: bool = True) -> None:
    """Let replicas do anything in any order."""
    roll = world.random
    for holder in world.holders:
        holder.limits.calls.answer_s = 0.05  # a row waits for the one before it under its key, perhaps in vain
    for _ in range(steps):
        holder, deed = roll.choice(world.holders), roll.random()
        if deed < 0.75:
            await work(world, holder, keys)
        elif deed < 0.77 and faults:
            holder.proxy.switch(roll.choice(["cut", "lose", "hang", "pass"]))
        elif deed < 0.86:
            holder.proxy.switch("pass")
        elif deed < 0.87 and faults:
            await world.die(holder)
            await world.add()
        else:
            await holder.limits.run_once()
        world.tick(roll.choice([0, 0, 1, 7, 60, 200, 400, 700, 4_000]))


async def recover(world: World) -> set[float]:
    """Heal every link, let all that is past pass, and give the choices that are executed then."""
    for holder in world.holders:
        holder.proxy.switch("pass")
        holder.limits.calls.answer_s = 2.0
    await renew(world, 26)
    return {action for holder in world.holders for action in await world.act(holder, [row("a")], [1, 2, 3])}


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(
    ("per", "scope"), [("key", "shared"), ("policy", "strict"), ("policy", "shared")], ids=["key", "strict", "leased"]
)
def test_no_window_holds_more_than_it_may_whatever_happens(
    valkey_url: str, policy: str, per: Literal["key", "policy"], scope: Literal["shared", "strict"], seed: int
) -> None:
    given = rules(scope, per)
    limits = bound(*given)

    async def scenario(world: World) -> None:
        await chaos(world, 300, ["a", "b", "c"])
        for limit in limits.all[:2]:
            assert most_in_a_window(world.executed, limit) <= limit.cap, (seed, limit.name)
        for rule in given[2:]:
            assert isinstance(rule, Cooldown)
            assert broken_cooldowns(world.executed, rule) == 0, (seed, rule.name)
        assert sum(each.action != (0,) for each in world.executed) > 10  # it was not denied all along
        assert 1 in await recover(world)

    with_world(valkey_url, policy, limits, scenario, seed, holders=3)


@pytest.mark.parametrize("seed", range(4))
def test_the_script_and_the_machine_in_memory_are_one(valkey_url: str, policy: str, seed: int) -> None:
    limits = bound(*rules(), STEP)

    async def scenario(world: World) -> None:
        roll, calls, past = world.random, world.holders[0].limits.calls, Past()
        held: dict[str, tuple[int, int]] = {}
        for step in range(250):
            now_ms = world.clock.now_ms
            if roll.random() < 0.5:
                entries = [Entry(roll.choice([0, 0, 1]), roll.choice([None, (), (0,)])) for _ in limits.keyed]
                wire = [
                    each.least if each.levels is None else [each.least, *(i + 1 for i in each.levels)]
                    for each in entries
                ]
                past.turn(now_ms)
                expected = [past.previous()]
                rooms = [past.room(limit, now_ms) for limit in limits.keyed]
                worst = {
                    each.field: each.worst(room, entry)
                    for each, room, entry in zip(limits.keyed, rooms, entries, strict=True)
                }
                order = past.hold(f"r{step}", now_ms + int(1000 * HOLD_S), {f: n for f, n in worst.items() if n}, True)
                asked = await calls.ask(limits, [[f"r{step}", "k", wire, []]], [""])
                assert asked.rooms is not None
                assert [asked.rooms[0].previous, *asked.rooms[0].rooms] == [*expected, *rooms], step
                assert asked.rooms[0].order == order
                held[f"r{step}"] = order, now_ms
            elif held:
                name = roll.choice(sorted(held))
                order, _ = held.pop(name)
                choice = roll.choice([None, (0,), (1,), (2,), (3,)])
                charged = {each: each.charge(choice) for each in limits.keyed if each.charge(choice)}
                text = "" if choice is None else str(choice[0])
                past.turn(now_ms)
                past.settle(name, now_ms, charged, order, text)
                tell = Tell(name, "k", charges_of(limits.keyed, choice), None, text, order, now_ms / 1000, True, True)
                calls.tell_nowait([tell])
                await calls.run_once()
            world.tick(roll.choice([0, 0, 1, 30, 30, 200, 1_500, 5_000]))

    with_world(valkey_url, policy, limits, scenario, seed, holders=1)


def test_a_key_s_last_action_is_what_any_replica_executed(valkey_url: str, policy: str) -> None:
    async def scenario(world: World) -> None:
        one, two = world.holders
        first = await world.reserve(one, [row(), row("b")])
        assert first.reserved.previous == [None, None]
        assert first.reserved.past.all()  # it is known that there is none
        during = await world.reserve(two, [row(), row("c"), row(None)])
        assert during.reserved.past.tolist() == [False, True, False]  # the other may be executing anything
        world.settle(two, during, [2])
        world.settle(one, first, [3])
        await world.quiet()
        after = await world.reserve(two, [row(), row("b"), row("c")])
        assert after.reserved.previous == [(2,), (3,), (2,)]  # in the order of reservations
        assert after.reserved.past.all()
        await world.die(two)
        world.tick(int(1000 * HOLD_S))
        left = await world.reserve(one, [row()])
        assert left.reserved.previous == [None]
        assert not left.reserved.past[0]  # something was executed, and nobody says what
        world.settle(one, left)
        await world.quiet()
        again = await world.reserve(one, [row()])
        assert again.reserved.past.all()
        assert again.reserved.previous == [(3,)]

    with_world(valkey_url, policy, bound(STEP), scenario)


def test_a_row_waits_for_the_one_before_it_under_its_key(valkey_url: str, policy: str) -> None:
    async def scenario(world: World) -> None:
        (one,) = world.holders

        async def act(key: str, choice: int) -> tuple[float, ...] | None:
            reserved = await one.limits.reserve([row(key), row(None)])
            assert reserved.past[0]
            one.limits.settle(reserved.token, [(choice,), (0,)])
            return reserved.previous[0]

        found = await asyncio.gather(*(act("ab"[n % 2], n // 2) for n in range(8)))
        assert found == [None, None, (0,), (0,), (1,), (1,), (2,), (2,)]

    with_world(valkey_url, policy, bound(*rules(), STEP), scenario, holders=1)


def test_rows_of_other_keys_do_not_wait_along(valkey_url: str, policy: str) -> None:
    async def scenario(world: World) -> None:
        (one,) = world.holders
        first = await world.reserve(one, [row("a")])
        second = asyncio.create_task(world.reserve(one, [row("a")]))
        assert await world.act(one, [row("b")], [2]) == [2]
        assert not second.done()
        world.settle(one, first, [3])
        assert (await second).reserved.previous == [(3,)]

    with_world(valkey_url, policy, bound(STEP), scenario, holders=1)


def test_a_batch_takes_one_call(valkey_url: str, policy: str) -> None:
    async def scenario(world: World) -> None:
        (one,) = world.holders
        before = one.limits.statistics().calls.calls
        batch = await world.reserve(one, [row(f"k{n}") for n in range(64)])
        assert one.limits.statistics().calls.calls == before + 1
        world.settle(one, batch)
        await world.reserve(one, [row(f"k{n}") for n in range(64)])  # what was executed goes along with it
        assert one.limits.statistics().calls.calls == before + 2

    with_world(valkey_url, policy, bound(*rules(), STEP), scenario, holders=1)


@pytest.mark.parametrize("scope", ["strict", "shared", "local"])
def test_rows_that_share_a_limit_are_served_in_order_and_what_is_not_used_goes_back(
    valkey_url: str, policy: str, scope: str
) -> None:
    async def scenario(world: World) -> None:
        (one,) = world.holders
        await fill(world)
        batch = await world.reserve(one, [row(None)] * 5)
        assert batch.reserved.verdicts[0].allowed[:, 1].tolist() == [True, True, True, False, False]
        assert batch.reserved.verdicts[0].allowed[:, [0, 2, 3]].all()
        world.settle(one, batch, prefer=[2])
        possible = np.ones((5, 4), dtype=bool)
        possible[[0, 2], 1] = False  # another rule forbids it here, so no place is kept for it
        batch = await world.reserve(one, [row(None)] * 5, possible)
        assert batch.reserved.verdicts[0].allowed[possible[:, 1], 1].all()

    def places(world: World) -> int:
        return world.holders[0].limits.calls.places["rate"].held if scope == "shared" else 3

    async def fill(world: World) -> None:
        for _ in range(5):
            if places(world) < 3:
                world.settle(world.holders[0], await world.reserve(world.holders[0], [row(None)] * 8), [0])
                world.tick(int(1000 * RENEW_S))
                await world.quiet()
        assert places(world) == 3

    limits = rate(limit=3, per="policy", scope=scope)
    with_world(valkey_url, policy, limits, scenario, holders=1)


def test_without_an_answer_in_time_a_row_is_denied_and_nobody_waits_for_the_overdue_call(
    valkey_url: str, policy: str
) -> None:
    async def scenario(world: World) -> None:
        (one,) = world.holders
        calls = one.limits.calls
        assert await world.act(one, [row()], [1]) == [1]
        await world.quiet()
        calls.answer_s = 0.001
        one.proxy.switch("hang")
        batch = await world.reserve(one, [row(), row("b")])
        assert not batch.reserved.verdicts[0].allowed[:, 1].any()
        assert not batch.reserved.past.any()
        world.tick(2)
        sent = calls.statistics().calls
        for _ in range(100):
            assert await world.act(one, [row(f"k{_}")], [1]) == [0]
        assert calls.statistics().calls == sent  # not one more waits for Redis
        world.settle(one, batch)
        calls.answer_s = 2.0
        one.proxy.switch("pass")
        while calls.statistics().waiting:
            world.tick(100)
            await world.quiet()
        assert await world.act(one, [row(), row("b")], [1]) == [1, 1]

    with_world(valkey_url, policy, bound(*rules()[:1], STEP), scenario, holders=1)


def test_what_was_told_counts_once_however_often_it_is_sent(valkey_url: str, policy: str) -> None:
    async def scenario(world: World) -> None:
        one, two = world.holders
        batch = await world.reserve(one, [row()])
        one.proxy.switch("lose")
        world.settle(one, batch, [1])
        for _ in range(3):
            await one.limits.run_once()
        assert one.limits.statistics().calls.failures >= 3
        assert one.limits.statistics().calls.waiting == 1
        one.proxy.switch("pass")
        await one.limits.run_once()
        assert one.limits.statistics().calls.waiting == 0
        assert [await world.act(two, [row()], [1]) for _ in range(3)] == [[1], [1], [0]]

    with_world(valkey_url, policy, rate(), scenario)


def test_a_call_that_was_given_up_reserves_nothing_when_it_arrives(
    valkey_url: str, policy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario(world: World) -> None:
        one, two = world.holders
        sent: list[tuple[object, ...]] = []
        streams = one.limits.calls._streams

        async def script(*arguments: Any) -> Any:
            sent.append(arguments)
            raise StoreAway("cut off while it was on its way")

        with monkeypatch.context() as patch:
            patch.setattr(streams, "script", script)
            late = await world.reserve(one, [row()])
        world.settle(one, late, [1])
        world.tick(100)
        await one.limits.run_once()  # by another connection, ahead of the late one
        assert await streams.script(*sent[0]) == [b"STALE"]  # type: ignore[arg-type]
        assert [await world.act(two, [row()], [1]) for _ in range(4)] == [[1], [1], [1], [0]]

    with_world(valkey_url, policy, rate(), scenario)


def test_a_redis_that_lost_its_memory_grants_nothing_until_all_is_past(
    valkey_url: str, policy: str, store: redis.Redis
) -> None:
    async def scenario(world: World) -> None:
        one, two = world.holders
        assert [await world.act(one, [row()], [1]) for _ in range(4)] == [[1], [1], [1], [0]]
        await world.quiet()
        keys = list(store.scan_iter(f"sf:{{{policy}}}:lim:*", count=1000))
        assert len(keys) >= 4  # a past, two holders, and the memory's name
        store.delete(*keys)
        world.tick(100)
        assert await world.act(two, [row(), row("b")], [1]) == [0, 0]
        await renew(world)
        world.tick(int(1000 * (WINDOW_S + LEASE_S)) - 1)
        assert await world.act(one, [row(), row("b")], [1]) == [0, 0]
        world.tick(int(1000 * HOLD_S))
        assert await world.act(two, [row(), row("b")], [1]) == [1, 1]
        batch = await world.reserve(one, [row("c"), row("b")])
        assert batch.reserved.past.tolist() == [False, True]  # what c did before is lost, b has done something since

    with_world(valkey_url, policy, bound(*rules()[:1], STEP), scenario)


def test_what_a_key_leaves_in_redis_is_bounded_and_goes_by_itself(
    valkey_url: str, policy: str, store: redis.Redis
) -> None:
    limits = bound(Rate(name="rate", actions=["up"], limit=100_000, window_s=WINDOW_S))

    async def scenario(world: World) -> None:
        (one,) = world.holders
        for _ in range(300):
            assert await world.act(one, [row()], [1]) == [1]
            world.tick(5)
        await world.quiet()
        (key,) = store.scan_iter(f"sf:{{{policy}}}:lim:k:*", count=1000)
        assert 0 < store.pttl(key) <= 1000 * (WINDOW_S + HOLD_S)
        assert store.strlen(key) < 300 * 16
        world.tick(int(1000 * WINDOW_S) + 2_000)
        await world.act(one, [row()], [0])
        await world.quiet()
        assert not list(store.scan_iter(f"sf:{{{policy}}}:lim:k:*", count=1000))

    with_world(valkey_url, policy, limits, scenario, holders=1)


def test_local_limits_hold_in_each_replica_and_ask_nobody(valkey_url: str, policy: str) -> None:
    limits = bound(*rules("local"), MaxStep(name="step", limit=1, initial="hold", scope="local"))

    async def scenario(world: World) -> None:
        one, two = world.holders
        calls = one.limits.statistics().calls.calls
        await chaos(world, 200, ["a", "b"], faults=False)
        for holder in ("h0", "h1"):
            own = [each for each in world.executed if each.holder == holder]
            assert most_in_a_window(own, limits.all[0]) == limits.all[0].cap
            assert most_in_a_window(own, limits.all[1]) <= limits.all[1].cap
        assert one.limits.statistics().calls.calls == two.limits.statistics().calls.calls == calls == 0

    with_world(valkey_url, policy, limits, scenario)


def test_local_memory_remembers_the_last_action(valkey_url: str, policy: str) -> None:
    async def scenario(world: World) -> None:
        (one,) = world.holders
        assert await world.act(one, [row(), row("b")], [2]) == [2, 2]
        batch = await world.reserve(one, [row(), row("c"), row(None)])
        assert batch.reserved.previous == [(2,), None, None]
        assert batch.reserved.past.tolist() == [True, True, False]
        world.settle(one, batch)
        assert one.limits.statistics().local_keys == 3
        for n in range(200):  # more than the 100 for which there is room; none of them is over yet
            await world.act(one, [row(f"k{n}")], [1])
        assert one.limits.statistics().local_keys == 100
        world.tick(2_000)
        batch = await world.reserve(one, [row("new")])
        assert not batch.reserved.past[0]  # it may be one that was forgotten

    limits = bound(MaxStep(name="step", limit=1, initial="hold", scope="local"))
    with_world(valkey_url, policy, limits, scenario, holders=1)


# Portions


async def renew(world: World, times: int = 1) -> None:
    for _ in range(times):
        world.tick(int(1000 * RENEW_S))
        await world.quiet()


async def use(world: World, times: int) -> list[int]:
    """Each replica executes what it may, again and again. Gives how often each did."""
    before = len(world.executed)
    for _ in range(times):
        for holder in world.holders:
            await world.act(holder, [row(None)], [1])
        await renew(world)
    done = [each.holder for each in world.executed[before:] if each.action == (1,)]
    return [done.count(holder.name) for holder in world.holders]


def test_replicas_use_up_a_shared_limit_without_asking_for_each_row(valkey_url: str, policy: str) -> None:
    async def scenario(world: World) -> None:
        assert sum(await use(world, 15)) == 20  # all of it within 7.5 s, and no more
        assert sum(await use(world, 2)) == 0
        world.tick(10_000)
        await renew(world, 6)
        assert sum(await use(world, 2)) > 0  # it comes back by itself
        assert most_in_a_window(world.executed, rate(20, per="policy").all[0]) <= 20

    with_world(valkey_url, policy, rate(20, per="policy"), scenario, holders=3)


def test_the_only_place_goes_from_hand_to_hand(valkey_url: str, policy: str) -> None:
    """Nobody executes it, and all may in turn."""

    async def scenario(world: World) -> None:
        could = {holder.name: 0 for holder in world.holders}
        for _ in range(30):
            for holder in world.holders:
                batch = await world.reserve(holder, [row(None)])
                could[holder.name] += bool(batch.reserved.verdicts[0].allowed[0, 1])
                world.settle(holder, batch, [0])
            await renew(world)
        assert all(count >= 3 for count in could.values()), could

    with_world(valkey_url, policy, rate(1, per="policy"), scenario, holders=3)


def test_a_replica_that_dies_burns_its_portion_for_one_window_and_no_longer(valkey_url: str, policy: str) -> None:
    async def scenario(world: World) -> None:
        await use(world, 1)
        one, _ = world.holders
        burnt = one.limits.calls.places["rate"].held
        assert burnt > 0
        await world.die(one)
        done = sum(await use(world, 12))
        assert sum(each.action == (1,) for each in world.executed) == done + 2 == 12 - burnt
        world.tick(5_000)
        await renew(world, 4)
        assert sum(await use(world, 12)) > 0

    with_world(valkey_url, policy, rate(12, per="policy"), scenario)


def test_a_replica_that_leaves_gives_its_portion_back(valkey_url: str, policy: str) -> None:
    async def scenario(world: World) -> None:
        await use(world, 1)
        one, _ = world.holders
        await one.limits.close()
        await world.die(one)
        assert sum(await use(world, 12)) == 10
        assert sum(each.action == (1,) for each in world.executed) == 12

    with_world(valkey_url, policy, rate(12, per="policy"), scenario)


def test_without_redis_a_portion_ends_within_two_seconds_and_comes_back(valkey_url: str, policy: str) -> None:
    async def scenario(world: World) -> None:
        (one,) = world.holders
        one.proxy.switch("cut")
        world.tick(int(1000 * (LEASE_S - MARGIN_S)) - 1)
        late = await world.reserve(one, [row(None)])
        assert late.reserved.verdicts[0].allowed[0, 1]  # what was leased is good for its term
        assert late.reserved.holds(world.clock.monotonic_s())
        world.tick(int(1000 * MARGIN_S) + 1)
        assert not late.reserved.holds(world.clock.monotonic_s())
        world.settle(one, late)
        assert await world.act(one, [row(None)], [1]) == [0]
        await one.limits.run_once()
        assert one.limits.statistics().calls.away
        one.proxy.switch("pass")
        await renew(world)
        assert await world.act(one, [row(None)], [1]) == [1]
        assert not one.limits.statistics().calls.away

    with_world(valkey_url, policy, rate(12, per="policy"), scenario, holders=1)


def test_other_rules_keep_the_count_of_those_that_stay(valkey_url: str, policy: str) -> None:
    async def scenario(world: World) -> None:
        (one,) = world.holders
        assert await world.act(one, [row()], [1]) == [1]
        open_batch = await world.reserve(one, [row("b")])
        one.limits.configure(bound(Rate(name="rate", actions=["up"], limit=2, window_s=2 * WINDOW_S)))
        world.settle(one, open_batch, [1])  # reserved under the rules before
        assert [await world.act(one, [row(), row("b")], [1]) for _ in range(2)] == [[1, 1], [0, 0]]
        world.tick(int(1000 * WINDOW_S) + 500)
        assert await world.act(one, [row()], [1]) == [0]  # by the longer window
        one.limits.configure(LimitSet())
        await renew(world)
        assert (await world.reserve(one, [row()])).reserved.verdicts == []

    with_world(valkey_url, policy, rate(), scenario, holders=1)


def test_a_portion_of_a_rule_that_goes_is_given_back(valkey_url: str, policy: str) -> None:
    async def scenario(world: World) -> None:
        one, two = world.holders
        await use(world, 1)
        batch = await world.reserve(one, [row(None)])
        one.limits.configure(LimitSet())
        world.settle(one, batch, [0])
        await renew(world, 2)
        assert one.limits.statistics().portions == {}
        before = len(world.executed)
        for _ in range(10):
            await world.act(two, [row(None)], [1])
            await renew(world)
        assert sum(each.action == (1,) for each in world.executed[before:]) >= 9

    with_world(valkey_url, policy, rate(12, per="policy"), scenario)


def test_fallbacks_that_redis_never_heard_of_close_the_limits_until_they_are_past(
    valkey_url: str, policy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.limit_calls.MAX_TELLS", 2)
    limits = bound(Cooldown(name="calm", actions=["up"], after=["hold"], seconds=WINDOW_S))

    async def scenario(world: World) -> None:
        (one,) = world.holders
        one.proxy.switch("cut")
        for key in "abc":
            assert await world.act(one, [row(key)], [1]) == [0]
        assert one.limits.statistics().calls.dropped == 1
        one.proxy.switch("pass")
        world.tick(100)
        await renew(world)
        assert await world.act(one, [row("c"), row("d")], [1, 2]) == [2, 2]
        world.tick(int(1000 * (WINDOW_S + LEASE_S)))
        assert await world.act(one, [row("c"), row("d")], [1, 2]) == [1, 1]

    with_world(valkey_url, policy, limits, scenario, holders=1)


def test_a_long_outage_leaves_one_message_for_each_key(valkey_url: str, policy: str) -> None:
    async def scenario(world: World) -> None:
        one, two = world.holders
        one.proxy.switch("cut")
        for prefer in (3, 1, 2):
            world.tick(1)
            for _ in range(50):
                await world.act(one, [row(), row("b")], [prefer])
        assert one.limits.statistics().calls.waiting <= 3 * 2
        one.proxy.switch("pass")
        world.tick(1_000)
        await world.quiet()
        batch = await world.reserve(two, [row(), row("b")])
        assert batch.reserved.previous == [(2,), (2,)]

    with_world(valkey_url, policy, bound(STEP), scenario)


def test_before_a_row_asks_what_was_told_of_its_key_goes_ahead(valkey_url: str, policy: str) -> None:
    async def scenario(world: World) -> None:
        (one,) = world.holders
        one.proxy.switch("cut")
        for n in range(3 * CHUNK):
            await world.act(one, [row(f"k{n}")], [2])
        one.proxy.switch("pass")
        world.tick(1_000)
        last = f"k{3 * CHUNK - 1}"
        batch = await world.reserve(one, [row(last)])
        assert batch.reserved.previous == [(2,)]
        world.settle(one, batch, [3])
        world.tick(1)
        await world.quiet()
        assert (await world.reserve(one, [row(last)])).reserved.previous == [(3,)]

    with_world(valkey_url, policy, bound(STEP), scenario, holders=1)


def test_a_late_word_on_what_was_executed_is_not_taken_for_the_last(valkey_url: str, policy: str) -> None:
    async def scenario(world: World) -> None:
        one, two = world.holders
        one.proxy.switch("cut")
        await world.act(one, [row()], [1])
        world.tick(100)
        await world.act(two, [row()], [3])
        await two.limits.run_once()
        one.proxy.switch("pass")
        world.tick(100)
        await one.limits.run_once()
        batch = await world.reserve(two, [row()])
        assert not batch.reserved.past[0]  # which of the two came last, nobody knows

    with_world(valkey_url, policy, bound(STEP), scenario)


def test_the_server_s_clock_is_the_clock(valkey_url: str, policy: str) -> None:
    limits = bound(Rate(name="rate", actions=["up"], limit=1, window_s=0.3))

    async def run() -> None:
        streams = RedisStreams(connect(valkey_url))
        mine = Limits(streams, policy, SystemClock())
        mine.configure(limits)
        mine.calls.answer_s = 2.0

        async def allowed() -> bool:
            reserved = await mine.reserve([row()])
            choice = int(reserved.verdicts[0].allowed[0, 1])
            mine.settle(reserved.token, [(choice,)])
            return bool(choice)

        try:
            first, deadline = await allowed(), time.monotonic() + 30
            assert first
            assert not await allowed()
            while not await allowed():
                assert time.monotonic() < deadline
            await mine.close()
        finally:
            await streams.aclose()

    asyncio.run(run())
