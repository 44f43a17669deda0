"""What is sent for what the caller gave, without a socket."""

from __future__ import annotations

import json
import math
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from surefoot import InvalidField, NotFinite
from surefoot import _protocol as protocol
from surefoot._protocol import Attempts, Failure
from surefoot.backoff import Backoff
from surefoot.errors import Unreachable


def body(call: protocol.Call[Any]) -> Any:
    return json.loads(call.body)


@pytest.mark.parametrize(
    "state",
    [
        [1, 2.5],
        (np.float32(1.0), np.float64(2.5)),
        np.array([1.0, 2.5], np.float32),
        np.array([1.0, 2.5], np.float16),
        np.array([1.0, 2.5], object),
    ],
    ids=["list", "scalars", "float32", "float16", "object"],
)
def test_states_of_any_kind_become_lists(state: Any) -> None:
    assert body(protocol.act(state))["state"] == [1.0, 2.5]


def test_a_tensor_like_object_is_read_as_an_array() -> None:
    class Tensor:
        def __array__(self, dtype: object = None, copy: object = None) -> Any:
            return np.array([[1.0], [2.0]])

    assert body(protocol.act(Tensor()))["state"] == [[1.0], [2.0]]


def test_a_state_by_name_keeps_its_names() -> None:
    assert body(protocol.act({"cpu": np.float64(0.5), "n": np.int64(3)}))["state"] == {"cpu": 0.5, "n": 3}


@given(st.floats(width=32, allow_nan=False, allow_infinity=False))
def test_a_float32_arrives_as_the_same_float32(value: float) -> None:
    sent = body(protocol.act(np.array([value], np.float32)))["state"][0]
    assert np.float32(sent).tobytes() == np.float32(value).tobytes()


@pytest.mark.parametrize(
    ("call", "field"),
    [
        (lambda: protocol.act([0.0, math.nan]), "state[1]"),
        (lambda: protocol.act(np.array([[0.0, 1.0], [math.inf, 0.0]], np.float32)), "state[1][0]"),
        (lambda: protocol.act({"cpu": -math.inf}), "state.cpu"),
        (lambda: protocol.act({"cpu": np.float32("nan")}), "state.cpu"),
        (lambda: protocol.act([0.0], context={"hour": math.nan}), "context.hour"),
        (lambda: protocol.act_batch(np.array([[0.0], [math.nan]])), "states[1][0]"),
        (lambda: protocol.act([0.0], allowed_actions={"low": [0.0, math.nan]}), "allowed_actions.low[1]"),
        (lambda: protocol.act([0.0], allowed_actions={"low": np.array([math.inf])}), "allowed_actions.low[0]"),
        (lambda: protocol.act([0.0], allowed_actions={"high": (-math.inf,)}), "allowed_actions.high[0]"),
        (lambda: protocol.act_batch([[0.0]], allowed_actions=[{"high": [math.nan]}]), "allowed_actions[0].high[0]"),
        (lambda: protocol.reward("d", 1.0, executed_action=np.array([0.0, math.nan])), "executed_action[1]"),
        (lambda: protocol.reward("d", math.nan), "reward"),
        (lambda: protocol.reward("d", 1.0, next_state=[math.nan]), "next_state[0]"),
        (lambda: protocol.reward("d", 1.0, metrics={"ms": math.inf}), "metrics.ms"),
        (lambda: protocol.reward_batch([{"decision_id": "d", "reward": math.nan}]), "rewards[0].reward"),
    ],
)
def test_what_is_not_finite_is_refused_before_it_is_sent(call: Any, field: str) -> None:
    with pytest.raises(NotFinite, match="it was not sent") as caught:
        call()
    assert [each.field for each in caught.value.errors] == [field]
    assert caught.value.code == "not_finite"


@pytest.mark.parametrize(
    ("call", "field"),
    [
        (lambda: protocol.act({1, 2}), "state"),
        (lambda: protocol.act([object()]), "state[0]"),
        (lambda: protocol.act({1: 0.5}), "state"),
        (lambda: protocol.act(np.array([1j])), "state"),
        (lambda: protocol.act_batch([[0.0]], allowed_actions=cast(Any, {"low": [0.0]})), "allowed_actions"),
        (lambda: protocol.reward("d", True), "reward"),
        (lambda: protocol.reward("d", cast(Any, "1.0")), "reward"),
    ],
)
def test_what_json_cannot_carry_is_refused_and_named(call: Any, field: str) -> None:
    with pytest.raises(InvalidField) as caught:
        call()
    assert caught.value.errors[0].field == field


