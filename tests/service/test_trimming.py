"""What trimming keeps and lets go, what it tells, and what only an operator may do; against a real Valkey."""

from __future__ import annotations

import asyncio
import json
import math
import re
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import redis
from structlog.testing import capture_logs
from typer.testing import CliRunner, Result

from service.cli import app
from service.redis_streams import RedisStreams, connect
from service.settings import Settings
from service.trimming import GROUPS_SHOWN, OTHERS, STREAMS, Rules, Trimming
from tests.service.trimmers import BY_GROUPS, Trimmer, fill, key, left, nodes_of
from tests.surefoot.valkey import Valkey
from tests.waiting import until

HOUR_MS = 3_600_000


@pytest.fixture(scope="module")
def exact() -> Iterator[Valkey]:
    """A server that frees single entries."""
    with nodes_of(1) as valkey:
        yield valkey


@pytest.fixture
def store(exact: Valkey) -> Iterator[redis.Redis]:
    with exact.client() as client:
        yield client


@pytest.fixture
def trimmer(exact: Valkey, policy: str) -> Trimmer:
    return Trimmer(exact.url, policy)


@pytest.fixture
def name(policy: str) -> str:
    return key(policy)


def read(store: redis.Redis, name: str, group: str, count: int, acknowledge: int = 0) -> None:
    """Have a consumer of a new or old group read some entries and acknowledge the first of them."""
    groups: Any = store.xinfo_groups(name)
    if group.encode() not in {each["name"] for each in groups}:
        store.xgroup_create(name, group, "0")
    reply: Any = store.xreadgroup(group, "c", {name: ">"}, count=count)
    for stream_id, _ in (reply[0][1] if reply else [])[:acknowledge]:
        store.xack(name, group, stream_id)


# What goes


def test_the_slowest_group_decides(store: redis.Redis, trimmer: Trimmer, name: str) -> None:
    fill(store, name, range(1, 11))
    read(store, name, "fast", 10, acknowledge=10)
    read(store, name, "slow", 6, acknowledge=3)
    view = trimmer()
    assert view is not None
    assert left(store, name) == [4, 5, 6, 7, 8, 9, 10]
    assert (view.trimmed, view.entries, view.reason, view.first, view.last) == (3, 7, "acknowledged", "4-0", "10-0")
    by_name = {group.name: group for group in view.groups}
    assert (by_name["slow"].pending, by_name["slow"].lag, by_name["slow"].first_needed) == (3, 4, "4-0")
    assert (by_name["fast"].pending, by_name["fast"].lag, by_name["fast"].first_needed) == (0, 0, "10-0")
    assert view.needed_by(by_name["slow"]) == 7


def test_a_group_that_has_read_nothing_keeps_all(store: redis.Redis, trimmer: Trimmer, name: str) -> None:
    fill(store, name, range(1, 11))
    read(store, name, "fast", 10, acknowledge=10)
    store.xgroup_create(name, "new", "0")
    trimmer()
    assert len(left(store, name)) == 10


def test_a_group_that_an_operator_sends_back_keeps_all_from_there(
    store: redis.Redis, trimmer: Trimmer, name: str
) -> None:
    fill(store, name, range(1, 11))
    read(store, name, "g", 8, acknowledge=6)
    store.xgroup_setid(name, "g", "3-0")
    trimmer()
    assert left(store, name) == list(range(3, 11))
    read(store, name, "g", 10, acknowledge=10)
    trimmer()
    assert left(store, name) == [10]


def test_ids_are_compared_as_numbers_however_long(store: redis.Redis, trimmer: Trimmer, name: str) -> None:
    huge = "18446744073709551615"
    ids = ["9-3", "9-10", f"9-{huge}", "10-1", f"10-{int(huge) - 1}", f"10-{huge}"]
    for stream_id in ids:
        store.xadd(name, {"n": "x"}, id=stream_id)
    read(store, name, "g", len(ids), acknowledge=len(ids))
    for place in range(len(ids) - 1, 0, -1):  # pending from the end on: 10-2^64+1 is before 10-2^64
        store.xgroup_create(name, f"g{place}", ids[place])
    trimmer()
    kept: Any = store.xrange(name)
    assert [stream_id.decode() for stream_id, _ in kept] == ids[1:]
    for place in range(1, len(ids)):
        store.xgroup_destroy(name, f"g{place}")
        trimmer()
        assert store.xlen(name) == len(ids) - min(place + 1, len(ids) - 1)


