"""Answers for every kind of action, encoded by the service's own codec and read by the client's."""

from __future__ import annotations

import math
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from service import wire
from surefoot import Unreadable, answers
from tests.surefoot.callers import KINDS
from tests.surefoot.odd_server import OddServer, answer

ACTED = wire.ActResponse(
    decision_id="d",
    policy="p",
    assigned_version="v1",
    version="v1",
    role="champion",
    generation=1,
    action=1,
    action_name="right",
    propensity=0.9,
    propensity_reason=None,
    explored=False,
    exploration=wire.Exploration(0.1),
    safety=wire.Safety(False, "right", ()),
    fallback=None,
    logged=True,
)
POINT = msgspec.structs.replace(
    ACTED,
    action=[0.5, -1.0],
    action_name=None,
    propensity=None,
    safety=wire.Safety(True, [0.5, -2.0], ("request",)),
    propensity_kind="mixed",
    log_propensity=-1.75,
    state_reset=True,
    distribution=wire.PointDistribution([0.5, -2.0], [1.0, 1.0], [-1.0, -1.0], [None, 1.0], 0.1, [0.1, 0.1]),
)
FINITE = st.floats(allow_nan=False, allow_infinity=False)


def read(response: wire.ActResponse) -> answers.Decision:
    return answers.read_decision(wire.encode(response))


def test_an_index_is_an_index() -> None:
    decision = read(ACTED)
    assert (decision.action, decision.action_name, decision.safety.proposed) == (1, "right", "right")
    assert (decision.propensity_kind, decision.log_propensity, decision.state_reset) == ("mass", None, False)


def test_factors_are_lists() -> None:
    changes: dict[str, Any] = {"action": [2, 0], "action_name": ["far", "off"]}
    safety = wire.Safety(False, ["far", "off"], ())
    rows: list[float | list[float]] = [[0.25, 0.0, 0.75], [1.0, 0.0]]
    decision = read(msgspec.structs.replace(ACTED, **changes, safety=safety, distribution=rows, values=[0.5] * 5))
    assert (decision.action, decision.action_name, decision.safety.proposed) == ([2, 0], ["far", "off"], ["far", "off"])
    assert decision.distribution == ((0.25, 0.0, 0.75), (1.0, 0.0))
    assert decision.values == (0.5,) * 5


def test_a_point_says_its_density_and_its_box() -> None:
    decision = read(POINT)
    assert (decision.action, decision.action_name, decision.safety.proposed) == ([0.5, -1.0], None, [0.5, -2.0])
    assert (decision.propensity, decision.propensity_reason) == (None, None)
    assert (decision.propensity_kind, decision.log_propensity, decision.state_reset) == ("mixed", -1.75, True)
    drawn = decision.distribution
    assert isinstance(drawn, answers.PointDistribution)
    assert (drawn.low, drawn.high, drawn.sigma) == ((-1.0, -1.0), (None, 1.0), (0.1, 0.1))


@given(st.lists(FINITE, min_size=1, max_size=5))
def test_coordinates_arrive_bit_for_bit(action: list[float]) -> None:
    decision = read(msgspec.structs.replace(POINT, action=action))
    assert np.array(decision.action, np.float64).tobytes() == np.array(action).tobytes()


@pytest.mark.parametrize(
    "changes",
    [
        {"action": "right"},
        {"action": None},
        {"action": [[1]]},
        {"action_name": 3},
        {"propensity_kind": "guess"},
        {"distribution": {"mean": [0.0]}},
        {"safety": {"proposed": {}}},
    ],
    ids=str,
)
def test_an_answer_of_another_shape_cannot_be_read(changes: dict[str, Any]) -> None:
    body = msgspec.json.decode(wire.encode(ACTED)) | changes
    with pytest.raises(Unreadable):
        answers.read_decision(msgspec.json.encode(body))


def batch(rows: list[wire.ActResponse | None]) -> wire.ActBatchResponse:
    """Columns as the service makes them: null where a row could not be decided."""

    def column(name: str) -> list[Any]:
        return [None if row is None else getattr(row, name) for row in rows]

    refused = [number for number, row in enumerate(rows) if row is None]
    names = set(wire.ActBatchResponse.__struct_fields__) & set(wire.ActResponse.__struct_fields__)
    return wire.ActBatchResponse(
        **{name: column(name) for name in names - {"policy", "generation"}},
        policy="p",
        generation=1,
        epsilon=[None if row is None else row.exploration.epsilon for row in rows],
        overridden=[None if row is None else row.safety.overridden for row in rows],
        errors=[
            wire.Problem("about:blank", "No safe action", 409, "no_safe_action", "nothing is allowed", row=row)
            for row in refused
        ],
    )


