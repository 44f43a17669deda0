"""At Redis's memory limit: nothing is trimmed to make room, events wait in the spool, and go on by themselves."""

from __future__ import annotations

import asyncio
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import redis

from service.join import JoinConfig
from service.trimming import Rules
from surefoot import transitions
from surefoot.streams import Transitions
from tests.conftest import Server, new_server
from tests.service.measure_pending import KINDS, Filled, Kind, templates
from tests.service.trimmers import BY_GROUPS, Trimmer, fill, key, left
from tests.surefoot.valkey import Valkey
from tests.waiting import until

STATE = [0.01, -0.02, 0.03, 0.04]
# Measured (docs/memory.md), and a fifth more: the record grows by a field now and then.
MOST_BYTES = {
    "4 features, no episodes": 930,
    "4 features, episodes": 1_180,
    "64 features, no episodes": 1_270,
    "64 features, episodes": 1_840,
}


@pytest.fixture
def own() -> Iterator[Valkey]:
    """A server of the test's own, whose limit it may move."""
    with tempfile.TemporaryDirectory(prefix="sf-") as directory, Valkey(Path(directory)) as server:
        yield server


def used_bytes(store: redis.Redis) -> int:
    info: Any = store.info("memory")
    return int(info["used_memory"])


def test_the_script_works_at_the_limit_and_gives_memory_back(own: Valkey, policy: str) -> None:
    trimmer = Trimmer(own.url, policy)
    with own.client() as store:
        fill(store, key(policy), range(1, 3_001), size=2_000)
        store.xgroup_create(key(policy), "g", "2000-0")
        store.config_set("maxmemory", used_bytes(store))
        with pytest.raises(redis.exceptions.OutOfMemoryError):
            store.xadd(key(policy), {"n": "x" * 100_000})
        store.config_set("maxmemory", 1)
        before = used_bytes(store)
        view = trimmer()
        assert view is not None
        assert 1_990 < view.trimmed < 2_000
        assert left(store, key(policy))[-1001:] == list(range(2_000, 3_001))
        assert used_bytes(store) < before - 3_500_000
        assert store.hget(f"{key(policy, 'alone')}:transitions", "g"), "what it remembers of a group is written too"


def test_at_the_limit_a_stream_without_room_is_not_trimmed_past_its_group(own: Valkey, policy: str) -> None:
    trimmer = Trimmer(own.url, policy)
    with own.client() as store:
        fill(store, key(policy), range(1, 1_001), size=1_000)
        store.xgroup_create(key(policy), "g", "0")
        store.config_set("maxmemory", 1)
        for rules in (BY_GROUPS, Rules(max_age_ms=1, max_bytes=1, keep=0, settle_ms=0)):
            trimmer(rules)
        assert store.xlen(key(policy)) == 1_000


# The whole service


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Server]:
    server = new_server(tmp_path, stream_keep="0")
    server.start()
    yield server
    if server.process is not None and server.process.poll() is None:
        server.stop()


class Client:
    """Acts and rewards, and remembers what was acknowledged."""

    def __init__(self, url: str) -> None:
        self._http = httpx.Client(base_url=url, timeout=20.0)
        self.rewarded: dict[str, float] = {}

    def play(self, batches: int, rows: int = 100) -> None:
        for _ in range(batches):
            answer = self._http.post("/v1/act/batch", json={"states": [STATE] * rows})
            assert answer.status_code == 200, answer.text
            ids = answer.json()["decision_id"]
            given = {each: float(len(self.rewarded) + n) for n, each in enumerate(ids)}
            body = {"rewards": [{"decision_id": each, "reward": value} for each, value in given.items()]}
            answer = self._http.post("/v1/reward/batch", json=body)
            assert answer.status_code == 202, answer.text
            self.rewarded |= given

    def metric(self, name: str) -> float:
        """The sum of a metric's series; labels may stand in the name."""
        text = self._http.get("/metrics").text
        return sum(map(float, re.findall(rf"^surefoot_{name}(?:{{.*}})? (.*)$", text, re.MULTILINE)))

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self._http.close()

    def all_shipped(self) -> bool:
        return self.metric("ledger_unshipped_events") == 0