def test_the_young_and_the_newest_stay_though_every_group_has_them(
    store: redis.Redis, trimmer: Trimmer, name: str
) -> None:
    fill(store, name, range(1, 11))
    for _ in range(5):
        store.xadd(name, {"n": "x"})  # now
    read(store, name, "g", 15, acknowledge=15)
    trimmer(replace(BY_GROUPS, keep=8))
    assert store.xlen(name) == 8
    trimmer(replace(BY_GROUPS, settle_ms=HOUR_MS))
    assert store.xlen(name) == 5
    trimmer(replace(BY_GROUPS, keep=2))
    assert store.xlen(name) == 2


def test_one_call_frees_no_more_than_its_limit_and_says_that_there_is_more(
    store: redis.Redis, trimmer: Trimmer, name: str
) -> None:
    fill(store, name, range(1, 31))
    read(store, name, "g", 30, acknowledge=30)
    told = [view for view in (trimmer(replace(BY_GROUPS, limit=12)) for _ in range(3)) if view is not None]
    assert [(view.trimmed, view.more) for view in told] == [(12, True), (12, True), (5, False)]
    fill(store, name, range(31, 61))
    read(store, name, "g", 30, acknowledge=30)
    trimmer.turns((trimmer.policy,), rules=replace(BY_GROUPS, limit=12))
    assert store.xlen(name) == 1
    assert trimmer.value("stream_trimmed_total", reason="acknowledged") == 30


def test_whole_nodes_go_on_a_server_as_it_comes(valkey_url: str, policy: str) -> None:
    trimmer = Trimmer(valkey_url, policy)
    with redis.Redis.from_url(valkey_url, protocol=2) as client:
        fill(client, key(policy), range(1, 2_001), size=500)
        read(client, key(policy), "g", 2_000, acknowledge=1_900)
        view = trimmer()
        assert view is not None
        assert 1_890 < view.trimmed <= 1_900


@pytest.mark.parametrize("stream", STREAMS)
def test_without_a_group_age_decides(store: redis.Redis, trimmer: Trimmer, policy: str, stream: str) -> None:
    name, now_ms = key(policy, stream), int(time.time() * 1000)
    for age_h in (9, 8, 7, 1, 0):
        store.xadd(name, {"n": "x"}, id=f"{now_ms - age_h * HOUR_MS}-0")
    view = trimmer(replace(BY_GROUPS, max_age_ms=int(7.5 * HOUR_MS)), stream)
    assert view is not None
    assert (view.trimmed, view.entries, view.reason) == (2, 3, "no_group")
    assert 7 * 3_600 <= view.oldest_s < 7 * 3_600 + 60


@pytest.mark.parametrize("stream", STREAMS)
def test_without_a_group_size_decides(store: redis.Redis, trimmer: Trimmer, policy: str, stream: str) -> None:
    fill(store, key(policy, stream), range(1, 101), size=1_000)
    trimmer(replace(BY_GROUPS, max_bytes=20_000), stream)  # in proportion; the stream's own part is seen in the next
    view = trimmer(replace(BY_GROUPS, max_bytes=20_000), stream)
    assert view is not None
    assert view.bytes is not None
    assert view.bytes <= 20_000
    assert left(store, key(policy, stream)) == list(range(101 - view.entries, 101))
    assert 10 <= view.entries <= 20


@pytest.mark.parametrize("stream", STREAMS)
def test_with_a_group_neither_age_nor_size_decides(
    store: redis.Redis, trimmer: Trimmer, policy: str, stream: str
) -> None:
    fill(store, key(policy, stream), range(1, 101), size=1_000)
    read(store, key(policy, stream), "g", 60, acknowledge=50)
    trimmer(Rules(max_age_ms=1, max_bytes=1, keep=0, settle_ms=0), stream)
    assert left(store, key(policy, stream)) == list(range(51, 101))


def test_a_policy_without_streams_is_nothing_to_do(trimmer: Trimmer, store: redis.Redis) -> None:
    assert trimmer() is None
    trimmer.turns((trimmer.policy,))
    assert not list(store.scan_iter(f"*{trimmer.policy}*"))