def read_batch(*rows: wire.ActResponse | None) -> answers.BatchDecisions:
    return answers.read_batch(wire.encode(batch(list(rows))))


def test_columns_of_indices() -> None:
    decisions = read_batch(ACTED, None)
    assert decisions.actions.dtype == np.int64
    assert (decisions.actions.tolist(), decisions.action_names.tolist()) == ([1, -1], ["right", ""])
    np.testing.assert_array_equal(decisions.log_propensities, [math.log(0.9), math.nan])
    assert decisions.propensity_kinds.tolist() == ["mass", ""]
    assert decisions.state_resets.tolist() == [False, False]
    assert decisions.errors[1].code == "no_safe_action"


@pytest.mark.parametrize("first", [0, 1], ids=["refused first", "refused last"])
def test_columns_of_factors(first: int) -> None:
    row = msgspec.structs.replace(ACTED, action=[2, 0], action_name=["far", "off"])
    decisions = read_batch(*([None, row] if first == 0 else [row, None]))
    assert decisions.actions.dtype == np.int64
    assert decisions.actions[1 - first].tolist() == [2, 0]
    assert decisions.actions[first].tolist() == [-1, -1]
    assert decisions.action_names[1 - first].tolist() == ["far", "off"]
    assert decisions.action_names[first].tolist() == ["", ""]


@pytest.mark.parametrize("first", [0, 1], ids=["refused first", "refused last"])
def test_columns_of_points(first: int) -> None:
    decisions = read_batch(*([None, POINT] if first == 0 else [POINT, None]))
    assert decisions.actions.dtype == np.float64
    np.testing.assert_array_equal(decisions.actions[1 - first], [0.5, -1.0])
    assert np.isnan(decisions.actions[first]).all()
    assert decisions.action_names.tolist() == ["", ""]
    assert np.isnan(decisions.propensities).all()
    assert decisions.log_propensities[1 - first] == -1.75
    assert decisions.propensity_kinds[1 - first] == "mixed"
    assert decisions.state_resets[1 - first]


def test_whole_points_stay_points() -> None:
    decisions = read_batch(msgspec.structs.replace(POINT, action=[1.0, 0.0]))
    assert decisions.actions.dtype == np.float64


def test_a_batch_of_which_nothing_was_decided() -> None:
    decisions = read_batch(None, None)
    assert decisions.actions.tolist() == [-1, -1]
    assert len(decisions.errors) == 2


def test_a_service_that_knows_only_indices_is_read() -> None:
    body = msgspec.json.decode(wire.encode(batch([ACTED, None])))
    for name in ("propensity_kind", "log_propensity", "state_reset"):
        del body[name]
    decisions = answers.read_batch(msgspec.json.encode(body))
    assert decisions.propensity_kinds.tolist() == ["mass", ""]
    np.testing.assert_array_equal(decisions.log_propensities, [math.log(0.9), math.nan])


@pytest.mark.parametrize(
    "column",
    [{"action": [[0.5], [0.5, 1.0]]}, {"action": [1, [0.5]]}, {"action": ["left", 1]}, {"action_name": []}],
    ids=str,
)
def test_ragged_columns_cannot_be_read(column: dict[str, Any]) -> None:
    body = msgspec.json.decode(wire.encode(batch([POINT, POINT]))) | column
    with pytest.raises(Unreadable):
        answers.read_batch(msgspec.json.encode(body))


@pytest.mark.parametrize("kind", KINDS)
def test_a_point_goes_out_and_comes_back_over_a_socket(kind: str) -> None:
    receipt = wire.RewardResponse("d", None, "joined")
    columns = wire.encode(batch([POINT]))
    replies = [wire.encode(POINT).decode(), columns.decode(), wire.encode(receipt).decode()]
    with OddServer(*(answer(200, reply) for reply in replies)) as server, KINDS[kind](server.url) as client:
        low = np.array([-math.inf, 0.0], np.float32)
        decision = client.act(np.zeros(2), allowed_actions={"low": low, "high": [None, 1.0]})
        decisions = client.act_batch(np.zeros((1, 2)), allowed_actions=[{"low": low}])
        client.reward(decision.decision_id, 1.0, executed_action=np.array(decision.action))
        sent = [msgspec.json.decode(body) for body in server.bodies]
    assert decisions.actions.tolist() == [decision.action]
    assert sent[0]["allowed_actions"] == {"low": [None, 0.0], "high": [None, 1.0]}
    assert sent[1]["allowed_actions"] == [{"low": [None, 0.0]}]
    assert sent[2]["executed_action"] == [0.5, -1.0]
