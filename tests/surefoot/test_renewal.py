"""What a living consumer holds is not taken over, however long it keeps it; what another holds is left alone."""

from __future__ import annotations

from typing import Any

import pytest
import redis

from surefoot.exchange import run
from surefoot.group import Group
from tests.surefoot.stream_entries import add, key
from tests.surefoot.test_streams import numbers, pending, reader
from tests.surefoot.valkey import Valkey
from tests.waiting import until

IDLE_MS = 30


def held(store: redis.Redis, policy: str) -> dict[bytes, tuple[bytes, int]]:
    """Owner of each pending entry, and when it was given out, in milliseconds of the server's clock."""
    pipe = store.pipeline(transaction=True)
    pipe.time()
    pipe.xpending_range(key(policy), "g", "-", "+", 5000)
    (seconds, micros), entries = pipe.execute()
    now_ms = seconds * 1000 + micros // 1000
    return {each["message_id"]: (each["consumer"], now_ms - each["time_since_delivered"]) for each in entries}


def all_idle(store: redis.Redis, policy: str) -> bool:
    entries: Any = store.xpending_range(key(policy), "g", "-", "+", 5000)
    return all(each["time_since_delivered"] > IDLE_MS for each in entries)


@pytest.mark.parametrize("size", [2, 1000, 2500], ids=["few", "a page", "pages"])
def test_its_own_are_given_out_anew_and_others_are_not(
    valkey: Valkey, store: redis.Redis, policy: str, size: int
) -> None:
    add(store, policy, range(size + 3))
    with reader(valkey, policy, "mine", batch_size=size) as mine, reader(valkey, policy, "other") as other:
        next(mine)
        next(other)
        until(lambda: all_idle(store, policy), "all to be idle")
        before = held(store, policy)
        run(Group(policy, "g", "mine", "0").renew(IDLE_MS), store)
        after = held(store, policy)
    assert len(after) == size + 3
    for stream_id, (owner, given_ms) in before.items():
        assert after[stream_id][0] == owner
        assert (after[stream_id][1] >= given_ms + IDLE_MS) == (owner == b"mine")


def test_what_is_not_idle_yet_is_let_be(valkey: Valkey, store: redis.Redis, policy: str) -> None:
    add(store, policy, range(2))
    with reader(valkey, policy, "mine") as mine:
        next(mine)
        until(lambda: all_idle(store, policy), "all to be idle")
        before = held(store, policy)
        run(Group(policy, "g", "mine", "0").renew(3_600_000), store)
        after = held(store, policy)
    assert all(abs(after[each][1] - before[each][1]) < IDLE_MS for each in before)


def test_a_consumer_renews_what_it_holds_when_a_third_of_the_time_has_passed(
    valkey: Valkey, store: redis.Redis, policy: str
) -> None:
    add(store, policy, range(2))
    now_s = [0.0]
    with reader(valkey, policy, "mine", auto_ack=False, batch_size=2, claim_idle_s=3 * IDLE_MS / 1000) as mine:
        mine._consumer._clock = lambda: now_s[0]
        mine._consumer._renew_at_s = mine._consumer._claim_at_s = 1.0
        next(mine)
        until(lambda: all_idle(store, policy), "all to be idle")
        before = held(store, policy)
        assert next(mine, None) is None
        assert {each[1] - before[stream_id][1] > IDLE_MS for stream_id, each in held(store, policy).items()} == {False}
        now_s[0] = 1.0
        assert next(mine, None) is None
        assert {each[1] - before[stream_id][1] >= IDLE_MS for stream_id, each in held(store, policy).items()} == {True}
        mine.ack()
    assert pending(store, policy) == 0
    assert numbers(reader(valkey, policy, "mine")) == []
