"""What a real Redis tells of itself, and what of that is too little for the durability asked for."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry
from structlog.testing import capture_logs

from service.metrics import Metrics
from service.redis_streams import RedisStreams, connect
from service.shipcall import Confirm
from service.store_facts import REASONS, StoreFacts, read_facts, weaknesses
from service.store_watch import StoreWatch
from tests.service.clusters import server
from tests.service.pairs import DURABLE, pair

GOOD = StoreFacts(
    version="8.1.0",
    role="master",
    loading=False,
    appendonly=True,
    appendfsync="always",
    aof_last_write_ok=True,
    rdb_last_save_ok=True,
    maxmemory_policy="noeviction",
    maxmemory_bytes=0,
    used_memory_bytes=1 << 30,
    connected_replicas=1,
    waitaof=True,
)
TIERS = ("memory", "process", "node", "replicated")


@pytest.mark.parametrize("tier", TIERS)
def test_a_good_server_has_no_weakness(tier: str) -> None:
    assert weaknesses(GOOD, tier) == []


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"loading": True}, "loading"),
        ({"role": "slave"}, "role:slave"),
        ({"maxmemory_policy": "allkeys-lru"}, "maxmemory_policy:allkeys-lru"),
        ({"maxmemory_policy": "volatile-ttl"}, "maxmemory_policy:volatile-ttl"),
        ({"maxmemory_bytes": 1 << 30}, "memory_nearly_full"),
        ({"aof_last_write_ok": False}, "aof_write_failing"),
        ({"rdb_last_save_ok": False}, "rdb_save_failing"),
    ],
)
@pytest.mark.parametrize("tier", TIERS)
def test_what_is_wrong_for_every_tier_is_named(tier: str, wrong: dict[str, object], named: str) -> None:
    assert [str(each) for each in weaknesses(replace(GOOD, **wrong), tier)] == [named]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("wrong", "named", "tiers"),
    [
        ({"appendonly": False}, "appendonly_off", TIERS[1:]),
        ({"connected_replicas": 0}, "too_few_replicas:0", TIERS[3:]),
        ({"appendfsync": "everysec"}, "appendfsync:everysec", TIERS[3:]),
        ({"waitaof": False}, "no_waitaof:8.1.0", TIERS[3:]),
    ],
)
def test_what_is_wrong_for_some_tiers_is_named_for_them(
    wrong: dict[str, object], named: str, tiers: tuple[str, ...]
) -> None:
    for tier in TIERS:
        found = [str(each) for each in weaknesses(replace(GOOD, **wrong), tier)]  # type: ignore[arg-type]
        assert found == ([named] if tier in tiers else [])


def test_a_wait_that_is_long_enough_makes_up_for_a_slow_sync() -> None:
    assert weaknesses(replace(GOOD, appendfsync="everysec"), "replicated", timeout_s=3.0) == []


def test_what_a_server_does_not_tell_is_no_weakness() -> None:
    nothing = read_facts({}, None)
    assert (nothing.version, nothing.role, nothing.appendonly, nothing.waitaof) == ("unknown", "unknown", None, None)
    assert [each for tier in TIERS for each in weaknesses(nothing, tier)] == []


@pytest.mark.parametrize(("version", "can"), [("7.0.15", False), ("6.2.6", False), ("7.2.4", True), ("8.0", True)])
def test_a_version_tells_whether_replicas_can_be_asked_for_their_disk(version: str, can: bool) -> None:
    assert read_facts({"redis_version": version}, None).waitaof is can


# A real server


def with_watch(url: str, tier: str, scenario: Callable[[StoreWatch, Metrics], Awaitable[None]]) -> None:
    async def run() -> None:
        metrics = Metrics(CollectorRegistry())
        streams = RedisStreams(connect(url))
        try:
            await scenario(StoreWatch(streams, metrics, tier, Confirm(1, 1.0)), metrics)
        finally:
            await streams.aclose()

    asyncio.run(run())


def reasons(watch: StoreWatch) -> list[str]:
    return [each["reason"] for each in watch.view()["degraded_by"]]


def test_a_servers_state_is_shown_as_it_changes_and_told_once(tmp_path: Path) -> None:
    with server(tmp_path, *DURABLE) as node:

        async def scenario(watch: StoreWatch, metrics: Metrics) -> None:
            def value(name: str, **labels: str) -> float | None:
                return metrics.registry.get_sample_value(f"surefoot_{name}", labels)

            assert reasons(watch) == ["away"], "nothing is known yet"
            await watch.refresh()
            assert (watch.view()["degraded"], watch.view()["durability"]) == (False, "process")
            facts = watch.facts
            assert facts is not None
            assert (facts.role, facts.appendonly, facts.appendfsync, facts.waitaof) == ("master", True, "always", True)
            assert facts.used_memory_bytes
            known = {"version": facts.version, "role": "master", "appendonly": "yes", "appendfsync": "always"}
            assert value("redis_info", **known, maxmemory_policy="noeviction") == 1.0
            node.ask("CONFIG", "SET", "maxmemory-policy", "allkeys-lru")
            node.ask("CONFIG", "SET", "maxmemory", "1")
            with capture_logs() as logs:
                for _ in range(3):
                    await watch.refresh()
            told = [(each["event"], each["reason"]) for each in logs]
            assert sorted(told) == [
                ("redis_weakness", "maxmemory_policy:allkeys-lru"),
                ("redis_weakness", "memory_nearly_full"),
            ]
            assert reasons(watch) == ["maxmemory_policy:allkeys-lru", "memory_nearly_full"]
            assert value("redis_info", **known, maxmemory_policy="allkeys-lru") == 1.0
            assert value("redis_info", **known, maxmemory_policy="noeviction") is None
            assert [value("redis_weakness", reason=reason) for reason in ("maxmemory_policy", "loading")] == [1.0, 0.0]
            node.ask("CONFIG", "SET", "maxmemory", "0")
            node.ask("CONFIG", "SET", "maxmemory-policy", "noeviction")
            with capture_logs() as logs:
                await watch.refresh()
            assert {each["event"] for each in logs} == {"redis_weakness_gone"}
            node.kill()
            await watch.refresh()
            assert (reasons(watch), watch.view()["redis"], value("store_up")) == (["away"], None, 0.0)
            assert value("redis_weakness", reason="away") == 1.0

        with_watch(node.url, "process", scenario)


def test_a_pair_without_its_replica_cannot_keep_what_is_asked_for(tmp_path: Path) -> None:
    with pair(tmp_path) as both:

        async def scenario(watch: StoreWatch, metrics: Metrics) -> None:
            await watch.refresh()
            assert reasons(watch) == []
            assert metrics.registry.get_sample_value("surefoot_redis_replicas") == 1.0
            both.part()
            await watch.refresh()
            assert reasons(watch) == ["too_few_replicas:0"]
            both.primary.ask("CONFIG", "SET", "appendonly", "no")
            await watch.refresh()
            assert reasons(watch) == ["appendonly_off", "too_few_replicas:0"]

        with_watch(both.url, "replicated", scenario)


def test_every_reason_stands_in_the_document() -> None:
    page = (Path(__file__).parents[2] / "docs" / "durability.md").read_text()
    assert not [reason for reason in (*REASONS, "away") if f"| `{reason}" not in page]
