"""What a reward request becomes: the number that is learnt from, what is recorded of it, and what is refused."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from policies.errors import BadJson, InvalidField, MissingField, NotFinite
from policies.types import Choices, ObservationSpec
from service.decision import RewardFlags, decode_reward_record
from service.reward_events import Rewarded, episode_event, reward_event
from service.scalar import Scalar
from service.states import StateReader
from service.wire import RewardRequest, decode_reward

OBSERVATION = ObservationSpec(shape=(2,), dtype="float32")
TRACE = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


def rewarded(expression: str | None = None) -> Rewarded:
    scalar = None if expression is None else Scalar.read(expression)
    action = Choices((("a", "b", "c"),))
    return Rewarded("toy", OBSERVATION, action, StateReader(OBSERVATION), 5_000, scalar=scalar)


def request(**fields: Any) -> RewardRequest:
    return decode_reward(msgspec.json.encode(fields))


def test_a_decisions_reward() -> None:
    event = reward_event(
        request(decision_id="d", reward=1, reward_id="r", executed_action="b", next_state=[1, 2], final=True),
        rewarded(), 1_000, TRACE,
    )  # fmt: skip
    assert (event.id, event.reward_id, event.reward, event.at_ms, event.until_ms) == ("d", "r", "1.0", 1_000, 6_000)
    assert (event.executed_action, event.next_state) == ("1", b"\0\0\x80?\0\0\0@")
    assert event.flags == RewardFlags.FINAL
    record = decode_reward_record(event.record)
    assert (record.metrics, record.traceparent, record.sent) == (None, TRACE, None)


@pytest.mark.parametrize(
    ("said", "flags"),
    [
        ({"terminated": True}, RewardFlags.TERMINATED),
        ({"truncated": True}, RewardFlags.TRUNCATED),
        ({"executed": False}, RewardFlags.NOT_EXECUTED),
        ({}, RewardFlags.NONE),
    ],
)
def test_what_is_said_besides(said: dict[str, bool], flags: RewardFlags) -> None:
    assert reward_event(request(decision_id="d", reward=1, **said), rewarded(), 0, None).flags == flags


def test_a_next_state_whose_text_is_not_utf_8_is_refused() -> None:
    sent = decode_reward(b'{"decision_id": "d", "reward": 1, "next_state": {"\xff": 1}}')
    with pytest.raises(BadJson) as caught:
        reward_event(sent, rewarded(), 0, None)
    assert caught.value.field == "next_state"


def test_what_was_sent_is_recorded_beside_what_was_made_of_it() -> None:
    event = reward_event(
        request(decision_id="d", reward=2, metrics={"a": 3}), rewarded("reward * metrics.a"), 0, None
    )  # fmt: skip
    assert event.reward == "6.0"
    record = decode_reward_record(event.record)
    assert (record.metrics, record.sent) == ({"a": 3.0}, 2.0)


def test_the_same_body_has_the_same_digest_however_it_is_written() -> None:
    def digest(**fields: Any) -> str:
        return reward_event(request(decision_id="d", **fields), rewarded(), 0, None).digest

    same = {digest(reward=1), digest(reward=1.0, final=False), digest(policy="toy", reward=1, next_state=None)}
    assert len(same) == 1
    assert digest(reward=2) not in same
    assert digest(reward=1, metrics={"a": 1}) not in same
    assert digest(reward=1, next_state=[1, 2]) == digest(next_state=[1, 2], reward=1)


@pytest.mark.parametrize(
    ("fields", "error", "field"),
    [
        ({}, MissingField, "reward"),
        ({"reward": 1, "terminated": True, "truncated": True}, InvalidField, "truncated"),
        ({"reward": 1, "policy": "other"}, InvalidField, "policy"),
        ({"reward": 1, "executed_action": "d"}, InvalidField, "executed_action"),
        ({"reward": 1, "next_state": [1]}, InvalidField, "next_state"),
        ({"reward": 1, "next_state": [1, 1e39]}, NotFinite, "next_state[1]"),
    ],
)
def test_what_is_wrong_of_a_decisions_reward_is_named(
    fields: dict[str, Any], error: type[Exception], field: str
) -> None:
    with pytest.raises(error) as caught:
        reward_event(request(decision_id="d", **fields), rewarded(), 0, None)
    assert getattr(caught.value, "field", None) == field


def test_a_number_beyond_doubles_is_not_finite() -> None:
    with pytest.raises(NotFinite) as caught:
        reward_event(RewardRequest(decision_id="d", reward=float("inf")), rewarded(), 0, None)
    assert caught.value.field == "reward"


@pytest.mark.parametrize(
    ("said", "flags"),
    [
        ({}, RewardFlags.TERMINATED),
        ({"terminated": True}, RewardFlags.TERMINATED),
        ({"truncated": True}, RewardFlags.TRUNCATED),
    ],
)
def test_an_episodes_reward(said: dict[str, bool], flags: RewardFlags) -> None:
    event = episode_event(request(episode="e", reward=7, **said), rewarded(), 1_000, None)
    assert (event.episode, event.reward, event.at_ms, event.until_ms) == ("e", "7.0", 1_000, 6_000)
    assert event.flags == flags


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"final": True}, "final"), ({"next_state": [1, 2]}, "next_state"), ({"executed": False}, "executed"),
        ({"executed_action": 1}, "executed_action"), ({"terminated": True, "truncated": True}, "truncated"),
    ],
)  # fmt: skip
def test_what_cannot_be_said_of_an_episode_is_named(fields: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidField) as caught:
        episode_event(request(episode="e", reward=1, **fields), rewarded(), 0, None)
    assert caught.value.field == field
