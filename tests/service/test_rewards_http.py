"""Rewards of every kind over HTTP, as callers and trainers meet them: aggregated, expressed, of episodes, odd."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import redis

from service.redis_streams import base
from surefoot import Client
from tests.service.admins import Admin, serving
from tests.surefoot.valkey import Valkey
from tests.waiting import until


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Valkey]:
    with Valkey(tmp_path_factory.mktemp("store")) as server:
        yield server


@pytest.fixture(scope="module")
def admin(tmp_path_factory: pytest.TempPathFactory, store: Valkey) -> Iterator[Admin]:
    with serving(tmp_path_factory.mktemp("rewards"), redis_url=store.url) as admin:
        admin.pushed("toy", "v1")
        admin.pushed("other", "v1")
        yield admin


@pytest.fixture
def client(store: Valkey) -> Iterator[redis.Redis]:
    with store.client() as client:
        yield client


def declare(admin: Admin, **reward: Any) -> httpx.Response:
    tag = admin.http.get("/admin/policies/toy/deployment").headers["etag"]
    return admin.deploy("toy", tag, champion="v1", reward=reward)


def declared(admin: Admin, **reward: Any) -> None:
    answer = declare(admin, **reward)
    assert answer.status_code == 200, answer.text


def send(admin: Admin, **fields: Any) -> dict[str, Any]:
    answer = admin.http.post("/v1/reward", json=fields)
    assert answer.status_code == 202, answer.text
    body: dict[str, Any] = answer.json()
    return body


def refused(admin: Admin, **fields: Any) -> tuple[int, str | None]:
    answer = admin.http.post("/v1/reward", json=fields)
    return answer.status_code, answer.json()["errors"][0]["field"]


def joined(admin: Admin, decision_id: str, state: str = "joined") -> dict[str, Any]:
    """Where a decision stands, once it is there."""

    def look() -> dict[str, Any]:
        found: dict[str, Any] = admin.http.get(f"/v1/decisions/{decision_id}").json()["join"]
        return found

    until(lambda: look()["state"] == state, state)
    return look()


def entry(client: redis.Redis, stream: str, decision_id: str) -> dict[str, str]:
    found: Any = client.xrevrange(f"{base('toy')}:{stream}", count=100)
    entries = [{k.decode(): v for k, v in fields.items()} for _, fields in found]
    (mine,) = [each for each in entries if each["i"].decode() == decision_id]
    return {name: value.decode(errors="replace") for name, value in mine.items()}


def test_rewards_of_a_decision_are_summed(admin: Admin, client: redis.Redis) -> None:
    declared(admin, aggregation="sum", window_s=600)
    id = admin.act("toy")["decision_id"]
    first = send(admin, decision_id=id, reward=1.5, reward_id="clicks")
    assert (first["status"], first["reward"], first["duplicate"]) == ("joined", 1.5, False)
    assert send(admin, decision_id=id, reward=1.5, reward_id="clicks")["duplicate"]
    standing = admin.http.get(f"/v1/decisions/{id}").json()["join"]
    assert (standing["state"], standing["waiting_for"]) == ("pending", "rewards")
    assert [each["reward_id"] for each in standing["collected"]] == ["clicks"]
    send(admin, decision_id=id, reward=2.0, reward_id="sale", final=True)
    assert joined(admin, id)["reward"]["reward"] == 3.5
    assert entry(client, "transitions", id)["r"] == "3.5"
    assert send(admin, decision_id=id, reward=9.0, reward_id="after")["status"] == "late"


def test_an_expression_makes_the_reward_and_changes_without_its_callers(admin: Admin, client: redis.Redis) -> None:
    declared(admin, expression="metrics.revenue - 0.01 * metrics.latency_ms")
    one, two = (admin.act("toy")["decision_id"] for _ in range(2))
    metrics = {"revenue": 3.0, "latency_ms": 50}
    assert send(admin, decision_id=one, metrics=metrics)["reward"] == 2.5
    declared(admin, expression="metrics.revenue * reward")
    assert refused(admin, decision_id=two, metrics=metrics) == (422, "reward")
    assert refused(admin, decision_id=two, reward=2, metrics={"revenues": 1}) == (422, "metrics.revenue")
    assert send(admin, decision_id=two, reward=2, metrics=metrics)["reward"] == 6.0
    assert joined(admin, one)["reward"]["metrics"] == {"revenue": 3.0, "latency_ms": 50.0}
    told = joined(admin, two)["reward"]
    assert (told["reward"], told["sent"]) == (6.0, 2.0)
    assert entry(client, "transitions", two)["r"] == "6.0"


def test_without_an_expression_a_reward_is_needed(admin: Admin) -> None:
    declared(admin)
    id = admin.act("toy")["decision_id"]
    assert refused(admin, decision_id=id, metrics={"a": 1.0}) == (422, "reward")
    assert refused(admin, reward=1.0) == (422, "decision_id")
    assert refused(admin, decision_id=id, reward=1.0, policy="other") == (422, "policy")


@pytest.mark.parametrize(
    ("reward", "field"),
    [
        ({"expression": "metrics.a + 1"}, "reward.expression"),
        ({"expression": "state.a"}, "reward.expression"),
        ({"aggregation": "median"}, "reward.aggregation"),
        ({"n_step": 0}, "reward.n_step"),
        ({"range": [1, -1]}, "reward"),
        ({"range": [1, 2]}, "reward"),
    ],
)
def test_a_declaration_that_cannot_be_is_refused(admin: Admin, reward: dict[str, Any], field: str) -> None:
    answer = declare(admin, **reward)
    assert (answer.status_code, answer.json()["errors"][0]["field"]) == (422, field)


def test_a_reward_out_of_range_is_answered_as_such(admin: Admin, client: redis.Redis) -> None:
    declared(admin, range=[-1, 1])
    id = admin.act("toy")["decision_id"]
    assert send(admin, decision_id=id, reward=1e9)["status"] == "quarantined"
    assert joined(admin, id, "quarantined")["reward"]["reward"] == 1e9
    assert entry(client, "quarantined", id)["r"] == "1000000000.0"
    assert entry(client, "transitions", id)["r"] == ""


@pytest.mark.parametrize("said", [{}, {"truncated": True}])
def test_an_episode_is_rewarded_as_a_whole(admin: Admin, client: redis.Redis, said: dict[str, bool]) -> None:
    declared(admin)
    name = f"whole-{len(said)}"
    ids = [admin.act("toy", episode=name, step=step)["decision_id"] for step in range(3)]
    answer = send(admin, policy="toy", episode=name, reward=7, **said)
    assert (answer["status"], answer["decision_id"], answer["episode"], answer["reward"]) == ("early", None, name, 7.0)
    assert send(admin, policy="toy", episode=name, reward=7, **said)["duplicate"]
    assert admin.http.post("/v1/reward", json={"policy": "toy", "episode": name, "reward": 8}).status_code == 409
    assert joined(admin, ids[2])["end"] == ("lost" if said else "terminated")
    assert entry(client, "transitions", ids[2])["r"] == "7.0"


def test_what_cannot_be_said_of_an_episode_is_refused(admin: Admin) -> None:
    declared(admin)
    assert refused(admin, episode="e", reward=1) == (422, "policy"), "two are loaded"
    assert refused(admin, policy="nobody", episode="e", reward=1) == (404, "policy")
    for field, value in {"final": True, "next_state": [1, 2], "executed": False, "executed_action": 0}.items():
        assert refused(admin, policy="toy", episode="e", reward=1, **{field: value}) == (422, field)
    assert refused(admin, policy="toy", episode="e", decision_id="x", reward=1) == (422, "episode")
    assert refused(admin, policy="toy", episode="e", reward=1, terminated=True, truncated=True) == (422, "truncated")


def test_records_of_n_steps_are_written(admin: Admin, client: redis.Redis) -> None:
    declared(admin, n_step=2)
    ids = [admin.act("toy", episode="long", step=step)["decision_id"] for step in range(3)]
    for step, id in enumerate(ids):
        send(admin, decision_id=id, reward=step + 0.5, terminated=step == 2)
    joined(admin, ids[2])
    record = entry(client, "nstep", ids[0])
    assert (record["ids"], record["rs"], record["ni"], record["k"]) == (",".join(ids[:2]), "0.5,1.5", ids[2], "2")
    assert record["lps"] == "0.0,0.0"
    assert entry(client, "nstep", ids[2])["x"] == "terminated"


def test_a_batch_may_hold_all_kinds(admin: Admin) -> None:
    declared(admin)
    id = admin.act("toy", episode="mixed", step=0)["decision_id"]
    rewards = [
        {"decision_id": id, "reward": 1.0},
        {"episode": "mixed", "policy": "toy", "reward": 2.0, "reward_id": "w"},
    ]
    answer = admin.http.post("/v1/reward/batch", json={"rewards": rewards})
    assert [each["status"] for each in answer.json()["results"]] == ["joined", "early"]


def test_the_python_client_sends_them_all(admin: Admin) -> None:
    declared(admin, expression="has(metrics.sales) ? metrics.sales : reward", aggregation="sum", window_s=600)
    with Client(admin.server.url) as client:
        decision = client.act([1.0, 2.0], policy="toy", episode="by-client", step=0)
        part = client.reward(decision.decision_id, metrics={"sales": 2.0}, reward_id="1")
        assert (part.status, part.reward, part.episode) == ("joined", 2.0, None)
        of_the_whole, more = client.reward_batch(
            [
                {"episode": "by-client", "policy": "toy", "reward": 3.0, "reward_id": "whole"},
                {"decision_id": decision.decision_id, "reward": 0.5, "reward_id": "2"},
            ]
        )
        assert (of_the_whole.decision_id, of_the_whole.episode, more.reward) == (None, "by-client", 0.5)
        again = client.reward_episode("by-client", 3.0, policy="toy", reward_id="whole")
        assert again.duplicate
    assert joined(admin, decision.decision_id)["reward"]["reward"] == 5.5