def test_many_replicas_at_once_are_as_good_as_one(exact: Valkey, store: redis.Redis, policy: str, name: str) -> None:
    trimmer, stop = Trimmer(exact.url, policy), threading.Event()
    fill(store, name, range(1, 11))
    read(store, name, "g", 10, acknowledge=10)

    def trained() -> int:
        """Write and read on until the trimmers are done; what was delivered has to be all, in order."""
        with exact.client() as client:
            last = 10
            while not stop.is_set():
                fill(client, name, range(last + 1, last + 21))
                reply: Any = client.xreadgroup("g", "c", {name: ">"}, count=20)
                assert [int(each.partition(b"-")[0]) for each, _ in reply[0][1]] == list(range(last + 1, last + 21))
                assert client.xack(name, "g", *(each for each, _ in reply[0][1])) == 20
                last += 20
            return last

    async def turns() -> int:
        clients = [RedisStreams(connect(exact.url)) for _ in range(4)]
        training = asyncio.create_task(asyncio.to_thread(trained))
        workers = [Trimming(each, trimmer.metrics, BY_GROUPS) for each in clients]
        for _ in range(50):
            await asyncio.gather(*(worker.run_once((policy,)) for worker in workers))
        stop.set()
        last = await training
        await workers[0].run_once((policy,))
        for each in clients:
            await each.aclose()
        return last

    last = asyncio.run(turns())
    assert left(store, name) == [last]
    assert trimmer.value("stream_trimmed_total", reason="acknowledged") == last - 1


# What is told


def test_a_turn_tells_how_streams_and_groups_stand(store: redis.Redis, trimmer: Trimmer, name: str) -> None:
    fill(store, name, range(1, 11), size=1_000)
    read(store, name, "g", 6, acknowledge=3)
    store.xadd(key(trimmer.policy, "late"), {"n": "x"})
    trimmer.turns((trimmer.policy,))
    assert trimmer.value("stream_entries") == 7
    assert trimmer.value("stream_entries", "late") == 1
    assert 7_000 < (trimmer.value("stream_bytes") or 0) < 21_000
    assert (trimmer.value("stream_oldest_seconds") or 0) > 1e9  # ids of 1970
    assert (trimmer.value("group_lag", group="g"), trimmer.value("group_pending", group="g")) == (4, 3)
    assert trimmer.value("group_abandoned", group="g") == 0
    used, limit = (
        trimmer.registry.get_sample_value(f"surefoot_store_memory{end}") for end in ("_bytes", "_limit_bytes")
    )
    assert used is not None
    assert used > 1e5
    assert limit == math.inf


def test_what_is_there_no_more_is_told_no_more(store: redis.Redis, trimmer: Trimmer, name: str) -> None:
    fill(store, name, range(1, 3))
    read(store, name, "g", 1)

    async def scenario(streams: RedisStreams) -> None:
        trimming = Trimming(streams, trimmer.metrics, BY_GROUPS)
        await trimming.run_once((trimmer.policy,))
        assert trimmer.value("group_lag", group="g") == 1
        store.xgroup_destroy(name, "g")
        await trimming.run_once((trimmer.policy,))
        assert trimmer.value("group_lag", group="g") is None
        assert trimmer.value("stream_entries") == 2
        await trimming.run_once(())
        assert trimmer.value("stream_entries") is None

    trimmer.ask(scenario)


def test_the_number_of_groups_with_labels_is_bounded(store: redis.Redis, trimmer: Trimmer, name: str) -> None:
    fill(store, name, range(1, 31))
    for n in range(GROUPS_SHOWN + 4):
        read(store, name, f"g{n:02}", n + 1)
    trimmer.turns((trimmer.policy,))
    assert trimmer.value("group_pending", group=f"g{GROUPS_SHOWN - 1:02}") == GROUPS_SHOWN
    assert trimmer.value("group_pending", group=f"g{GROUPS_SHOWN:02}") is None
    assert trimmer.value("group_pending", group=OTHERS) == GROUPS_SHOWN + 4
    assert trimmer.value("group_lag", group=OTHERS) == 30 - (GROUPS_SHOWN + 1)


