"""Both clients and a trainer against the real service: choices in factors, points, and a policy that remembers."""

from __future__ import annotations

import math
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from surefoot import Batch, InvalidField, MissingField, UnknownAction, log_prob, transitions
from tests.conftest import Server, new_server
from tests.policies.networks import bundle_files, linear
from tests.surefoot.callers import KINDS

GOLDEN = [[0.0, 1.0], [1.0, 0.0]]
FACTORS = [{"name": "speed", "names": ["slow", "mid", "fast"]}, {"name": "light", "names": ["off", "on"]}]
LEVELS = [[1.0, 0.0, 0.5, 0.0, 2.0], [0.0, 1.0, 0.5, 1.0, 0.0]]
VALVES = [[1.0, 0.0, 0.0, 0.0], [0.0, 1.0, 0.0, 0.0]]
LOG_STD = [-1.0, -0.5]
STATE = [1.0, 0.0]


def adder() -> onnx.ModelProto:
    """A recurrent network: it answers with the sum of all states of the episode."""
    rows = ["batch", 2]
    graph = helper.make_graph(
        [
            helper.make_node("Add", ["observation", "h"], ["q_values"]),
            helper.make_node("Identity", ["q_values"], ["h2"]),
        ],
        "adder",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, rows) for name in ("observation", "h")],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, rows) for name in ("q_values", "h2")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)


def write(folder: Path, policy: str, network: onnx.ModelProto, outputs: Any, **manifest: Any) -> None:
    version = folder / policy / "v1"
    version.mkdir(parents=True)
    for name, raw in bundle_files(network, GOLDEN, outputs, policy=policy, **manifest).items():
        (version / name).write_bytes(raw)
    (folder / policy / "deployment.yaml").write_text(f"schema: 1\npolicy: {policy}\nchampion: v1\nbaseline: v1\n")


