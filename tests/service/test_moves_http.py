"""Episodes that move between real replicas, and over a SIGKILL: two services, one Redis, a recurrent network."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest
import redis

from service.memory import decode
from service.memory_store import digest_of
from service.redis_streams import base
from tests.policies.networks import bundle_files
from tests.service.admins import Admin, serving
from tests.service.test_arrivals import RECURRENT, STATES, elman, golden
from tests.surefoot.valkey import Valkey
from tests.waiting import until


@pytest.fixture
def shared(tmp_path: Path) -> Iterator[Valkey]:
    folder = tmp_path / "shared"
    folder.mkdir()
    with Valkey(folder, durable=True) as server:
        yield server


def push(admin: Admin) -> None:
    states, outputs = golden()
    files = bundle_files(
        elman(), states, outputs, policy="toy", version="v1", recurrent=RECURRENT, exploration={"epsilon": 0.0}
    )  # fmt: skip
    answer = admin.push(files, "toy")
    assert answer.status_code == 201, answer.text


def serves(admin: Admin) -> bool:
    answer = admin.http.get("/admin/policies/toy")
    return answer.status_code == 200 and bool(answer.json()["versions"].get("v1", {}).get("loaded"))


def step(admin: Admin, episode: str, number: int) -> dict[str, Any]:
    return admin.act("toy", state=STATES[number], episode=episode, step=number, include=["values"])


def shown(answer: dict[str, Any]) -> tuple[Any, ...]:
    return answer["action"], answer["values"], answer.get("state_reset", False)


def has(client: redis.Redis, episode: str, decision_id: str) -> bool:
    raw: Any = client.get(f"{base('toy')}:mem:{digest_of(episode)}")
    kept = None if raw is None else decode(raw)
    return kept is not None and kept.decision_id == decision_id


def counted(admin: Admin, outcome: str) -> float:
    text = admin.http.get("/metrics").text
    name = f'surefoot_memory_lookups_total{{outcome="{outcome}",policy="toy"}} '
    return sum(float(line.removeprefix(name)) for line in text.splitlines() if line.startswith(name))


def test_an_episode_alternates_between_replicas_and_outlives_them(tmp_path: Path, shared: Valkey) -> None:
    with ExitStack() as stack, shared.client() as client:
        one, two = (stack.enter_context(serving(tmp_path / name, redis_url=shared.url)) for name in ("one", "two"))
        push(one)
        until(lambda: serves(two), "the other replica")
        expected = [shown(step(one, "alone", number)) for number in range(20)]
        assert not any(reset for _, _, reset in expected)

        found = []
        for number in range(20):
            answer = step((one, two)[number % 2], "moving", number)
            found.append(shown(answer))
            until(lambda answer=answer: has(client, "moving", answer["decision_id"]), "the step in Redis")  # type: ignore[misc]
        assert found == expected
        assert (counted(one, "found"), counted(two, "found")) == (9, 10)

        last = step(two, "killed", 0)
        for number in range(1, 10):
            last = step(two, "killed", number)
        until(lambda: has(client, "killed", last["decision_id"]), "the step in Redis")
        two.server.kill()
        assert shown(step(one, "killed", 10)) == expected[10], "its replica is gone"
        two.server.start()
        two = Admin(two.server)
        stack.callback(two.close)
        until(lambda: serves(two), "the replica that died")
        assert shown(step(two, "alone", 19))[:2] == expected[19][:2]
        on = step(two, "alone", 19)
        assert shown(on) == expected[19], "a step asked again, of a worker that has forgotten"

        end = {"decision_id": on["decision_id"], "reward": 1.0, "terminated": True}
        assert httpx.post(f"{two.server.url}/v1/reward", json=end).is_success
        until(lambda: not client.exists(f"{base('toy')}:mem:{digest_of('alone')}"), "the end")


def test_an_end_that_another_replica_is_told_is_an_end(tmp_path: Path, shared: Valkey) -> None:
    with ExitStack() as stack, shared.client() as client:
        one, two = (stack.enter_context(serving(tmp_path / name, redis_url=shared.url)) for name in ("one", "two"))
        push(one)
        until(lambda: serves(two), "the other replica")
        step(one, "e", 0)
        last = step(one, "e", 1)["decision_id"]
        until(lambda: has(client, "e", last), "the step in Redis")
        until(lambda: client.exists(f"{base('toy')}:d:{last}"), "the decision in Redis")
        end = {"decision_id": last, "reward": 1.0, "truncated": True}
        assert httpx.post(f"{two.server.url}/v1/reward", json=end).is_success
        until(lambda: not client.exists(f"{base('toy')}:mem:{digest_of('e')}"), "the end")
        assert step(two, "e", 2)["state_reset"]


def test_a_service_that_stops_leaves_the_last_steps_behind(tmp_path: Path) -> None:
    with serving(tmp_path) as admin:
        push(admin)
        expected = [shown(step(admin, "e", number)) for number in range(3)]
        again = shown(step(admin, "f", 0))
        assert admin.server.stop() == 0
        admin.server.start()
        other = Admin(admin.server)
        until(lambda: serves(other), "the version")
        on = step(other, "e", 3)
        assert not on.get("state_reset", False)
        assert shown(step(other, "f", 0)) == again == expected[0]
        other.close()
