"""The running service over HTTP, as a caller meets it."""

from __future__ import annotations

import json
import socket
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from service import wire
from tests.conftest import Server

STATE = [0.01, -0.02, 0.03, 0.04]
NAMED = {"cart_position": 0.01, "cart_velocity": -0.02, "pole_angle": 0.03, "pole_angular_velocity": 0.04}


@pytest.fixture
def http(server: Server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=10.0) as client:
        yield client


def act(http: httpx.Client, **fields: Any) -> dict[str, Any]:
    response = http.post("/v1/act", json={"state": STATE, **fields})
    assert response.status_code == 200, response.text
    return response.json()  # type: ignore[no-any-return]


def decision(http: httpx.Client, decision_id: str) -> dict[str, Any]:
    response = http.get(f"/v1/decisions/{decision_id}")
    assert response.status_code == 200, response.text
    return response.json()  # type: ignore[no-any-return]


def test_an_act_answers_with_the_executed_actions_probability(http: httpx.Client) -> None:
    answer = act(http, policy="cartpole", include=["values", "distribution"])
    assert answer["version"] == answer["assigned_version"] == "v2"
    assert answer["propensity"] == pytest.approx(
        0.01 if answer["action_name"] != answer["safety"]["proposed"] else 0.99
    )
    assert sum(answer["distribution"]) == pytest.approx(1.0)
    assert answer["distribution"][answer["action"]] == answer["propensity"]
    assert len(answer["values"]) == 2
    assert answer["logged"] is True


@pytest.mark.parametrize("path", ["/act", "/v1/act"])
def test_the_short_path_answers_too_and_a_state_may_be_an_object(http: httpx.Client, path: str) -> None:
    listed = http.post(path, json={"state": STATE, "explore": False}).json()
    named = http.post(path, json={"state": dict(reversed(NAMED.items())), "explore": False}).json()
    assert (listed["action"], listed["propensity"]) == (named["action"], named["propensity"])
    assert listed["propensity"] == 1.0


def test_concurrent_requests_each_get_their_own_decision(http: httpx.Client) -> None:
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda i: act(http, key=f"k{i}"), range(200)))
    assert len({answer["decision_id"] for answer in answers}) == 200
    keys = {decision(http, answer["decision_id"])["key"] for answer in answers[:20]}
    assert keys == {f"k{i}" for i in range(20)}


def test_a_batch_answers_in_columns(http: httpx.Client) -> None:
    body = {"policy": "cartpole", "states": [STATE, NAMED, STATE], "explore": False, "keys": ["a", None, "b"]}
    answer = http.post("/v1/act/batch", json=body | {"allowed_actions": [None, None, []]}).json()
    assert len(set(answer["decision_id"])) == 3
    assert answer["action"][0] == answer["action"][1]
    assert answer["fallback"] == [None, None, "nothing_allowed"]
    assert answer["propensity"] == [1.0, 1.0, 1.0]
    assert answer["errors"] == []


def test_a_reward_is_joined_and_counts_once(http: httpx.Client) -> None:
    answer = act(http)
    body = {"decision_id": answer["decision_id"], "reward": 0.5, "metrics": {"latency": 3.0}}
    first = http.post("/v1/reward", json=body)
    assert first.status_code == 202
    assert first.json()["status"] in {"joined", "early"}
    again = http.post("/reward", json=dict(reversed(body.items())))
    assert (again.status_code, again.json()["status"], again.json()["duplicate"]) == (202, "joined", True)
    other = http.post("/v1/reward", json=body | {"reward": 0.6})
    assert (other.status_code, other.json()["code"]) == (409, "reward_conflict")
    join = decision(http, answer["decision_id"])["join"]
    assert (join["state"], join["reward"]["reward"], join["end"]) == ("joined", 0.5, "single")
    assert join["reward"]["metrics"] == {"latency": 3.0}


def test_100_concurrent_rewards_under_one_id_make_one_reward(http: httpx.Client) -> None:
    decision_id = act(http)["decision_id"]
    with ThreadPoolExecutor(20) as pool:
        bodies = [{"decision_id": decision_id, "reward": float(i % 2)} for i in range(100)]
        answers = list(pool.map(lambda body: http.post("/v1/reward", json=body), bodies))
    stands = decision(http, decision_id)["join"]["reward"]["reward"]
    for body, answer in zip(bodies, answers, strict=True):
        accepted = answer.status_code == 202
        assert answer.status_code in {202, 409}
        assert accepted == (body["reward"] == stands) or answer.json().get("status") == "accepted"


def test_a_rewards_own_next_state_wins(http: httpx.Client) -> None:
    decision_id = act(http, episode=f"e-{uuid.uuid4()}", step=0)["decision_id"]
    body = {"decision_id": decision_id, "reward": 1, "truncated": True, "next_state": NAMED}
    assert http.post("/v1/reward", json=body).status_code == 202
    join = decision(http, decision_id)["join"]
    assert (join["state"], join["end"]) == ("joined", "truncated")
    absent = act(http)["decision_id"]
    for each in ({}, {"next_state": None}):
        answer = http.post("/v1/reward", json={"decision_id": absent, "reward": 1} | each).json()
        assert answer["status"] in {"joined", "early"}
    assert answer["duplicate"] is True