@pytest.fixture(scope="module")
def spaces(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("spaces")
    golden = np.array(GOLDEN)
    multi = {"kind": "multi_discrete", "nvec": [3, 2], "factors": FACTORS}
    write(
        folder / "policies", "levels", linear(LEVELS), (golden @ LEVELS).tolist(), action=multi, fallback=["slow", "on"]
    )
    write(
        folder / "policies",
        "valves",
        linear(VALVES, [0.0, 0.0, *LOG_STD]),
        (golden @ VALVES + [0.0, 0.0, *LOG_STD]).tolist(),
        action={"kind": "continuous", "low": [-1.0, None], "high": [1.0, None]},
        head="gaussian",
        exploration={"epsilon": 0.0},
        fallback=[0.0, 0.0],
    )  # fmt: skip
    memory = {"states": [{"input": "h", "output": "h2", "shape": [2]}]}
    write(folder / "policies", "memory", adder(), GOLDEN, recurrent=memory, exploration={"epsilon": 0.0})
    server = new_server(folder / "server", policies=str(folder / "policies"))
    server.start()
    yield server
    server.stop()


@pytest.fixture(params=list(KINDS))
def client(request: pytest.FixtureRequest, spaces: Server) -> Iterator[Any]:
    with KINDS[request.param](spaces.url) as client:
        yield client


def name() -> str:
    return f"e-{uuid.uuid4().hex[:12]}"


def rows_of(server: Server, policy: str, ids: list[str]) -> Batch:
    """The one batch in which these decisions come."""
    options: dict[str, Any] = {"redis_url": server.redis_url, "block_s": 0.05, "max_wait_s": 20.0}
    with transitions(policy, name(), "c", **options, batch_size=1_000, auto_ack=False) as stream:
        for batch in stream:
            if set(ids) <= set(batch.ids):
                return batch
    raise AssertionError("the transitions did not come")


def test_factors(client: Any, spaces: Server) -> None:
    allowed = [["mid", 2], None]
    decision = client.act(STATE, policy="levels", allowed_actions=allowed, include=["distribution", "values"])
    rows = decision.distribution
    assert [len(row) for row in rows] == [3, 2]
    assert rows[0][0] == 0.0
    assert decision.action_name == [FACTORS[f]["names"][i] for f, i in enumerate(decision.action)]
    assert decision.safety.proposed == ["slow", "on"]
    np.testing.assert_allclose(decision.values, LEVELS[0])
    receipt = client.reward(decision.decision_id, 1.0, executed_action=np.array(decision.action))
    assert receipt.status == "joined"
    batch = rows_of(spaces, "levels", [decision.decision_id])
    (i,) = np.flatnonzero(batch.ids == decision.decision_id)
    assert batch.actions[i].tolist() == decision.action
    assert batch.masks[i].tolist() == [False, True, True, True, True]
    np.testing.assert_array_equal(batch.behaviour[i], [*rows[0], *rows[1]])
    assert batch.join_states[i] == "joined"
    assert batch.log_propensities[i] == pytest.approx(math.log(decision.propensity))


def test_points(client: Any, spaces: Server) -> None:
    low, high = np.array([-0.5, -math.inf], np.float32), np.array([0.25, 0.5])
    decision = client.act(STATE, policy="valves", allowed_actions={"low": low, "high": high}, include=["distribution"])
    assert decision.action_name is None
    assert -0.5 <= decision.action[0] <= 0.25
    assert (decision.distribution.low, decision.distribution.high) == ((-0.5, None), (0.25, 0.5))
    assert (decision.propensity_kind == "mass") == (decision.propensity is not None)
    assert client.reward(decision.decision_id, 1.0, executed_action=np.array(decision.action)).status == "joined"
    other = client.act(STATE, policy="valves")
    client.reward(other.decision_id, 1.0, executed_action=np.array(other.action, np.float32))
    batch = rows_of(spaces, "valves", [decision.decision_id, other.decision_id])
    i, j = (int(np.flatnonzero(batch.ids == each.decision_id)[0]) for each in (decision, other))
    assert batch.actions[i].tobytes() == np.array(decision.action).tobytes()
    assert batch.log_propensities[i] == decision.log_propensity
    np.testing.assert_array_equal(batch.boxes[i], [[-0.5, -math.inf], [0.25, 0.5]])
    assert batch.join_states[[i, j]].tolist() == ["joined", "void"]  # a point that went through float32 is another
    logs = log_prob(batch, np.array(STATE), np.exp(np.array(LOG_STD, np.float32).astype(float)))
    np.testing.assert_allclose(logs[[i, j]], batch.log_propensities[[i, j]], rtol=0, atol=1e-9)


def test_points_in_columns(client: Any) -> None:
    box = {"low": np.array([0.125, 2.0]), "high": np.array([0.125, 2.0])}
    decisions = client.act_batch(
        np.array([STATE] * 3), policy="valves", allowed_actions=[None, box, {"high": [0.0, None]}]
    )
    assert decisions.actions.dtype == np.float64
    assert decisions.actions[1].tolist() == [0.125, 2.0]
    assert (decisions.propensities[1], decisions.log_propensities[1]) == (1.0, 0.0)
    assert decisions.propensity_kinds[1] == "mass"
    assert decisions.actions[2, 0] <= 0.0


def test_factors_in_columns(client: Any) -> None:
    decisions = client.act_batch([STATE] * 2, policy="levels", allowed_actions=[[["fast"], ["off"]], None])
    assert decisions.actions[0].tolist() == [2, 0]
    assert decisions.action_names[0].tolist() == ["fast", "off"]
    assert decisions.propensities[0] == 1.0


@pytest.mark.parametrize(
    ("policy", "allowed", "error", "field"),
    [
        ("levels", ["slow"], InvalidField, "allowed_actions"),
        ("levels", [["slow"], ["dim"]], UnknownAction, "allowed_actions[1][0]"),
        ("levels", {"low": [0.0, 0.0]}, InvalidField, "allowed_actions"),
        ("valves", [0, 1], InvalidField, "allowed_actions"),
        ("valves", {"low": np.zeros(3)}, InvalidField, "allowed_actions.low"),
    ],
)
def test_what_does_not_fit_the_space_is_refused(
    client: Any, policy: str, allowed: Any, error: type[Exception], field: str
) -> None:
    with pytest.raises(error) as caught:
        client.act(STATE, policy=policy, allowed_actions=allowed)
    assert [each.field for each in caught.value.errors] == [field]  # type: ignore[attr-defined]


def test_an_episode_is_remembered_step_by_step(client: Any, spaces: Server) -> None:
    episode = name()
    for step, known in ((0, [1.0, 0.0]), (1, [2.0, 0.0]), (1, [2.0, 0.0]), (2, [3.0, 0.0])):  # one answer was lost
        decision = client.act(STATE, policy="memory", episode=episode, step=step, include=["values"])
        assert (list(decision.values), decision.state_reset) == (known, False)
    lost = client.act(STATE, policy="memory", episode=episode, step=7, include=["values"])
    assert (list(lost.values), lost.state_reset) == ([1.0, 0.0], True)
    client.reward(lost.decision_id, 1.0, terminated=True)
    assert client.act(STATE, policy="memory", episode=episode, step=8).state_reset  # forgotten with its end
    batch = rows_of(spaces, "memory", [lost.decision_id])
    assert batch.state_resets[batch.ids == lost.decision_id].tolist() == [True]


def test_an_episode_in_a_batch_takes_its_steps_in_order(client: Any) -> None:
    episode = name()
    decisions = client.act_batch([STATE, STATE], policy="memory", episodes=[episode] * 2, steps=np.arange(2))
    assert not decisions.state_resets.any()
    after = client.act(STATE, policy="memory", episode=episode, step=2, include=["values"])
    assert list(after.values) == [3.0, 0.0]


def test_memory_needs_an_episode(client: Any) -> None:
    with pytest.raises(MissingField) as caught:
        client.act(STATE, policy="memory")
    assert [each.field for each in caught.value.errors] == ["episode"]