class Trainer:
    """A real consumer; a Gap would be raised here."""

    def __init__(self, url: str) -> None:
        self.got: dict[str, float] = {}
        self._stream: Transitions = transitions(
            "cartpole", "trainer", "t0", redis_url=url, block_s=0.05, max_wait_s=0.0
        )

    def __enter__(self) -> Trainer:
        return self

    def __exit__(self, *_: object) -> None:
        self._stream.close()

    def train(self) -> None:
        """Take what there is and acknowledge it."""
        for batch in self._stream:
            news = dict(zip(batch.ids.tolist(), batch.rewards.tolist(), strict=True))
            assert not self.got.keys() & news.keys()
            self.got |= news


def test_events_wait_at_the_limit_until_trainers_have_made_room(service: Server) -> None:
    store = redis.Redis.from_url(service.redis_url, protocol=2)
    with Client(service.url) as client, Trainer(service.redis_url) as trainer, store:
        trainer.train()  # makes the group: nothing goes that it has not acknowledged
        client.play(40)
        until(client.all_shipped, "the first events in Redis")
        store.config_set("maxmemory", used_bytes(store))
        failures = client.metric("ship_failures_total")
        client.play(8)
        until(lambda: client.metric("ship_failures_total") > failures + 3, "refusals")
        assert httpx.get(f"{service.url}/health/ready").status_code == 200
        assert client.metric("ledger_unshipped_events") > 0
        assert store.xlen(key("cartpole")) < len(client.rewarded), "nothing more fits"
        assert client.metric("store_memory_limit_bytes") < float("inf")

        def caught_up() -> bool:
            trainer.train()
            return len(trainer.got) == len(client.rewarded) and client.all_shipped()

        until(caught_up, "room by trimming, and shipping by itself")
        assert trainer.got == client.rewarded
        assert client.metric("ledger_lost_events") == 0
    assert service.stop() == 0, service.log


def test_events_wait_at_the_limit_until_it_is_raised(service: Server) -> None:
    store = redis.Redis.from_url(service.redis_url, protocol=2)
    with Client(service.url) as client, Trainer(service.redis_url) as trainer, store:
        client.play(2)
        until(client.all_shipped, "the first events in Redis")
        limit = str(store.config_get("maxmemory")["maxmemory"])
        store.config_set("maxmemory", 1)
        stands = store.xlen(key("cartpole"))
        failures = client.metric("ship_failures_total")
        client.play(5)
        until(lambda: client.metric("ship_failures_total") > failures + 3, "refusals")
        assert store.xlen(key("cartpole")) == stands == 200, "nothing came, and nothing went to make room"
        store.config_set("maxmemory", limit)
        until(client.all_shipped, "shipping by itself")
        trainer.train()
        assert trainer.got == client.rewarded
        assert client.metric("ledger_lost_events") == 0
    assert service.stop() == 0, service.log


# What a pending decision takes


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_a_pending_decision_stays_within_its_size(own: Valkey, kind: Kind) -> None:
    made = asyncio.run(templates(kind, 256))
    with own.client() as store:
        filled = Filled(store, kind, made, JoinConfig())
        filled.fill(200)
        first = filled.commands
        filled.fill(200, after=200)
        few = filled.commands - first
        filled.fill(1_400, after=400)
        before = filled.commands
        filled.fill(200, after=1_800)
        assert filled.commands - before == few, "joining does no more for being many"
        assert (filled.used_bytes - filled.empty_bytes) / 2_000 < MOST_BYTES[kind.name]
        calls, defaulted, _, _ = filled.sweep()
        assert defaulted == 2_000
        assert calls <= 2_000 // JoinConfig().sweep_limit + 2, "each call works off what it may"
        assert store.xlen(key("p")) == 2_000
