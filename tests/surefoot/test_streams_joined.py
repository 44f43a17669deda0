"""`transitions` on entries that the service's own join has made."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import redis

from service.decision import DecisionEvent, Event, RewardEvent, RewardFlags, RewardRecord, encode_events, encode_record
from service.join import JoinConfig
from service.redis_streams import SCRIPT, base, script_arguments
from service.shipcall import ShipCall
from tests.surefoot.stream_entries import RECORD, state
from tests.surefoot.test_streams import reader
from tests.surefoot.valkey import Valkey

NOW_MS, WINDOW_MS = 1_000, 1_000


class Shipper:
    """Sends events to the join as one producer does."""

    def __init__(self, store: redis.Redis, policy: str, config: JoinConfig | None = None) -> None:
        self._policy, self._config = policy, config or JoinConfig()
        self._script, self._seq = store.register_script(SCRIPT), 1

    def ship(self, *events: Event, through_ms: int = 0, again: bool = False) -> None:
        first = self._seq - len(events) if again else self._seq
        blob = encode_events(list(events))
        call = ShipCall(self._policy, "w0", 3, first, len(events), through_ms, NOW_MS, blobs=(blob,))
        reply: Any = self._script([base(self._policy)], script_arguments(call, self._config, NOW_MS))
        assert reply[0] == b"OK"
        self._seq = reply[1] + 1


def decision(n: int, episode: str = "e", step: int | None = None) -> DecisionEvent:
    return DecisionEvent(
        id=f"{n:060x}",
        episode=episode,
        step=n if step is None else step,
        due_ms=1_000 + n + WINDOW_MS,
        at_ms=1_000 + n,
        action=str(n % 2),
        state=state(n),
        mask=b"\1\1" if n % 2 else b"\1\0",
        record=encode_record(RECORD),
    )


def reward(n: int, flags: RewardFlags = RewardFlags.NONE, next_state: bytes = b"", executed: str = "") -> RewardEvent:
    return RewardEvent(
        id=f"{n:060x}",
        reward_id="",
        digest=f"d{n}",
        at_ms=1_040 + n,
        until_ms=9_000,
        flags=int(flags),
        executed_action=executed,
        next_state=next_state,
        reward=repr(n + 0.1),
        record=encode_record(RewardRecord()),
    )


@pytest.fixture
def shipper(store: redis.Redis, policy: str) -> Shipper:
    return Shipper(store, policy)


def test_an_episode_comes_out_as_it_was_played(valkey: Valkey, policy: str, shipper: Shipper) -> None:
    shipper.ship(decision(0), decision(1), reward(0), decision(2), reward(1))
    shipper.ship(reward(2, RewardFlags.TERMINATED))
    with reader(valkey, policy) as stream:
        batch = next(stream)
    assert batch.steps.tolist() == [0, 1, 2]
    np.testing.assert_array_equal(batch.rewards, [0.1, 1.1, 2.1])
    np.testing.assert_array_equal(batch.next_states[:2], batch.states[1:])
    np.testing.assert_array_equal(batch.next_masks, [[1, 1], [1, 0], [1, 1]])
    assert batch.ends.tolist() == ["none", "none", "terminated"]
    assert batch.terminated.tolist() == [False, False, True]
    assert batch.bootstrap.tolist() == [True, True, False]
    assert batch.producers.tolist() == ["w0"] * 3
    assert batch.epochs.tolist() == [3] * 3
    assert batch.seqs.tolist() == [1, 2, 4]
    assert batch.reward_delays_ms.tolist() == [40.0] * 3
    assert set(batch.join_states) == {"joined"}


def test_each_reward_before_the_next_decision(valkey: Valkey, policy: str, shipper: Shipper) -> None:
    """The order in which a single player sends: nothing waits for the end of the reward window."""
    for n in range(5):
        shipper.ship(decision(n), reward(n, RewardFlags.TERMINATED if n == 4 else RewardFlags.NONE))
    with reader(valkey, policy) as stream:
        batch = next(stream)
    assert batch.steps.tolist() == [0, 1, 2, 3, 4]
    np.testing.assert_array_equal(batch.next_states[:4], batch.states[1:])


def test_ends_of_every_kind(valkey: Valkey, policy: str, shipper: Shipper) -> None:
    shipper.ship(decision(0, "a"), reward(0, RewardFlags.TRUNCATED, state(9)))
    shipper.ship(decision(1, "b"), reward(1, RewardFlags.TRUNCATED))
    shipper.ship(decision(2, ""), reward(2))
    shipper.ship(decision(3, "c"), reward(3, RewardFlags.NOT_EXECUTED))
    shipper.ship(decision(4, "d"), reward(4, executed="1"))
    shipper.ship(decision(5, "f"), through_ms=5_000)
    with reader(valkey, policy) as stream:
        batch = next(stream)
    assert batch.ends.tolist() == ["truncated", "lost", "single", "lost", "lost", "lost"]
    assert batch.truncated.tolist() == [True, True, False, False, False, False]
    assert batch.bootstrap.tolist() == [True] + [False] * 5
    assert batch.join_states.tolist() == ["joined", "joined", "joined", "void", "void", "defaulted"]
    np.testing.assert_array_equal(batch.rewards, [0.1, 1.1, 2.1, np.nan, np.nan, 0.0])
    np.testing.assert_array_equal(batch.next_states[0], np.frombuffer(state(9), "<f4"))
    assert np.isnan(batch.reward_delays_ms[5])


def test_what_is_shipped_again_comes_once(valkey: Valkey, store: redis.Redis, policy: str, shipper: Shipper) -> None:
    events = (decision(0, ""), reward(0), decision(1, ""), reward(1))
    shipper.ship(*events)
    with reader(valkey, policy) as stream:
        assert next(stream).steps.tolist() == [0, 1]
        shipper.ship(*events, again=True)
        # Redis comes back from an old backup: the join has forgotten, the stream has not.
        store.delete(*[key for key in store.scan_iter(f"sf:{{{policy}}}:*") if not key.endswith(b":transitions")])
        shipper.ship(*events, again=True)
        shipper.ship(decision(2, ""), reward(2))
        assert next(stream).steps.tolist() == [2]
        assert stream.statistics()["copies"] == 2