def test_a_batch_of_rewards_reports_each_verdict(http: httpx.Client) -> None:
    one, two = act(http)["decision_id"], act(http)["decision_id"]
    http.post("/v1/reward", json={"decision_id": one, "reward": 1})
    rewards = [{"decision_id": one, "reward": 2}, {"decision_id": two, "reward": 3}]
    results = http.post("/v1/reward/batch", json={"rewards": rewards}).json()["results"]
    assert results[0]["status"] == "conflict"
    assert results[1]["status"] in {"joined", "early"}


def test_a_step_s_successor_is_the_episode_s_next_decision(http: httpx.Client) -> None:
    episode = f"e-{uuid.uuid4()}"
    first = act(http, episode=episode, step=0)["decision_id"]
    http.post("/v1/reward", json={"decision_id": first, "reward": 1})
    second = act(http, episode=episode, step=1, state=[0.1, 0.2, 0.3, 0.4])["decision_id"]
    http.post("/v1/reward", json={"decision_id": second, "reward": 1, "terminated": True})
    ends = {}
    for decision_id in (first, second):
        join = decision(http, decision_id)["join"]
        ends[decision_id] = (join["state"], join["end"], join["next_decision_id"])
    assert ends == {first: ("joined", "none", second), second: ("joined", "terminated", None)}


Change = Callable[[dict[str, Any]], dict[str, Any]]
WRONG_ACTS: list[tuple[Any, int, str, str | None]] = [
    ({"state": STATE, "policy": "nope"}, 404, "unknown_policy", "policy"),
    ({"state": [1, 2, 3]}, 422, "invalid_field", "state"),
    ({"state": ["a", 2, 3, 4]}, 422, "invalid_field", "state[0]"),
    ({"state": {k: v for k, v in NAMED.items() if k != "pole_angle"}}, 422, "missing_field", "state.pole_angle"),
    ({"state": NAMED | {"wind": 1}}, 422, "unknown_field", "state.wind"),
    ({"state": [1e300, 0, 0, 0]}, 422, "not_finite", "state.cart_position"),
    ({"state": STATE, "colour": 1}, 422, "unknown_field", "colour"),
    ({}, 422, "missing_field", "state"),
    ({"state": STATE, "allowed_actions": ["up"]}, 422, "unknown_action", "allowed_actions[0]"),
    ({"state": STATE, "allowed_actions": [2]}, 422, "unknown_action", "allowed_actions[0]"),
    (b'{"state": [NaN, 0, 0, 0]}', 422, "not_finite", "state[0]"),
    (b'{"state": {"pole_angle": Infinity}}', 422, "not_finite", "state.pole_angle"),
    (b'{"state": [', 400, "bad_json", None),
]


@pytest.mark.parametrize(("body", "status", "code", "field"), WRONG_ACTS)
def test_a_wrong_act_is_a_problem_that_names_the_field(
    http: httpx.Client, body: Any, status: int, code: str, field: str | None
) -> None:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    response = http.post("/v1/act", content=content)
    problem = response.json()
    assert (response.status_code, problem["code"], problem["status"]) == (status, code, status)
    assert response.headers["content-type"] == "application/problem+json"
    assert [error["field"] for error in problem.get("errors", [])] == ([field] if field else [])


def test_wrong_rewards_are_problems_too(http: httpx.Client) -> None:
    decision_id = act(http)["decision_id"]
    forged = decision_id[:-1] + ("0" if decision_id[-1] != "0" else "1")
    good = {"decision_id": decision_id, "reward": 1}
    cases = [
        ({"decision_id": forged, "reward": 1}, 404, "unknown_decision", "decision_id"),
        ({"decision_id": "x", "reward": 1}, 404, "unknown_decision", "decision_id"),
        ({"decision_id": decision_id, "reward": "1"}, 422, "invalid_field", "reward"),
        ({"decision_id": decision_id}, 422, "missing_field", "reward"),
        (good | {"executed_action": "up"}, 422, "unknown_action", "executed_action"),
        (good | {"next_state": [1]}, 422, "invalid_field", "next_state"),
        (
            good | {"terminated": True, "truncated": True},
            422,
            "invalid_field",
            "truncated",
        ),
    ]
    for body, status, code, field in cases:
        response = http.post("/v1/reward", json=body)
        assert (response.status_code, response.json()["code"]) == (status, code), response.text
        assert response.json()["errors"][0]["field"] == field
    batch = http.post("/v1/reward/batch", json={"rewards": [{"decision_id": decision_id, "reward": 1}, cases[0][0]]})
    assert (batch.status_code, batch.json()["errors"][0]["field"]) == (404, "rewards[1].decision_id")
    assert decision(http, decision_id)["join"]["reward"] is None  # nothing of a refused batch is kept
    assert http.get(f"/v1/decisions/{forged}").status_code == 404