def test_only_what_was_given_is_sent() -> None:
    assert body(protocol.act([0.5])) == {"state": [0.5]}
    assert body(protocol.reward("d", 1)) == {"decision_id": "d", "reward": 1}
    assert body(protocol.act_batch([[0.5]])) == {"states": [[0.5]]}


def test_everything_that_was_given_is_sent() -> None:
    act = protocol.act(
        [0.5],
        policy="p",
        key="k",
        episode="e",
        step=np.int64(0),
        context={"hour": 1},
        allowed_actions=["hold", 2],
        explore=False,
        include=["values"],
    )
    given = {"policy": "p", "key": "k", "episode": "e", "step": 0, "context": {"hour": 1}}
    assert body(act) == {
        "state": [0.5], **given, "allowed_actions": ["hold", 2], "explore": False, "include": ["values"],
    }  # fmt: skip
    batch = protocol.act_batch(
        np.zeros((2, 1)), policy="p", keys=np.array(["a", "b"]), episodes=["e", None], steps=np.arange(2)
    )
    columns = {"keys": ["a", "b"], "episodes": ["e", None], "steps": [0, 1]}
    assert body(batch) == {"states": [[0.0], [0.0]], "policy": "p", **columns}
    flags = {"final": True, "terminated": np.True_, "truncated": True, "executed": False}
    reward = protocol.reward("d", np.float32(0.5), reward_id="r", next_state=[1], executed_action=np.int64(0), **flags)
    assert body(reward) == {
        "decision_id": "d", "reward": 0.5, "reward_id": "r", "next_state": [1], "executed_action": 0,
        "final": True, "terminated": True, "truncated": True, "executed": False,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("given", "sent"),
    [
        (["hold", 2], ["hold", 2]),
        (np.array([0, 2]), [0, 2]),
        ([["near", 2], None], [["near", 2], None]),
        ([np.array([0, 1]), None], [[0, 1], None]),
        ({"low": np.array([0.5, -math.inf], np.float32)}, {"low": [0.5, None]}),
        ({"low": [0, None], "high": (math.inf, 1)}, {"low": [0, None], "high": [None, 1]}),
        ({"low": None, "high": np.array([1, 2])}, {"low": None, "high": [1, 2]}),
        ({"high": [np.float32(math.inf), np.float32(0.5)]}, {"high": [None, 0.5]}),
        ({"lower": [0.5]}, {"lower": [0.5]}),  # the service will say that there is no such field
        ({"low": 0.5}, {"low": 0.5}),
    ],
    ids=str,
)
def test_what_is_allowed_is_sent_in_the_services_form(given: Any, sent: Any) -> None:
    assert body(protocol.act([0.5], allowed_actions=given))["allowed_actions"] == sent
    columns = protocol.act_batch([[0.5], [0.5]], allowed_actions=[given, None])
    assert body(columns)["allowed_actions"] == [sent, None]


@pytest.mark.parametrize(
    ("given", "sent"),
    [(np.int64(1), 1), (np.array([1, 0]), [1, 0]), (["far", 0], ["far", 0]), (np.array([0.5, -1.0]), [0.5, -1.0])],
    ids=str,
)
def test_an_executed_action_may_be_an_array(given: Any, sent: Any) -> None:
    assert body(protocol.reward("d", 1.0, executed_action=given))["executed_action"] == sent
    (item,) = body(protocol.reward_batch([{"decision_id": "d", "reward": 1.0, "executed_action": given}]))["rewards"]
    assert item["executed_action"] == sent


@given(st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=1, max_size=4))
def test_a_point_is_sent_back_bit_for_bit(point: list[float]) -> None:
    sent = body(protocol.reward("d", 1.0, executed_action=np.array(point)))["executed_action"]
    assert np.array(sent, np.float64).tobytes() == np.array(point).tobytes()


def test_an_id_is_quoted_in_a_path() -> None:
    assert protocol.decision("../admin?x").path == "/v1/decisions/..%2Fadmin%3Fx"


def test_what_may_have_been_received_once_stays_so() -> None:
    attempts = Attempts(protocol.reward("d", 1.0), Backoff(None, jitter=lambda: 0.5))
    assert attempts.wait_s(Failure(OSError("lost"), maybe_received=True), 0.0) is not None
    refused = Failure(OSError("refused"), maybe_received=False)
    assert attempts.wait_s(refused, 0.0) is not None
    with pytest.raises(Unreachable) as caught:
        attempts.result(refused)
    assert caught.value.maybe_received


def test_an_unknown_option_is_a_type_error() -> None:
    with pytest.raises(TypeError, match="polcy"):
        protocol.act([0.0], polcy="p")  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="rewrad"):
        protocol.reward_batch([{"decision_id": "d", "reward": 1.0, "rewrad": 2.0}])
