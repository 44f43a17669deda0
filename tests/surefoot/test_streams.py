"""What a trainer gets from `transitions` and `tail`, from a real Valkey."""

from __future__ import annotations

import json
import math
from itertools import islice
from threading import Thread
from typing import Any

import numpy as np
import pytest
import redis

from surefoot import Unreadable, streams, transitions
from surefoot.streams import Transitions
from tests.surefoot.stream_entries import add, fields, key
from tests.surefoot.valkey import Valkey
from tests.waiting import until

SOON_S = 0.01


def reader(valkey: Valkey, policy: str, consumer: str = "c", **options: Any) -> Transitions:
    """A consumer that takes what is there and ends."""
    given: dict[str, Any] = {"redis_url": valkey.url, "block_s": SOON_S, "max_wait_s": 0.0, **options}
    return transitions(policy, "g", consumer, **given)


def numbers(stream: Transitions) -> list[int]:
    """The entries' numbers, in the order they came, each batch acknowledged."""
    with stream:
        return [int(step) for batch in stream for step in batch.steps]


def pending(store: redis.Redis, policy: str) -> int:
    return int(store.xpending(key(policy), "g")["pending"])


def blocked(store: redis.Redis) -> int:
    """How many clients wait for something to be added."""
    return int(store.info("clients")["blocked_clients"])


def test_a_batch_holds_every_column_exactly(valkey: Valkey, store: redis.Redis, policy: str) -> None:
    add(store, policy, [0], q=7, p="w3", e=2)
    add(store, policy, [1], a=1, x="terminated", b=0, n=b"", nm=b"", ni="", tf=1, record={"propensity": 0.01})
    add(store, policy, [2], r="", j="void", x="single", b=0, n=b"", nm=b"", at="", record={"propensity": None})
    rule = {"overridden": True, "fallback": "not_finite", "explored": True, "proposed": 1, "weight": 0.25}
    add(store, policy, [3], r="0.1", m=b"\1\0", record={**rule, "switched": True, "key": None, "version": "v1"})
    with reader(valkey, policy) as stream:
        batch = next(stream)
    assert len(batch) == 4
    np.testing.assert_array_equal(batch.states, np.arange(4, dtype="<f4") + np.arange(4)[:, None])
    assert batch.states.dtype == np.float32
    np.testing.assert_array_equal(batch.next_states[[0, 3]], batch.states[[0, 3]] + 1)
    np.testing.assert_array_equal(batch.next_states[[1, 2]], 0)
    np.testing.assert_array_equal(batch.actions, [0, 1, 0, 0])
    np.testing.assert_array_equal(batch.rewards, [0.0, 1.0, math.nan, 0.1])
    np.testing.assert_array_equal(batch.terminated, [False, True, False, False])
    np.testing.assert_array_equal(batch.truncated, [False] * 4)
    np.testing.assert_array_equal(batch.bootstrap, [True, False, False, True])
    assert batch.ends.tolist() == ["none", "terminated", "single", "none"]
    assert batch.join_states.tolist() == ["joined", "joined", "void", "joined"]
    np.testing.assert_array_equal(batch.propensities, [0.99, 0.01, math.nan, 0.99])
    np.testing.assert_array_equal(batch.behaviour, [[0.99, 0.01]] * 4)
    np.testing.assert_array_equal(batch.target, [[1.0, 0.0]] * 4)
    np.testing.assert_array_equal(batch.masks, [[True, True]] * 3 + [[True, False]])
    np.testing.assert_array_equal(batch.next_masks, [[True, False], [True, True], [True, True], [True, False]])
    assert batch.ids.tolist() == [f"{n:060x}" for n in range(4)]
    assert (batch.producers[0], batch.epochs[0], batch.seqs[0]) == ("w3", 2, 7)
    assert batch.fallbacks.tolist() == ["", "", "", "not_finite"]
    assert batch.keys.tolist() == ["user-1"] * 3 + [""]
    assert batch.versions.tolist() == ["v2", "v2", "v2", "v1"]
    assert set(batch.assigned_versions) == {"v2"}
    for column, last in (("overridden", True), ("explored", True), ("switched", True), ("proposed", 1)):
        assert getattr(batch, column).tolist() == [0, 0, 0, last]
    np.testing.assert_array_equal(batch.weights, [1, 1, 1, 0.25])
    np.testing.assert_array_equal(batch.epsilons, 0.02)
    np.testing.assert_array_equal(batch.reward_delays_ms, [50, 50, math.nan, 50])
    np.testing.assert_array_equal(batch.at_ms, [1000, 1001, 1002, 1003])
    assert batch.states.flags.writeable
    assert batch.episodes.tolist() == ["episode"] * 4


