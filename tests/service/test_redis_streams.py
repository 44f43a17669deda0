"""The edge to Redis, against a real Valkey: what goes in comes out, and what goes wrong has our own names."""

from __future__ import annotations

import asyncio
import re
import socket
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import redis
from redis.exceptions import DataError

from policies.errors import StoreAway
from service import redis_streams
from service.decision import Event, RewardFlags, encode_events
from service.join import JoinConfig
from service.redis_streams import KEYRING, SCRIPT, TIMEOUT_S, Counts, RedisStreams, StoredReward, base, connect
from service.shipcall import Gap, Refused, ShipCall, Shipped
from tests.service.joining import decision, reward
from tests.surefoot.valkey import LossyProxy, Valkey

# Far from any deadline by the server's clock; deadlines go by `through_ms`, which stays 0.
CONFIG = JoinConfig()


def with_streams(url: str, scenario: Callable[[RedisStreams], Awaitable[None]], **options: Any) -> None:
    async def run() -> None:
        streams = RedisStreams(connect(url), **{"configs": lambda policy: CONFIG} | options)
        try:
            await scenario(streams)
        finally:
            await streams.aclose()

    asyncio.run(run())


def call(policy: str, *events: Event, seq: int = 1, through: int = 0, **options: Any) -> ShipCall:
    blobs = tuple(encode_events([event]) for event in events)
    return ShipCall(policy, "w", 1, seq, len(events), through, 0, blobs=blobs, **options)


@pytest.fixture
def short() -> Iterator[Path]:
    """A directory whose name is short enough for a socket."""
    with tempfile.TemporaryDirectory(prefix="sf-") as directory:
        yield Path(directory)


# Shipping and reading


def test_a_batch_is_applied_and_answered(valkey_url: str, policy: str) -> None:
    counted: list[tuple[str, Counts]] = []

    async def scenario(streams: RedisStreams) -> None:
        reply = await streams.ship(call(policy, decision("a"), reward("a"), reward("b"), decision("c")))
        assert reply == Shipped(4, ((2, "joined"), (3, "early")))
        assert await streams.ship(call(policy, reward("c"), seq=9)) == Gap(4)
        assert await streams.ship(call(policy, reward("c"), seq=9, force=True)) == Shipped(9, ((9, "joined"),))
        assert await streams.ship(call(policy, seq=10, bye=True)) == Shipped(9)

    with_streams(valkey_url, scenario, on_counts=lambda name, counts: counted.append((name, counts)))
    assert [name for name, _ in counted] == [policy] * 3
    assert [each for _, each in counted] == [
        Counts(joined=1, defaulted=0, void=0, quarantined=0, late=0, correction=0, orphan=0, lost=0, pending=1),
        Counts(joined=1, defaulted=0, void=0, quarantined=0, late=0, correction=0, orphan=0, lost=4, pending=0),
        Counts(joined=0, defaulted=0, void=0, quarantined=0, late=0, correction=0, orphan=0, lost=0, pending=0),
    ]


def test_a_server_that_has_forgotten_the_script_is_given_it_again(valkey_url: str, store: redis.Redis) -> None:
    async def scenario(streams: RedisStreams) -> None:
        for number in range(2):
            store.script_flush()
            assert await streams.ship(call(f"forgetful-{number}", decision("a"))) == Shipped(1)
        assert await streams.ship(call("forgetful-1", decision("b"), seq=2)) == Shipped(2)

    with_streams(valkey_url, scenario)


def test_many_events_fit_into_one_call(valkey_url: str, policy: str) -> None:
    """More than Lua's stack would hold, were they unpacked onto it."""

    async def scenario(streams: RedisStreams) -> None:
        events = [each for n in range(5_000) for each in (decision(str(n)), reward(str(n)))]
        blobs = (encode_events(list(events[:6_000])), encode_events(list(events[6_000:])))
        reply = await streams.ship(ShipCall(policy, "w", 1, 1, 10_000, 0, 0, blobs=blobs))
        assert isinstance(reply, Shipped)
        assert reply.last == 10_000
        assert [verdict for _, verdict in reply.verdicts] == ["joined"] * 5_000

    with_streams(valkey_url, scenario)


