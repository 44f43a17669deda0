"""Both clients against the real service with its bundled CartPole policy."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from surefoot import (
    InvalidField,
    KeyReused,
    MissingField,
    NotFinite,
    RewardConflict,
    UnknownAction,
    UnknownDecision,
    UnknownField,
    UnknownPolicy,
    transitions,
)
from tests.conftest import Server, new_server
from tests.surefoot.callers import KINDS

STATE = [0.01, -0.02, 0.03, 0.04]
NAMED = dict(zip(["cart_position", "cart_velocity", "pole_angle", "pole_angular_velocity"], STATE, strict=True))
WINDOW_S = 20.0


@pytest.fixture(params=list(KINDS))
def client(request: pytest.FixtureRequest, server: Server) -> Iterator[Any]:
    with KINDS[request.param](server.url) as client:
        yield client


def episode_name() -> str:
    return f"e-{uuid.uuid4().hex[:12]}"


def test_the_service_is_ready(client: Any) -> None:
    assert client.ready() is True


@pytest.mark.parametrize("state", [STATE, NAMED, np.array(STATE, np.float32)], ids=["list", "names", "array"])
def test_an_act_is_answered_with_a_whole_decision(client: Any, state: Any) -> None:
    decision = client.act(state, policy="cartpole", key="user", include=["values", "distribution"])
    assert decision.policy == "cartpole"
    assert decision.action_name == ["left", "right"][decision.action]
    assert len(decision.values) == 2
    assert decision.propensity == decision.distribution[decision.action]
    assert sum(decision.distribution) == pytest.approx(1.0)
    assert decision.exploration.epsilon == 0.02
    assert (decision.fallback, decision.logged, decision.safety.overridden) == (None, True, False)


def test_allowed_actions_and_explore_are_obeyed(client: Any) -> None:
    decision = client.act(STATE, allowed_actions=["right"], explore=False)
    assert (decision.action_name, decision.propensity, decision.exploration.epsilon) == ("right", 1.0, 0.0)


def test_a_batch_is_answered_in_columns(client: Any) -> None:
    states = np.tile(np.array(STATE, np.float32), (3, 1))
    only = [["left"], None, ["right"]]
    batch = client.act_batch(states, policy="cartpole", keys=["a", None, "b"], allowed_actions=only)
    assert len(batch) == 3
    assert (batch.action_names[0], batch.action_names[2]) == ("left", "right")
    assert batch.propensities[[0, 2]].tolist() == [1.0, 1.0]
    assert len(set(batch.decision_ids)) == 3
    assert batch.logged.all()
    assert not batch.errors


@pytest.mark.parametrize(
    ("arguments", "options", "error", "field"),
    [
        ([STATE], {"policy": "nobody"}, UnknownPolicy, "policy"),
        ([STATE[:3]], {}, InvalidField, "state"),
        ([NAMED | {"cart_mass": 1.0}], {}, UnknownField, "state.cart_mass"),
        ([{"cart_position": 0.0}], {}, MissingField, "state.cart_velocity"),
        ([[1e300, 0.0, 0.0, 0.0]], {}, NotFinite, None),
        ([STATE], {"allowed_actions": ["up"]}, UnknownAction, "allowed_actions[0]"),
    ],
)
def test_what_the_service_refuses_is_raised_by_its_name(
    client: Any, arguments: list[Any], options: dict[str, Any], error: type[Exception], field: str | None
) -> None:
    with pytest.raises(error) as caught:
        client.act(*arguments, **options)
    named = [each.field for each in caught.value.errors]  # type: ignore[attr-defined]
    assert type(caught.value) is error
    assert field is None or named == [field]


def test_a_reward_is_joined_once_and_another_conflicts(client: Any) -> None:
    decision = client.act(STATE)
    first = client.reward(decision.decision_id, 1.0, metrics={"latency_ms": 12.5})
    again = client.reward(decision.decision_id, np.float32(1.0), metrics={"latency_ms": 12.5})
    assert (first.status, first.duplicate) == ("joined", False)
    assert again.duplicate
    with pytest.raises(RewardConflict):
        client.reward(decision.decision_id, 2.0)


def test_rewards_come_together_too(client: Any) -> None:
    decisions = client.act_batch([STATE, STATE])
    rewards = [{"decision_id": each, "reward": 0.5, "terminated": True} for each in decisions.decision_ids]
    receipts = client.reward_batch(rewards)
    assert [each.decision_id for each in receipts] == decisions.decision_ids.tolist()
    assert {each.status for each in receipts} == {"joined"}


def test_a_forged_id_is_unknown(client: Any) -> None:
    decision = client.act(STATE)
    forged = decision.decision_id[:-1] + ("0" if decision.decision_id[-1] != "0" else "1")
    with pytest.raises(UnknownDecision):
        client.reward(forged, 1.0)
    with pytest.raises(UnknownDecision):
        client.decision(forged)


def test_a_decision_can_be_read_back(client: Any) -> None:
    decision = client.act(STATE, key="user")
    client.reward(decision.decision_id, 1.0)
    record = client.decision(decision.decision_id)
    assert record["decision_id"] == decision.decision_id
    assert record["state"] == np.array(STATE, np.float32).astype(float).tolist()
    assert (record["key"], record["version"]) == ("user", decision.version)


def test_a_repeated_key_gets_the_same_decision(client: Any) -> None:
    key = uuid.uuid4().hex
    first, again = (client.act(STATE, idempotency_key=key) for _ in range(2))
    assert first.decision_id == again.decision_id
    with pytest.raises(KeyReused):
        client.act(STATE, idempotency_key=key, explore=False)


def test_an_episode_arrives_as_its_transitions(client: Any, server: Server) -> None:
    group, episode = f"g-{uuid.uuid4().hex[:8]}", episode_name()
    options: dict[str, Any] = {"redis_url": server.redis_url, "block_s": 0.05, "max_wait_s": WINDOW_S, "start": "$"}
    with transitions("cartpole", group, "c", batch_size=5, **(options | {"max_wait_s": 0.0})) as stream:
        assert next(stream, None) is None  # the group begins here
    rng = np.random.default_rng(5)
    states = rng.uniform(-0.05, 0.05, (6, 4)).astype(np.float32)
    decisions = []
    for step, state in enumerate(states[:5]):
        decisions.append(client.act(state, episode=episode, step=step, key="user"))
        last = step == 4
        client.reward(decisions[-1].decision_id, step + 0.1, truncated=last, next_state=states[5] if last else None)
    rows = collect(server, group, episode, 5, options)
    assert [row["step"] for row in rows] == list(range(5))
    assert [row["id"] for row in rows] == [each.decision_id for each in decisions]
    assert [row["reward"] for row in rows] == [step + 0.1 for step in range(5)]
    assert [row["propensity"] for row in rows] == [each.propensity for each in decisions]
    np.testing.assert_array_equal([row["state"] for row in rows], states[:5])
    np.testing.assert_array_equal([row["next_state"] for row in rows], states[1:])
    assert [row["end"] for row in rows] == ["none"] * 4 + ["truncated"]
    assert [row["truncated"] for row in rows] == [False] * 4 + [True]
    assert all(row["bootstrap"] for row in rows)


def collect(server: Server, group: str, episode: str, count: int, options: dict[str, Any]) -> list[dict[str, Any]]:
    """Read an episode's transitions as a trainer does, in the order of their steps."""
    rows: list[dict[str, Any]] = []
    columns = {
        "id": "ids", "step": "steps", "reward": "rewards", "propensity": "propensities", "state": "states",
        "next_state": "next_states", "end": "ends", "truncated": "truncated", "bootstrap": "bootstrap",
    }  # fmt: skip
    with transitions("cartpole", group, "c", **options) as stream:
        for batch in stream:
            mine = np.flatnonzero(batch.episodes == episode)
            rows += [{name: getattr(batch, column)[i] for name, column in columns.items()} for i in mine]
            if len(rows) >= count:
                batch.ack()
                break
    return sorted(rows, key=lambda row: row["step"])


@pytest.mark.parametrize("kind", KINDS)
def test_an_idempotent_client_rides_through_a_killed_service(kind: str, tmp_path: Path) -> None:
    service = new_server(tmp_path)
    service.start()
    try:
        with KINDS[kind](service.url, idempotent=True, retry_for_s=60.0) as client:
            before = client.act(STATE, episode="e", step=0)
            service.kill()
            restart = threading.Thread(target=service.start)
            restart.start()
            after = client.act(STATE, episode="e", step=1)
            assert client.reward(before.decision_id, 1.0).decision_id == before.decision_id
            assert client.reward(after.decision_id, 1.0, terminated=True).decision_id == after.decision_id
            restart.join()
    finally:
        service.stop()
    assert before.decision_id != after.decision_id