def test_a_batch_is_acknowledged_when_the_next_is_asked_for(valkey: Valkey, store: redis.Redis, policy: str) -> None:
    add(store, policy, range(6))
    with reader(valkey, policy, batch_size=3) as stream:
        assert next(stream).steps.tolist() == [0, 1, 2]
        assert pending(store, policy) == 3
        assert next(stream).steps.tolist() == [3, 4, 5]
        assert pending(store, policy) == 3
        assert next(stream, None) is None
        assert pending(store, policy) == 0


def test_without_auto_ack_only_ack_acknowledges(valkey: Valkey, store: redis.Redis, policy: str) -> None:
    add(store, policy, range(4))
    with reader(valkey, policy, batch_size=2, auto_ack=False) as stream:
        first, second = stream
        assert pending(store, policy) == 4
        second.ack()
        second.ack()
        assert pending(store, policy) == 2
        assert stream.statistics()["in_flight"] == 2
    assert numbers(reader(valkey, policy)) == first.steps.tolist()


def test_a_restarted_consumer_first_gets_what_it_had_not_acknowledged(
    valkey: Valkey, store: redis.Redis, policy: str
) -> None:
    add(store, policy, range(5))
    with reader(valkey, policy, batch_size=2) as stream:
        next(stream)
        next(stream)
    assert numbers(reader(valkey, policy)) == [2, 3, 4]
    assert pending(store, policy) == 0


def test_the_members_of_a_group_share_and_groups_do_not(valkey: Valkey, store: redis.Redis, policy: str) -> None:
    add(store, policy, range(4))
    with reader(valkey, policy, "one", batch_size=2) as one, reader(valkey, policy, "two", batch_size=2) as two:
        assert [next(one).steps.tolist(), next(two).steps.tolist()] == [[0, 1], [2, 3]]
    with transitions(policy, "other", "one", redis_url=valkey.url, max_wait_s=0.0) as other:
        assert next(other).steps.tolist() == [0, 1, 2, 3]


def test_what_a_dead_consumer_left_is_taken_over(valkey: Valkey, store: redis.Redis, policy: str) -> None:
    add(store, policy, range(3))
    with reader(valkey, policy, "dead") as dead:
        assert len(next(dead)) == 3
    assert numbers(reader(valkey, policy, "young", claim_idle_s=3600)) == []
    assert numbers(reader(valkey, policy, "heir", claim_idle_s=0.0001)) == [0, 1, 2]
    assert pending(store, policy) == 0


def test_its_own_unacknowledged_batches_are_not_delivered_twice(
    valkey: Valkey, store: redis.Redis, policy: str
) -> None:
    add(store, policy, range(2))
    with reader(valkey, policy, auto_ack=False, claim_idle_s=0.0001) as stream:
        first = next(stream)
        add(store, policy, [2])
        assert next(stream).steps.tolist() == [2]
        assert pending(store, policy) == 3
        first.ack()
        assert pending(store, policy) == 1


def test_copies_are_dropped_and_acknowledged(valkey: Valkey, store: redis.Redis, policy: str) -> None:
    add(store, policy, [0, 1, 0, 2, 1])
    with reader(valkey, policy) as stream:
        assert next(stream).steps.tolist() == [0, 1, 2]
        assert pending(store, policy) == 5
        add(store, policy, [2, 0])
        assert next(stream, None) is None
        assert stream.statistics()["copies"] == 4
    assert pending(store, policy) == 0


def test_another_epoch_or_producer_is_no_copy(valkey: Valkey, store: redis.Redis, policy: str) -> None:
    add(store, policy, [0])
    add(store, policy, [0], e=2)
    add(store, policy, [0], p="w1")
    assert numbers(reader(valkey, policy)) == [0, 0, 0]


def test_states_of_another_shape_come_in_a_batch_of_their_own(valkey: Valkey, store: redis.Redis, policy: str) -> None:
    wide = {"s": bytes(32), "n": b"", "b": 0, "record": {"shape": (2, 2), "dtype": "<f8"}}
    add(store, policy, [0])
    add(store, policy, [1], **wide)
    add(store, policy, [2])
    with reader(valkey, policy) as stream:
        flat, square = stream
    assert flat.steps.tolist() == [0, 2]
    assert square.states.shape == (1, 2, 2)
    assert pending(store, policy) == 0


def test_a_next_state_of_another_shape_ends_the_transition(valkey: Valkey, store: redis.Redis, policy: str) -> None:
    add(store, policy, [0], n=bytes(20), nm=b"\1\1\1")
    with reader(valkey, policy) as stream:
        batch = next(stream)
    assert batch.ends.tolist() == ["lost"]
    assert not batch.bootstrap.any()
    assert not batch.next_states.any()


def test_start_says_where_a_new_group_begins(valkey: Valkey, store: redis.Redis, policy: str) -> None:
    second = add(store, policy, range(3))[1].decode()
    with reader(valkey, policy, start="$") as stream:
        assert next(stream, None) is None
        add(store, policy, [3])
        assert next(stream).steps.tolist() == [3]
    with transitions(policy, "other", "c", redis_url=valkey.url, max_wait_s=0.0, start=second) as stream:
        assert next(stream).steps.tolist() == [2, 3]