def test_a_claim_that_has_lapsed_takes_nothing_from_who_holds_it_now(
    valkey_url: str, store: redis.Redis, policy: str
) -> None:
    async def scenario(slow: RedisStreams) -> None:
        quick = RedisStreams(connect(valkey_url))
        assert await slow.idempotent_begin(policy, "k", "digest") is None
        (key,) = store.scan_iter(f"{base(policy)}:idem:*")
        store.delete(key)  # what time does
        assert await quick.idempotent_begin(policy, "k", "digest") is None
        await slow.idempotent_release(policy, "k", "digest")
        await slow.idempotent_finish(policy, "k", "digest", b"the first decision", 60.0)
        assert await quick.idempotent_begin(policy, "k", "digest") == ("digest", None), "still claimed"
        await quick.idempotent_finish(policy, "k", "digest", b"the second", 60.0)
        assert await slow.idempotent_begin(policy, "k", "digest") == ("digest", b"the second")
        await quick.aclose()

    with_streams(valkey_url, scenario)


def test_a_decision_can_be_read_at_every_stage(valkey_url: str, policy: str) -> None:
    async def scenario(streams: RedisStreams) -> None:
        assert await streams.read_decision(policy, "a") is None
        await streams.ship(call(policy, decision("a", "ep", 3)))
        waits = await streams.read_decision(policy, "a")
        assert waits is not None
        assert (waits.state_name, waits.waiting_for, waits.reward) == ("pending", "reward", None)
        assert (waits.episode, waits.step, waits.at_ms, waits.due_ms, waits.action) == ("ep", 3, 1_000, 11_000, "2")
        assert (waits.state, waits.mask, waits.record) == (b"state of a", b"\1\0\1", b"record \xff of a")
        assert (waits.producer, waits.epoch, waits.seq) == ("w", 1, 1)
        await streams.ship(call(policy, reward("a", value="0.5", reward_id="r"), seq=2))
        rewarded = await streams.read_decision(policy, "a")
        assert rewarded is not None
        assert (rewarded.state_name, rewarded.waiting_for) == ("pending", "successor")
        assert rewarded.reward == StoredReward("r", 1_500, 0.5, b"its record")
        assert (rewarded.end, rewarded.next_id, rewarded.order) == (None, None, None)
        await streams.ship(call(policy, decision("b", "ep", 4), seq=3))
        joined = await streams.read_decision(policy, "a")
        assert joined is not None
        assert (joined.state_name, joined.waiting_for) == ("joined", None)
        assert (joined.end, joined.next_id, joined.order) == ("none", "b", "step")
        assert (joined.reward, joined.record) == (rewarded.reward, b"record \xff of a")

    with_streams(valkey_url, scenario)


