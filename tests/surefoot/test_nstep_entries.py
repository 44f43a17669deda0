"""n-step transitions: read exactly, padded, and discounted as the slow way does; also those that the join writes."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
import redis
from hypothesis import given
from hypothesis import strategies as st

from service.decision import RewardFlags
from service.join import JoinConfig
from surefoot import Batch, Unreadable, evaluate, transitions
from surefoot.entries import Row
from surefoot.streams import tail
from tests.surefoot.stream_entries import MULTI, POINT, fields, key, n_step_fields, raw
from tests.surefoot.test_entries import batch_of
from tests.surefoot.test_streams_joined import Shipper, decision, reward
from tests.surefoot.valkey import Valkey

REWARDS = st.lists(st.floats(-100.0, 100.0), min_size=1, max_size=6)


def n_step_batch(*entries: dict[str, Any]) -> Batch:
    rows = [Row.read(b"1-%d" % n, raw(entry)) for n, entry in enumerate(entries)]
    return Batch.of("p", rows, lambda batch: None)


def test_they_come_padded_to_the_longest(valkey: Valkey, store: redis.Redis, policy: str) -> None:
    for entry in (n_step_fields(0), n_step_fields(5, k=1, x="terminated", b=0, n=b"", nm=b"", ni="")):
        store.xadd(key(policy, "nstep"), entry)  # type: ignore[arg-type]
    with transitions(policy, "g", "c", redis_url=valkey.url, max_wait_s=0.0, n_step=True) as stream:
        batch = next(stream)
    assert batch.n_steps.tolist() == [3, 1]
    np.testing.assert_array_equal(batch.rewards, [[0.0, 1.0, 2.0], [5.0, math.nan, math.nan]])
    np.testing.assert_array_equal(batch.log_propensities, [[0.0, -0.125, -0.25], [-0.625, math.nan, math.nan]])
    assert batch.step_ids.tolist() == [[f"{n:060x}" for n in range(3)], [f"{5:060x}", "", ""]]
    assert batch.step_joins.tolist() == [["joined"] * 3, ["joined", "", ""]]
    assert batch.steps.tolist() == [0, 5]
    np.testing.assert_array_equal(batch.states[:, 0], [0.0, 5.0])
    np.testing.assert_array_equal(batch.next_states[0], batch.states[0] + 3)
    assert batch.bootstrap.tolist() == [True, False]
    assert batch.terminated.tolist() == [False, True]
    np.testing.assert_array_equal(batch.propensities, [0.99, 0.99])
    np.testing.assert_array_equal(batch.returns(0.5), [0.0 + 0.5 + 0.5, 5.0])
    np.testing.assert_array_equal(batch.discounts(0.5), [0.125, 0.0])


def test_streams_of_one_and_of_n_steps_have_groups_of_their_own(
    valkey: Valkey, store: redis.Redis, policy: str
) -> None:
    store.xadd(key(policy), fields(0))  # type: ignore[arg-type]
    store.xadd(key(policy, "nstep"), n_step_fields(0))  # type: ignore[arg-type]
    for n_step in (False, True):
        with transitions(policy, "g", "c", redis_url=valkey.url, max_wait_s=0.0, n_step=n_step) as stream:
            batch = next(stream)
            state = stream.state()
            assert next(stream, None) is None
        assert batch.n_steps.tolist() == [3 if n_step else 1]
        with pytest.raises(ValueError, match="belongs to group 'g'"):
            transitions(policy, "g", "c", redis_url=valkey.url, state=state, n_step=not n_step)


@given(st.lists(REWARDS, min_size=1, max_size=4), st.floats(0.0, 1.0), st.lists(st.booleans(), min_size=4, max_size=4))
def test_returns_and_discounts_are_what_the_slow_way_gives(
    episodes: list[list[float]], gamma: float, bootstrap: list[bool]
) -> None:
    batch = n_step_batch(
        *(
            n_step_fields(10 * n, k=len(rewards), rs=",".join(map(repr, rewards)), b=int(more))
            for n, (rewards, more) in enumerate(zip(episodes, bootstrap, strict=False))
        )
    )
    slow = [sum(gamma**i * each for i, each in enumerate(rewards)) for rewards in episodes]
    np.testing.assert_allclose(batch.returns(gamma), slow, rtol=1e-12, atol=1e-9)
    factors = [gamma ** len(rewards) * more for rewards, more in zip(episodes, bootstrap, strict=False)]
    np.testing.assert_allclose(batch.discounts(gamma), factors, rtol=1e-12)


def test_of_one_step_they_are_reward_and_gamma() -> None:
    batch = batch_of({"record": {}}, {"record": {}, "b": 0}, {"record": {}, "r": "", "j": "quarantined"})
    np.testing.assert_array_equal(batch.returns(0.9), [0.0, 1.0, math.nan])
    np.testing.assert_array_equal(batch.discounts(0.9), [0.9, 0.0, 0.9])
    assert batch.join_states.tolist() == ["joined", "joined", "quarantined"]
    assert batch.n_steps.tolist() == [1, 1, 1]
    assert batch.step_ids.shape == batch.step_joins.shape == (3, 1)


def test_nothing_is_estimated_from_them() -> None:
    batch = n_step_batch(n_step_fields(0, k=2), n_step_fields(3, k=2))  # [B, n_max] square: it would broadcast
    with pytest.raises(ValueError, match="n-step"):
        evaluate(batch, batch.behaviour)


def test_a_missing_reward_or_log_is_nan_where_it_stands() -> None:
    batch = n_step_batch(n_step_fields(0, rs="1.0,,3.0", lps=",-inf,"))
    np.testing.assert_array_equal(batch.rewards, [[1.0, math.nan, 3.0]])
    np.testing.assert_array_equal(batch.log_propensities, [[math.nan, -math.inf, math.nan]])
    assert np.isnan(batch.returns(0.5)).all()


@pytest.mark.parametrize("kind", [MULTI, POINT], ids=["factors", "point"])
def test_every_kind_of_action(kind: dict[str, Any]) -> None:
    batch = n_step_batch(n_step_fields(0, **kind), n_step_fields(3, k=2, **kind))
    assert batch.action_kind == kind["record"]["action_kind"]
    assert batch.rewards.shape == (2, 3)


@pytest.mark.parametrize(
    "changes",
    [
        {"k": 2}, {"k": 0}, {"k": -1}, {"k": "x"}, {"rs": "1,2"}, {"rs": "1,2,nan"}, {"rs": "1,2,inf"}, {"lps": "1"},
        {"lps": "0,0,inf"}, {"lps": "0,0,nan"}, {"ids": ",,"}, {"js": "joined"}, {"n": b"12"},
    ],
    ids=str,
)  # fmt: skip
def test_what_does_not_fit_is_named(changes: dict[str, Any]) -> None:
    entry = raw(n_step_fields(0) | changes)
    if changes == {"n": b"12"}:  # a state of another shape ends it, as of one step
        assert Row.read(b"1-0", entry).end == "lost"
        return
    with pytest.raises(Unreadable, match="1-0"):
        Row.read(b"1-0", entry)


def test_tail_gives_the_steps(valkey: Valkey, store: redis.Redis, policy: str) -> None:
    store.xadd(key(policy, "nstep"), n_step_fields(0, lps=",-0.5,"))  # type: ignore[arg-type]
    (found,) = tail(policy, valkey.url, n_step=True)
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert (found["n_steps"], found["step_rewards"]) == (3, [0.0, 1.0, 2.0])
    assert found["step_log_propensities"] == [None, -0.5, None]
    assert found["reward"] == 0.0


def test_what_the_join_writes_adds_up_to_its_single_steps(valkey: Valkey, store: redis.Redis, policy: str) -> None:
    shipper = Shipper(store, policy, JoinConfig(n_step=3))
    for n in range(7):
        shipper.ship(decision(n), reward(n, RewardFlags.TERMINATED if n == 6 else RewardFlags.NONE))
    options: dict[str, Any] = {"redis_url": valkey.url, "max_wait_s": 0.0}
    with transitions(policy, "g", "c", **options) as stream:
        ones = next(stream)
    with transitions(policy, "g", "c", n_step=True, **options) as stream:
        several = next(stream)
    order = np.argsort(several.steps)
    by_id = dict(zip(ones.ids, ones.rewards, strict=True))
    assert several.steps[order].tolist() == list(range(7))
    assert several.n_steps[order].tolist() == [3, 3, 3, 3, 3, 2, 1]
    for row in range(7):
        k = int(several.n_steps[row])
        assert several.step_ids[row, :k].tolist() == [f"{several.steps[row] + i:060x}" for i in range(k)]
        expected = sum(0.9**i * by_id[each] for i, each in enumerate(several.step_ids[row, :k]))
        assert several.returns(0.9)[row] == pytest.approx(expected)
    last = several.steps + several.n_steps == 7
    np.testing.assert_array_equal(several.terminated, last)
    np.testing.assert_array_equal(several.next_states[~last, 0], (several.steps + several.n_steps)[~last])