def test_a_group_is_made_on_a_stream_that_does_not_exist_yet(valkey: Valkey, store: redis.Redis, policy: str) -> None:
    with reader(valkey, policy) as stream:
        assert next(stream, None) is None
        add(store, policy, [0])
        assert next(stream).steps.tolist() == [0]


def test_a_waiting_consumer_wakes_up_for_a_new_transition(valkey: Valkey, store: redis.Redis, policy: str) -> None:
    with reader(valkey, policy, batch_size=1, block_s=60.0, max_wait_s=60.0) as stream:
        waiting = Thread(target=lambda: found.append(next(stream).steps.tolist()))
        found: list[Any] = []
        waiting.start()
        until(lambda: blocked(store), "the consumer to wait")
        add(store, policy, [0])
        waiting.join(30.0)
        assert found == [[0]]


def test_an_entry_of_a_newer_schema_stops_the_reader_and_stays(valkey: Valkey, store: redis.Redis, policy: str) -> None:
    add(store, policy, [0])
    newer = add(store, policy, [1], v=2)
    with reader(valkey, policy) as stream:
        with pytest.raises(Unreadable, match="schema version 2: upgrade"):
            next(stream)
        with pytest.raises(Unreadable):
            next(stream)
        assert pending(store, policy) == 2
        store.xdel(key(policy), newer[0])
        with pytest.raises(Exception, match="deleted"):
            next(stream)
        assert next(stream).steps.tolist() == [0]


@pytest.mark.parametrize(
    "changes",
    [{"s": b"123"}, {"m": b"\1"}, {"q": "x"}, {"d": b"\xc1"}, {"r": "much"}, {"record": {"behaviour": b""}}],
    ids=["state", "mask", "seq", "record", "reward", "behaviour"],
)
def test_a_torn_entry_is_named(valkey: Valkey, store: redis.Redis, policy: str, changes: dict[str, object]) -> None:
    (stream_id,) = add(store, policy, [0], **changes)
    with reader(valkey, policy) as stream, pytest.raises(Unreadable, match=stream_id.decode()):
        next(stream)


def test_unknown_fields_are_ignored(valkey: Valkey, store: redis.Redis, policy: str) -> None:
    add(store, policy, [0], later="addition")
    assert numbers(reader(valkey, policy)) == [0]


def test_tail_gives_plain_values_that_json_holds(valkey: Valkey, store: redis.Redis, policy: str) -> None:
    add(store, policy, [0])
    add(store, policy, [1], r="", at="", x="lost", tf=2, b=0, n=b"", nm=b"", ni="", st=-1, ep="")
    first, second = streams.tail(policy, valkey.url)
    assert json.loads(json.dumps([first, second], allow_nan=False)) == [first, second]
    assert first["state"] == [0.0, 1.0, 2.0, 3.0]
    assert first["next_state"] == [1.0, 2.0, 3.0, 4.0]
    assert (first["reward"], first["propensity"], first["end"], first["policy"]) == (0.0, 0.99, "none", policy)
    assert first["mask"] == [1, 1]
    assert (second["reward"], second["next_state"], second["step"], second["episode"]) == (None, None, None, None)
    assert (second["truncated"], second["bootstrap"]) == (True, False)


def test_tail_starts_and_ends_where_told(valkey: Valkey, store: redis.Redis, policy: str) -> None:
    ids = add(store, policy, range(250))
    steps = [each["step"] for each in streams.tail(policy, valkey.url)]
    assert steps == list(range(250))
    assert [each["step"] for each in streams.tail(policy, valkey.url, limit=2)] == [0, 1]
    assert [each["step"] for each in streams.tail(policy, valkey.url, from_=ids[247].decode())] == [248, 249]
    assert list(streams.tail(policy, valkey.url, from_="$")) == []
    assert list(streams.tail(f"{policy}-none", valkey.url)) == []


def test_tail_follows(valkey: Valkey, store: redis.Redis, policy: str) -> None:
    add(store, policy, [0])
    following = streams.tail(policy, valkey.url, follow=True)
    assert next(following)["step"] == 0
    add(store, policy, [1, 2])
    assert [each["step"] for each in islice(following, 2)] == [1, 2]


def test_tail_consumes_nothing(valkey: Valkey, store: redis.Redis, policy: str) -> None:
    add(store, policy, range(3))
    list(streams.tail(policy, valkey.url))
    assert numbers(reader(valkey, policy)) == [0, 1, 2]


def test_the_fields_of_the_tests_are_complete() -> None:
    assert " ".join(sorted(fields(0))) == "a at b d e ep i j m n ni nm o p q r rd ri s st t tf v x"