def test_defaulted_and_voided_decisions_can_be_read(valkey_url: str, policy: str) -> None:
    async def scenario(streams: RedisStreams) -> None:
        not_executed = reward("v", flags=int(RewardFlags.NOT_EXECUTED))
        await streams.ship(call(policy, through=time.time_ns() // 1_000_000))  # heard of, by the server's clock too
        await streams.ship(call(policy, decision("v"), not_executed, decision("d"), through=11_000))
        voided, defaulted = [await streams.read_decision(policy, id) for id in "vd"]
        assert voided is not None
        assert (voided.state_name, voided.end) == ("void", "single")
        assert voided.reward == StoredReward("", 1_500, 1.0, b"its record")
        assert defaulted is not None
        assert (defaulted.state_name, defaulted.end, defaulted.reward) == ("defaulted", "single", None)

    with_streams(valkey_url, scenario)


def test_what_is_collected_can_be_read(valkey_url: str, policy: str) -> None:
    async def scenario(streams: RedisStreams) -> None:
        parts = reward("a", reward_id="1"), reward("a", 1_600, "2.0", "2")
        await streams.ship(call(policy, decision("a"), *parts))
        collecting = await streams.read_decision(policy, "a")
        assert collecting is not None
        assert (collecting.state_name, collecting.waiting_for, collecting.reward) == ("pending", "rewards", None)
        assert [(each.reward_id, each.at_ms, each.reward) for each in collecting.collected] == [
            ("1", 1_500, 1.0), ("2", 1_600, 2.0)
        ]  # fmt: skip

    with_streams(valkey_url, scenario, configs=lambda name: JoinConfig(aggregation="sum"))


# What else Redis is used for


def test_one_keyring_wins_for_ever(valkey_url: str, store: redis.Redis) -> None:
    async def scenario(streams: RedisStreams) -> None:
        answers = await asyncio.gather(*(streams.keyring(f"ring {n}") for n in range(8)))
        assert len(set(answers)) == 1
        assert await streams.keyring("another") == answers[0]

    store.delete(KEYRING)
    with_streams(valkey_url, scenario)
    assert store.ttl(KEYRING) == -1


def test_an_idempotency_key_is_claimed_answered_and_given_up(valkey_url: str, store: redis.Redis, policy: str) -> None:
    async def scenario(streams: RedisStreams) -> None:
        assert await streams.idempotent_begin(policy, "k", "digest") is None
        assert await streams.idempotent_begin(policy, "k", "other") == ("digest", None)
        await streams.idempotent_finish(policy, "k", "digest", b"\0 answer \xff", 60.0)
        assert await streams.idempotent_begin(policy, "k", "other") == ("digest", b"\0 answer \xff")
        (key,) = store.scan_iter(f"{base(policy)}:idem:*")
        assert 50 < store.ttl(key) <= 60
        await streams.idempotent_release(policy, "k", "digest")
        assert await streams.idempotent_begin(policy, "k", "other") == ("digest", b"\0 answer \xff"), "it was answered"
        assert await streams.idempotent_begin("another policy", "k", "digest") is None
        await streams.idempotent_release("another policy", "k", "digest")
        assert await streams.idempotent_begin("another policy", "k", "other") is None

    with_streams(valkey_url, scenario)


def test_a_probe_tells_what_the_server_promises(valkey_url: str, short: Path) -> None:
    async def plain(streams: RedisStreams) -> None:
        facts = await streams.probe()
        assert (facts.role, facts.loading, facts.appendonly) == ("master", False, False)
        assert facts.version[0].isdigit()

    async def durable(streams: RedisStreams) -> None:
        facts = await streams.probe()
        assert (facts.appendonly, facts.appendfsync, facts.maxmemory_policy) == (True, "always", "noeviction")

    async def secretive(streams: RedisStreams) -> None:
        facts = await streams.probe()
        assert (facts.appendonly, facts.appendfsync) == (True, None)

    with_streams(valkey_url, plain)
    with Valkey(short, durable=True) as server:
        with_streams(server.url, durable)
        with server.client() as client:
            client.acl_setuser("default", commands=["-config"], enabled=True, nopass=True)
        with_streams(server.url, secretive)


# When it goes wrong


def test_events_that_cannot_be_read_are_refused(valkey_url: str, policy: str) -> None:
    async def scenario(streams: RedisStreams) -> None:
        with pytest.raises(Refused):
            await streams.ship(ShipCall(policy, "w", 1, 1, 1, 0, 0, blobs=(b"\xc1 no msgpack",)))
        with pytest.raises(Refused, match="not 2"):
            await streams.ship(ShipCall(policy, "w", 1, 1, 2, 0, 0, blobs=(encode_events([decision("a")]),)))
        assert await streams.ship(call(policy, decision("a"))) == Shipped(1)

    with_streams(valkey_url, scenario)


@pytest.mark.parametrize(
    ("break_it", "mend_it"),
    [
        (["CONFIG SET maxmemory 1"], ["CONFIG SET maxmemory 0"]),
        (["CONFIG SET min-replicas-to-write 1"], ["CONFIG SET min-replicas-to-write 0"]),
        (["REPLICAOF 127.0.0.1 1"], ["REPLICAOF NO ONE"]),
        (["ACL SETUSER default -eval -evalsha"], ["ACL SETUSER default +eval +evalsha"]),
    ],
    ids=["full", "no replicas", "a replica", "not permitted"],
)
def test_a_server_that_takes_nothing_for_now_is_away_and_the_events_are_not_to_blame(
    short: Path, policy: str, break_it: list[str], mend_it: list[str]
) -> None:
    with Valkey(short) as server, server.client() as client:

        async def scenario(streams: RedisStreams) -> None:
            await streams.ship(call(policy, decision("a")))
            for command in break_it:
                client.execute_command(*command.split())
            with pytest.raises(StoreAway):
                await streams.ship(call(policy, reward("a"), seq=2))
            for command in mend_it:
                client.execute_command(*command.split())
            assert await streams.ship(call(policy, reward("a"), seq=2)) == Shipped(2, ((2, "joined"),))

        with_streams(server.url, scenario)


def every_call(policy: str) -> dict[str, Callable[[RedisStreams], Awaitable[Any]]]:
    return {
        "ship": lambda streams: streams.ship(call(policy, decision("a"))),
        "read_decision": lambda streams: streams.read_decision(policy, "a"),
        "probe": lambda streams: streams.probe(),
        "command": lambda streams: streams.command("HGETALL", base(policy)),
        "script": lambda streams: streams.script(b"return 1", base(policy)),
        "keyring": lambda streams: streams.keyring("k"),
        "idempotent_begin": lambda streams: streams.idempotent_begin(policy, "k", "d"),
        "idempotent_finish": lambda streams: streams.idempotent_finish(policy, "k", "d", b"r", 1.0),
        "idempotent_release": lambda streams: streams.idempotent_release(policy, "k", "d"),
    }


def test_every_call_says_that_an_absent_server_is_away(policy: str) -> None:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))  # nobody listens, nobody else gets the port
        url = f"redis://127.0.0.1:{bound.getsockname()[1]}/0"

        async def scenario(streams: RedisStreams) -> None:
            for attempt in every_call(policy).values():
                with pytest.raises(StoreAway):
                    await attempt(streams)

        with_streams(url, scenario)