def test_bodies_over_the_cap_and_wrong_methods_are_refused(http: httpx.Client) -> None:
    large = http.post("/v1/act", content=b" " * (1 << 20) + b"{}")
    assert (large.status_code, large.json()["code"]) == (413, "body_too_large")
    chunked = http.post("/v1/act", content=(b" " * 65_536 for _ in range(20)))
    assert (chunked.status_code, chunked.json()["code"]) == (413, "body_too_large")
    wrong = http.get("/v1/act")
    assert (wrong.status_code, wrong.json()["code"], wrong.headers["allow"]) == (405, "method_not_allowed", "POST")
    nowhere = http.get("/v1/nowhere")
    assert (nowhere.status_code, nowhere.json()["code"]) == (404, "not_found")


def test_a_repeat_under_an_idempotency_key_returns_the_stored_answer(http: httpx.Client) -> None:
    key = {"Idempotency-Key": f'"{uuid.uuid4()}"'}
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: http.post("/v1/act", json={"state": STATE}, headers=key), range(8)))
    assert {answer.status_code for answer in answers} == {200}
    assert len({answer.text for answer in answers}) == 1
    assert sum("idempotency-replayed" in answer.headers for answer in answers) == 7
    other = http.post("/v1/act", json={"state": [0, 0, 0, 0]}, headers=key)
    assert (other.status_code, other.json()["code"]) == (422, "idempotency_key_reused")
    empty = http.post("/v1/act", json={"state": STATE}, headers={"Idempotency-Key": '""'})
    assert (empty.status_code, empty.json()["errors"][0]["field"]) == (422, "Idempotency-Key")


def test_a_trace_context_is_stored_and_answered(http: httpx.Client) -> None:
    sent = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
    response = http.post("/v1/act", json={"state": STATE}, headers={"traceparent": sent})
    assert response.headers["traceparent"] == sent
    assert decision(http, response.json()["decision_id"])["traceparent"] == sent
    assert "traceparent" not in http.post("/v1/act", json={"state": STATE}, headers={"traceparent": "x"}).headers


def test_health_metrics_and_documents(http: httpx.Client, server: Server) -> None:
    assert http.get("/health/live").json() == {"status": "live"}
    ready = http.get("/health/ready").json()
    assert (ready["status"], ready["reasons"], ready["durability"]) == ("ready", [], "process")
    assert ready["redis"]["appendonly"] is True
    act(http)
    metrics = http.get("/metrics").text
    assert 'surefoot_decisions_total{policy="cartpole",role="champion",version="v2"}' in metrics
    assert 'surefoot_act_duration_seconds_bucket{le="0.001",policy="cartpole",version="v2"}' in metrics
    document = http.get("/openapi.json").json()
    for path in ("/v1/act", "/v1/act/batch", "/v1/reward", "/v1/reward/batch", "/v1/decisions/{decision_id}"):
        assert path in document["paths"]
    assert document["components"]["schemas"]["ActRequest"]["properties"]["state"]["oneOf"]
    assert http.get("/docs").status_code == 200
    assert http.get("/admin/policies").status_code == 401


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
FIELDS = {
    "/v1/act": wire.ActRequest,
    "/v1/act/batch": wire.ActBatchRequest,
    "/v1/reward": wire.RewardRequest,
    "/v1/reward/batch": wire.RewardBatchRequest,
}


@st.composite
def odd_requests(draw: st.DrawFn) -> tuple[str, bytes]:
    """A body with some of the right fields, some of them holding anything; or bytes that are no JSON at all."""
    path = draw(st.sampled_from(sorted(FIELDS)))
    names = st.sampled_from(FIELDS[path].__struct_fields__)
    right = {"state": STATE, "states": [STATE, NAMED], "reward": 1.0, "decision_id": "0" * 60, "policy": "cartpole"}
    fields = {name: right.get(name) for name in FIELDS[path].__struct_fields__ if name in right}
    body = json.dumps(fields | draw(st.dictionaries(names, anything, max_size=3))).encode()
    return path, draw(st.one_of(st.just(body), st.just(body[: len(body) // 2]), st.binary(max_size=30)))


@given(request=odd_requests())
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whatever_is_sent_the_answer_is_an_answer_or_a_problem(http: httpx.Client, request: tuple[str, bytes]) -> None:
    path, body = request
    response = http.post(path, content=body)
    assert response.status_code < 500
    if response.status_code >= 400:
        problem = response.json()
        assert (problem["status"], response.headers["content-type"]) == (
            response.status_code,
            "application/problem+json",
        )


def test_a_caller_who_leaves_halfway_and_one_who_is_slow_do_no_harm(server: Server, http: httpx.Client) -> None:
    body = json.dumps({"state": STATE}).encode()
    head = b"POST /v1/act HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body)
    for sent in (head, head + body[:5], head + body):
        with socket.create_connection(("127.0.0.1", server.port)) as connection:
            connection.sendall(sent)
    assert act(http)["logged"] is True
