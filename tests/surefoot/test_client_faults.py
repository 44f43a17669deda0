"""What the clients do when the service is away, slow, full, or its answer is lost: on real sockets."""

from __future__ import annotations

import json
import socket
from typing import Any

import pytest

from surefoot import ApiError, KeyInUse, RewardConflict, Unavailable, Unreachable, Unreadable
from tests.surefoot.callers import KINDS
from tests.surefoot.odd_server import Behaviour, OddServer, answer, lose, reset, tear

DECISION = json.dumps(
    {
        "decision_id": "ab" * 30,
        "policy": "cartpole",
        "assigned_version": "v2",
        "version": "v2",
        "role": "champion",
        "generation": 1,
        "action": 1,
        "action_name": "right",
        "propensity": 0.99,
        "propensity_reason": None,
        "explored": False,
        "exploration": {"epsilon": 0.02, "left": None, "later": 1},
        "safety": {"overridden": False, "proposed": "right", "rules": []},
        "fallback": None,
        "logged": True,
        "field_of_a_newer_service": 1,
    }
)
RECEIPT = json.dumps({"decision_id": "ab" * 30, "reward_id": None, "status": "joined", "duplicate": True})
SOON = {"retry_for_s": 20.0, "timeout_s": 5.0}


def problem(code: str, status: int, **more: Any) -> str:
    return json.dumps({"type": "urn:x", "title": "No", "status": status, "code": code, "detail": "why", **more})


FULL = answer(503, problem("ledger_full", 503), retry_after="0")
LOST = [pytest.param(each, id=each.__name__) for each in (lose, reset, tear)]
both = pytest.mark.parametrize("kind", KINDS)


def refusing_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
    return port


@both
def test_a_connection_refused_is_tried_again_until_the_deadline_and_nothing_has_been_received(kind: str) -> None:
    client = KINDS[kind](f"http://127.0.0.1:{refusing_port()}", retry_for_s=0.2)
    with client, pytest.raises(Unreachable, match="POST /v1/act") as caught:
        client.act([0.0])
    assert not caught.value.maybe_received


@both
@pytest.mark.parametrize("lost", LOST)
def test_an_act_whose_answer_was_lost_is_not_sent_again(kind: str, lost: Behaviour) -> None:
    with OddServer(lost, answer(200, DECISION)) as server, KINDS[kind](server.url, **SOON) as client:
        with pytest.raises(Unreachable) as caught:
            client.act([0.0], episode="e", step=3)
        assert caught.value.maybe_received
        assert len(server.requests) == 1


@both
@pytest.mark.parametrize("lost", LOST)
def test_an_idempotent_act_is_sent_again_with_the_same_key(kind: str, lost: Behaviour) -> None:
    with OddServer(lost, lost, answer(200, DECISION)) as server, KINDS[kind](server.url, idempotent=True) as client:
        assert client.act([0.0]).action == 1
        first, second, third = server.header("idempotency-key")
        assert first == second == third
        assert first is not None
        assert len(set(server.bodies)) == 1


@both
def test_each_idempotent_act_has_its_own_key_and_the_callers_key_wins(kind: str) -> None:
    behaviours = [answer(200, DECISION)] * 3
    with OddServer(*behaviours) as server, KINDS[kind](server.url, idempotent=True) as client:
        client.act([0.0])
        client.act([0.0])
        client.act([0.0], idempotency_key="mine")
        one, other, mine = server.header("idempotency-key")
        assert len({one, other, mine}) == 3
        assert mine == "mine"


@both
def test_an_act_without_a_key_sends_none(kind: str) -> None:
    with OddServer(answer(200, DECISION)) as server, KINDS[kind](server.url) as client:
        client.act([0.0])
        assert server.header("idempotency-key") == [None]


@both
def test_an_act_with_the_callers_key_is_sent_again(kind: str) -> None:
    with OddServer(lose, answer(200, DECISION)) as server, KINDS[kind](server.url, **SOON) as client:
        client.act([0.0], idempotency_key="mine")
        assert server.header("idempotency-key") == ["mine", "mine"]


@both
@pytest.mark.parametrize("lost", LOST)
def test_a_reward_is_sent_again_byte_by_byte_after_anything(kind: str, lost: Behaviour) -> None:
    bad_gateway = answer(502, "<html>")
    with OddServer(lost, FULL, bad_gateway, answer(202, RECEIPT)) as server, KINDS[kind](server.url, **SOON) as client:
        receipt = client.reward("ab" * 30, 1.5, reward_id="r", terminated=True)
        assert (receipt.status, receipt.duplicate) == ("joined", True)
        assert len(server.requests) == 4
        assert len(set(server.bodies)) == 1


@both
def test_a_silent_service_is_a_lost_answer(kind: str) -> None:
    with OddServer() as server, KINDS[kind](server.url, timeout_s=0.2, retry_for_s=30.0) as client:
        with pytest.raises(Unreachable, match="ReadTimeout") as caught:
            client.act([0.0])
        assert caught.value.maybe_received