def test_every_call_gives_up_on_a_server_that_never_answers(policy: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"redis://127.0.0.1:{silent.getsockname()[1]}/0"

        async def scenario(streams: RedisStreams) -> None:
            async with asyncio.timeout(20 * TIMEOUT_S):
                for attempt in every_call(policy).values():
                    with pytest.raises(StoreAway):
                        await attempt(streams)

        with_streams(url, scenario)


def test_every_call_of_the_interface_is_among_them(policy: str) -> None:
    public = {name for name in vars(RedisStreams) if not name.startswith("_")}
    assert public == {*every_call(policy), "aclose"}


def test_a_script_whose_reply_was_lost_is_not_sent_again_by_the_client(short: Path, policy: str) -> None:
    with Valkey(short) as server:
        proxy = LossyProxy(server.socket_path)

        async def scenario(streams: RedisStreams) -> None:
            await streams.ship(call(policy, decision("a")))
            proxy.lose = b"EVALSHA"
            with pytest.raises(StoreAway):
                await streams.ship(call(policy, reward("a"), seq=2))
            assert await streams.ship(call(policy, reward("a"), seq=2)) == Shipped(2), "applied; skipped now"

        try:
            with_streams(proxy.url, scenario)
            assert proxy.lost == 1
            with server.client() as client:
                assert client.xlen(f"{base(policy)}:transitions") == 1
        finally:
            proxy.close()


def test_what_cannot_be_sent_is_a_bug_and_not_an_outage(valkey_url: str, policy: str) -> None:
    async def scenario(streams: RedisStreams) -> None:
        with pytest.raises(DataError):
            await streams.read_decision(policy, None)  # type: ignore[arg-type]

    with_streams(valkey_url, scenario)


# The page of keys


def test_the_header_lists_every_suffix_that_the_script_uses() -> None:
    listed = set(re.findall(r"(?<![\w-])([a-z]+)(?=[:\s])", (redis_streams.__doc__ or "").split("Strategy")[0]))
    used = set(re.findall(r"':([a-z]+):?'", SCRIPT.decode()))
    assert used
    assert used <= listed
