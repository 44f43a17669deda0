"""A policy that is not served here is unknown, or not there yet; the second must not look like the first.

A 404 tells callers that asking again is of no use; a policy that this replica is about to serve says 503 `not_ready`.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import redis

from policies.deployment import Deployment
from policies.errors import NotReady, UnknownDecision, UnknownPolicy
from service.absence import Absence
from service.ids import policy_digest
from service.redis_store import PIECE_BYTES
from service.standing import Document, PolicyState
from service.valkey import EmbeddedValkey
from tests.conftest import new_server
from tests.service.admins import AUTHORIZED, STATE, TOKEN, Admin, files_of, serving
from tests.waiting import until

ACT: dict[str, Any] = {"policy": "toy", "state": STATE}


@pytest.fixture
def shared(tmp_path: Path) -> Iterator[EmbeddedValkey]:
    """A Redis that services share, and that a test may stop and start."""
    valkey = EmbeddedValkey(tmp_path / "shared", maxmemory_bytes=128 << 20)
    valkey.start()
    yield valkey
    valkey.stop()


def known(name: str, *, deployed: bool = True, served: bool = False) -> PolicyState:
    document = Document(1, Deployment(schema=1, policy=name, champion="v1"), 1, "me")
    return PolicyState(name, seeded=document if deployed else None, served=document if served else None)


@pytest.mark.parametrize("informed", [False, True])
def test_only_what_is_deployed_nowhere_is_unknown(informed: bool) -> None:
    states = {
        each.name: each for each in (known("one", served=True), known("two"), known("pushed-alone", deployed=False))
    }
    absence = Absence(states, lambda: informed)
    assert absence.waiting() == ["two"]
    assert type(absence.of_policy("two")) is NotReady
    assert type(absence.of_decision(policy_digest("two"))) is NotReady
    for name in ("pushed-alone", "three"):
        assert type(absence.of_policy(name)) is (UnknownPolicy if informed else NotReady)
        assert type(absence.of_decision(policy_digest(name))) is (UnknownDecision if informed else NotReady)
    states["three"] = PolicyState("three", unreadable=True)
    assert absence.waiting() == ["three", "two"], "what is known changes while it is read"


def test_a_request_without_a_policy_means_the_only_one_there_is() -> None:
    assert Absence({"one": known("one", served=True)}, lambda: True).only(["one"]) == "one"
    assert Absence({"two": known("two")}, lambda: True).only([]) == "two"
    assert Absence({"one": known("one", served=True), "two": known("two")}, lambda: True).only(["one"]) is None
    assert Absence({}, lambda: True).only([]) is None


def told(answer: httpx.Response) -> tuple[int, str, str | None]:
    return answer.status_code, answer.json()["code"], answer.headers.get("retry-after")


NOT_READY = (503, "not_ready", "1")
UNKNOWN = (404, "unknown_policy", None)


def requests(admin: Admin, decision: str) -> list[httpx.Response]:
    """Every way to ask for the policy, or to reward what it has decided elsewhere."""
    bodies = {
        "/v1/act": ACT,
        "/act/batch": {"policy": "toy", "states": [STATE]},
        "/v1/reward": {"decision_id": decision, "reward": 1.0},
        "/v1/reward/batch": {"rewards": [{"decision_id": decision, "reward": 1.0}]},
        "/reward": {"policy": "toy", "episode": "e", "reward": 1.0},
    }
    return [admin.http.post(path, json=body) for path, body in bodies.items()]


def test_a_deployed_policy_that_is_not_loaded_here_is_not_unknown(tmp_path: Path, shared: EmbeddedValkey) -> None:
    with redis.Redis.from_url(shared.url) as client, serving(tmp_path / "one", redis_url=shared.url) as one:
        one.pushed("toy", "v1")
        decision = one.act("toy")["decision_id"]
        (network,) = [key for key in client.keys("sf:{toy}:blob:*") if client.get(key) == network_of("v1")]
        client.set(network, b"what no replica would load")
        with serving(tmp_path / "two", redis_url=shared.url) as two:
            assert [told(answer) for answer in requests(two, decision)] == [NOT_READY] * 5
            assert told(two.http.get(f"/v1/decisions/{decision}")) == NOT_READY
            assert told(two.http.post("/v1/act", json={**ACT, "policy": "tou"})) == UNKNOWN
            assert told(two.http.post("/reward", json={"policy": "tou", "episode": "e", "reward": 1})) == UNKNOWN
            unnamed = two.http.post("/v1/act", json={"state": [0.0] * 4})
            assert unnamed.json()["code"] == "missing_field", "one policy is loaded, but two are deployed"
            assert "cartpole, toy" in unnamed.json()["detail"]
            ready = two.http.get("/health/ready")
            assert (ready.status_code, ready.json()["loading"]) == (200, ["toy"])
            client.set(network, network_of("v1"))
            one.pushed("toy", "v2")  # whatever changes, it is tried again at once
            until(lambda: two.http.post("/v1/act", json=ACT).status_code == 200, "the policy")
            assert two.http.post("/v1/reward", json={"decision_id": decision, "reward": 1.0}).status_code == 202
            assert two.http.get("/health/ready").json()["loading"] == []


def network_of(version: str) -> bytes:
    network = files_of("toy", version)["model.onnx"]
    assert len(network) < PIECE_BYTES
    return network


def test_as_long_as_nobody_has_told_what_is_deployed_no_policy_is_unknown(
    tmp_path: Path, shared: EmbeddedValkey
) -> None:
    key = "1:" + "0f" * 32  # a replica that has never run, and cannot ask Redis for the keys
    with serving(tmp_path / "one", redis_url=shared.url, keys=key) as one:
        one.pushed("toy", "v1")
        decision = one.act("toy")["decision_id"]
    shared.stop()
    with serving(tmp_path / "two", redis_url=shared.url, keys=key) as two:
        assert [told(answer) for answer in requests(two, decision)] == [NOT_READY] * 5
        assert two.http.post("/v1/act", json={"policy": "cartpole", "state": [0.0] * 4}).status_code == 200
        shared.start()
        until(lambda: two.http.post("/v1/act", json=ACT).status_code == 200, "the policy")
        assert told(two.http.post("/v1/act", json={**ACT, "policy": "tou"})) == UNKNOWN


def test_a_policy_that_only_a_newer_service_can_read_is_not_unknown(tmp_path: Path, shared: EmbeddedValkey) -> None:
    newer = b'{"generation": 9, "deployment": {"schema": 2}, "changed_at_ms": 1, "changed_by": "x"}'
    with redis.Redis.from_url(shared.url) as client:
        with serving(tmp_path / "one", redis_url=shared.url) as one:
            one.pushed("toy", "v1")
            decision = one.act("toy")["decision_id"]
        before = client.hget("sf:{toy}:control", "deployment")
        client.hset("sf:{toy}:control", mapping={"deployment": newer, "rev": 99})
        with serving(tmp_path / "two", redis_url=shared.url) as two:
            assert [told(answer) for answer in requests(two, decision)] == [NOT_READY] * 5
            client.hset("sf:{toy}:control", mapping={"deployment": before, "rev": 100})
            until(lambda: two.http.post("/v1/act", json=ACT).status_code == 200, "the policy")


def test_requests_that_come_during_the_start_wait_for_its_end(tmp_path: Path, shared: EmbeddedValkey) -> None:
    """The socket listens before the worker runs: what arrives there is answered once all policies are loaded."""
    with serving(tmp_path / "one", redis_url=shared.url) as one:
        one.pushed("toy", "v1")
    shared.stop()  # a start waits for the keys that Redis holds
    server = new_server(tmp_path / "two", admin_token=TOKEN, redis_url=shared.url)
    with ThreadPoolExecutor(2) as pool:
        starting = pool.submit(server.start)
        until(lambda: (server.data_dir.parent / "server.log").exists() and server._read_port(), "the socket")
        acting = pool.submit(httpx.post, f"{server.url}/v1/act", json=ACT, headers=AUTHORIZED, timeout=60.0)
        until(lambda: connected(server.port), "the request")
        assert not acting.done()
        shared.start()
        answer = acting.result()
        starting.result()
    try:
        assert (answer.status_code, answer.json()["version"]) == (200, "v1")
    finally:
        server.stop()


def connected(port: int) -> bool:
    """Whether somebody has connected to a port of this machine, accepted or not."""
    lines = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return any(int(line[1].split(":")[1], 16) == port and line[3] == "01" for line in lines)