@pytest.mark.parametrize("consumer", [True, False], ids=["a consumer that has left", "never a consumer"])
def test_a_group_that_nobody_reads_raises_the_alert_and_stays(
    store: redis.Redis, trimmer: Trimmer, name: str, consumer: bool
) -> None:
    fill(store, name, range(1, 11))
    read(store, name, "g", 1) if consumer else store.xgroup_create(name, "g", "0")
    hour, soon = replace(BY_GROUPS, group_ttl_ms=HOUR_MS), replace(BY_GROUPS, group_ttl_ms=20)
    trimmer.turns((trimmer.policy,), rules=hour)
    assert trimmer.value("group_abandoned", group="g") == 0

    def abandoned() -> bool:
        trimmer.turns((trimmer.policy,), rules=soon)
        return trimmer.value("group_abandoned", group="g") == 1

    until(abandoned, "the alert")
    assert store.xlen(name) == 10
    with capture_logs() as logs:
        trimmer.turns((trimmer.policy,), (trimmer.policy,), rules=soon)
    assert [(each["event"], each["group"]) for each in logs] == [("group_abandoned", "g")]
    store.xreadgroup("g", "c", {name: ">"}, count=1)
    trimmer.turns((trimmer.policy,), rules=hour)
    assert trimmer.value("group_abandoned", group="g") == 0
    assert not store.exists(f"{key(trimmer.policy, 'alone')}:transitions")


def test_rules_come_from_the_settings() -> None:
    chosen = Settings(stream_max_age_s=60, stream_max_bytes=1_000, stream_keep=5, group_ttl_s=7)
    assert Rules.of(chosen) == Rules(max_age_ms=60_000, max_bytes=1_000, keep=5, group_ttl_ms=7_000)
    assert Rules.of(Settings()) == Rules()


def test_a_server_that_is_away_or_keeps_its_memory_to_itself_stops_nothing(
    exact: Valkey, store: redis.Redis, trimmer: Trimmer, name: str
) -> None:
    fill(store, name, range(1, 4))
    store.acl_setuser("shy", enabled=True, nopass=True, keys="*", commands=["+@all", "-memory", "-info"])
    shy = Trimmer(f"{exact.url.replace('unix://', 'unix://shy:none@')}", trimmer.policy)
    shy.turns((trimmer.policy,), rules=replace(BY_GROUPS, max_bytes=1))
    assert math.isnan(shy.value("stream_bytes") or 0)
    assert shy.value("stream_entries") == 3
    Trimmer("unix:///nowhere/at-all.sock", trimmer.policy).turns((trimmer.policy,))


# What only an operator does


def ask(exact: Valkey, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> Result:
    monkeypatch.setenv("SUREFOOT_REDIS_URL", exact.url)
    return CliRunner().invoke(app, ["transitions", *arguments])


def test_groups_are_listed_with_what_they_keep(
    exact: Valkey, store: redis.Redis, policy: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(store, name, range(1, 11))
    read(store, name, "fast", 10, acknowledge=10)
    read(store, name, "slow", 6, acknowledge=3)
    store.xadd(key(policy, "orphan"), {"n": "x"})
    done = ask(exact, monkeypatch, "groups", policy)
    assert done.exit_code == 0
    assert "transitions: 10 entries" in done.output
    slow, fast = (line for line in done.output.splitlines() if "lag" in line)
    assert re.match(r"  slow: lag 4, pending 3, idle \d+ s, 1 consumer, keeps about 7 entries \([\d.]+ KiB\)", slow)
    assert re.match(r"  fast: lag 0, pending 0, idle \d+ s, 1 consumer, keeps about 0 entries \(0 B\)", fast)
    assert "orphan: 1 entries" in done.output
    assert "no group: entries go by age and size" in done.output
    told = json.loads(ask(exact, monkeypatch, "groups", policy, "--json").output)
    assert [each["name"] for each in told] == ["transitions", "orphan"]
    assert {group["name"]: (group["lag"], group["needed"]) for group in told[0]["groups"]} == {
        "fast": (0, 0),
        "slow": (4, 7),
    }
    assert store.xlen(name) == 10, "who only asks changes nothing"
    assert "no streams" in ask(exact, monkeypatch, "groups", "nobody").output


def test_a_group_goes_on_an_operators_word_alone(
    exact: Valkey, store: redis.Redis, policy: str, name: str, trimmer: Trimmer, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(store, name, range(1, 11))
    read(store, name, "fast", 10, acknowledge=10)
    read(store, name, "slow", 6)
    asked = ask(exact, monkeypatch, "drop-group", policy, "slow")
    assert asked.exit_code == 1
    assert "slow: lag 4, pending 6" in asked.output
    assert "say --yes" in asked.output
    assert ask(exact, monkeypatch, "drop-group", policy, "none", "--yes").exit_code == 1
    assert ask(exact, monkeypatch, "drop-group", policy, "slow", "--stream", "late", "--yes").exit_code == 1
    trimmer()
    assert store.xlen(name) == 10
    assert ask(exact, monkeypatch, "drop-group", policy, "slow", "--yes").exit_code == 0
    trimmer()
    assert left(store, name) == [10]
