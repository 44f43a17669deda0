"""Replicas that share a Redis: any of them takes any event. And deployments other than the default."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from service.ids import Keyring
from service.keys import SNAPSHOT, obtain_keyring
from service.redis_streams import RedisStreams, connect
from service.valkey import EmbeddedValkey
from surefoot.streams import tail
from tests.conftest import Server, new_server
from tests.service.test_life import STATE, short_window
from tests.waiting import until


@pytest.fixture
def redis_url(tmp_path: Path) -> Iterator[str]:
    valkey = EmbeddedValkey(tmp_path / "shared", maxmemory_bytes=64 << 20)
    yield valkey.start()
    valkey.stop()


@pytest.fixture
def replicas(tmp_path: Path, redis_url: str) -> Iterator[list[Server]]:
    found = [new_server(tmp_path / name, redis_url=redis_url) for name in ("one", "two")]
    for server in found:
        server.start()
    yield found
    for server in found:
        assert server.stop() == 0


def test_any_replica_takes_any_event(replicas: list[Server], redis_url: str) -> None:
    episode = f"e-{uuid.uuid4()}"
    decisions = []
    for step in range(6):
        body = {"state": STATE, "episode": episode, "step": step}
        decisions.append(httpx.post(f"{replicas[step % 2].url}/v1/act", json=body).json()["decision_id"])
        reward = {"decision_id": decisions[-1], "reward": step, "terminated": step == 5}
        answer = httpx.post(f"{replicas[1 - step % 2].url}/v1/reward", json=reward)
        assert answer.status_code == 202
        assert answer.json()["status"] in {"joined", "early", "accepted"}
    until(lambda: len(list(tail("cartpole", redis_url))) == 6, "the transitions")
    found = {each["step"]: each for each in tail("cartpole", redis_url)}
    assert [found[step]["id"] for step in range(6)] == decisions
    assert [found[step]["next_id"] for step in range(6)] == [*decisions[1:], None]
    assert [found[step]["reward"] for step in range(6)] == [0, 1, 2, 3, 4, 5]
    assert len({found[step]["producer"] for step in range(6)}) == 2


def test_an_idempotency_key_holds_across_replicas(replicas: list[Server]) -> None:
    key = {"Idempotency-Key": str(uuid.uuid4())}
    first = httpx.post(f"{replicas[0].url}/v1/act", json={"state": STATE}, headers=key)

    def again() -> httpx.Response:
        return httpx.post(f"{replicas[1].url}/v1/act", json={"state": STATE}, headers=key)

    until(lambda: again().status_code == 200, "the stored answer")  # 409 until the first one's answer has been stored
    assert again().text == first.text
    assert again().headers["idempotency-replayed"] == "true"


def test_a_record_that_has_expired_is_named_so(tmp_path: Path) -> None:
    server = new_server(tmp_path, record_ttl_s="1", policies=str(short_window(tmp_path, 1)))
    server.start()
    try:
        decision = httpx.post(f"{server.url}/v1/act", json={"state": STATE}).json()["decision_id"]
        reward = {"decision_id": decision, "reward": 1.0}
        until(lambda: httpx.post(f"{server.url}/v1/reward", json=reward).status_code == 404, "expiry")
        for answer in (
            httpx.post(f"{server.url}/v1/reward", json=reward),
            httpx.get(f"{server.url}/v1/decisions/{decision}"),
        ):
            assert (answer.status_code, answer.json()["code"]) == (404, "decision_expired")
    finally:
        server.stop()


def test_the_tier_memory_serves_without_a_spool(tmp_path: Path) -> None:
    server = new_server(tmp_path, durability="memory")
    server.start()
    try:
        answer = httpx.post(f"{server.url}/v1/act", json={"state": STATE}).json()
        assert httpx.post(
            f"{server.url}/v1/reward", json={"decision_id": answer["decision_id"], "reward": 1}
        ).is_success
        assert httpx.get(f"{server.url}/health/ready").json()["durability"] == "memory"
        assert not (server.data_dir / "spool").exists()
    finally:
        assert server.stop() == 0
    server.start()
    assert [each["id"] for each in tail("cartpole", server.redis_url)] == [answer["decision_id"]]
    server.stop()


async def keyring_of(setting: str | None, url: str, data_dir: Path) -> Keyring | None:
    streams = RedisStreams(connect(url))
    try:
        return await obtain_keyring(setting, streams, data_dir)
    finally:
        await streams.aclose()


def test_keys_are_made_once_and_kept_for_when_redis_is_away(tmp_path: Path, redis_url: str) -> None:
    import asyncio

    folders = [tmp_path / name for name in "abc"]
    for folder in folders:
        folder.mkdir()
    away = f"unix://{tmp_path}/nothing.sock"
    assert asyncio.run(keyring_of(None, away, folders[0])) is None
    made = asyncio.run(keyring_of(None, redis_url, folders[0]))
    shared = asyncio.run(keyring_of(None, redis_url, folders[1]))
    kept = asyncio.run(keyring_of(None, away, folders[0]))
    assert made
    assert shared
    assert kept
    assert made.signing == shared.signing == kept.signing
    assert (folders[0] / SNAPSHOT).stat().st_mode & 0o777 == 0o600
    set_by_hand = asyncio.run(keyring_of("7:" + "ab" * 32, redis_url, folders[2]))
    assert set_by_hand
    assert set_by_hand.signing.kid == 7
    assert not (folders[2] / SNAPSHOT).exists()