@both
def test_an_act_is_sent_again_when_the_service_says_that_it_kept_nothing(kind: str) -> None:
    with OddServer(FULL, FULL, answer(200, DECISION)) as server, KINDS[kind](server.url, **SOON) as client:
        assert client.act([0.0]).version == "v2"
        assert len(server.requests) == 3


@both
@pytest.mark.parametrize(
    "behaviour",
    [answer(503, "upstream reset", retry_after="0"), answer(503, problem("ledger_full", 503)), answer(504, "slow")],
    ids=["a proxy's 503", "no Retry-After", "a proxy's 504"],
)
def test_a_gateways_error_is_no_promise_so_an_act_is_not_sent_again(kind: str, behaviour: Behaviour) -> None:
    with OddServer(behaviour, answer(200, DECISION)) as server, KINDS[kind](server.url, **SOON) as client:
        with pytest.raises(ApiError):
            client.act([0.0])
        assert len(server.requests) == 1


@both
def test_a_key_in_use_is_waited_for(kind: str) -> None:
    busy = answer(409, problem("idempotency_key_in_use", 409), retry_after="0")
    with OddServer(busy, answer(200, DECISION)) as server, KINDS[kind](server.url, idempotent=True) as client:
        assert client.act([0.0]).action == 1
        assert len(server.requests) == 2


@both
def test_what_the_service_asks_to_wait_counts_against_the_deadline(kind: str) -> None:
    late = answer(503, problem("not_ready", 503), retry_after="3600")
    with OddServer(late, answer(200, DECISION)) as server, KINDS[kind](server.url, **SOON) as client:
        with pytest.raises(Unavailable) as caught:
            client.act([0.0])
        assert (caught.value.code, caught.value.retry_after_s) == ("not_ready", 3600)
        assert len(server.requests) == 1


@both
def test_with_no_time_to_retry_there_is_one_attempt(kind: str) -> None:
    with OddServer(FULL, answer(202, RECEIPT)) as server, KINDS[kind](server.url, retry_for_s=0) as client:
        with pytest.raises(Unavailable):
            client.reward("ab" * 30, 1.0)
        assert len(server.requests) == 1


@both
@pytest.mark.parametrize("status", [400, 404, 409, 422, 500])
def test_a_refusal_stands(kind: str, status: int) -> None:
    with OddServer(answer(status, problem("x", status)), answer(202, RECEIPT)) as server:
        with KINDS[kind](server.url, **SOON) as client, pytest.raises(ApiError) as caught:
            client.reward("ab" * 30, 1.0)
        assert (caught.value.code, caught.value.status) == ("x", status)
        assert len(server.requests) == 1


@both
def test_an_error_names_its_fields(kind: str) -> None:
    body = problem("reward_conflict", 409, errors=[{"field": "reward", "detail": "another stands", "new": 1}])
    with OddServer(answer(409, body)) as server, KINDS[kind](server.url) as client:
        with pytest.raises(RewardConflict, match=r"why \[reward\] \(reward: another stands\)") as caught:
            client.reward("ab" * 30, 1.0)
        assert caught.value.errors[0].field == "reward"


@both
def test_an_answer_of_another_world_is_unreadable(kind: str) -> None:
    with OddServer(answer(200, "<html>"), answer(200, '{"action": 1}')) as server, KINDS[kind](server.url) as client:
        for _ in range(2):
            with pytest.raises(Unreadable):
                client.act([0.0])


@both
def test_ready_asks_once_and_never_raises(kind: str) -> None:
    with OddServer(answer(200), answer(503, "{}", retry_after="0"), lose) as server, KINDS[kind](server.url) as client:
        assert [client.ready() for _ in range(3)] == [True, False, False]
    with KINDS[kind](f"http://127.0.0.1:{refusing_port()}") as client:
        assert client.ready() is False


@both
def test_the_token_is_sent_and_a_wrong_one_is_named(kind: str) -> None:
    refused = answer(401, problem("unauthorized", 401))
    with OddServer(answer(200, DECISION), refused) as server, KINDS[kind](server.url, token="secret") as client:
        client.act([0.0])
        with pytest.raises(ApiError) as caught:
            client.act([0.0])
        assert type(caught.value).__name__ == "Unauthorized"
        assert server.header("authorization") == ["bearer secret"] * 2


def test_keyinuse_is_raised_when_it_does_not_end() -> None:
    busy = answer(409, problem("idempotency_key_in_use", 409), retry_after="60")
    with OddServer(busy) as server, KINDS["sync"](server.url, **SOON) as client, pytest.raises(KeyInUse):
        client.act([0.0], idempotency_key="mine")


@pytest.mark.parametrize("options", [{"timeout_s": 0}, {"retry_for_s": -1}])
def test_options_that_make_no_sense_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="timeout_s must be positive"):
        KINDS["sync"]("http://x", **options)


def test_an_address_that_is_none_is_refused() -> None:
    with pytest.raises(ValueError, match="base_url must begin with http"):
        KINDS["sync"]("localhost:8080")
