"""Every loss that can be known is told once, with its size and where reading goes on. A real Valkey."""

from __future__ import annotations

from typing import Any

import pytest
import redis

from service.decision import encode_events
from service.join import JoinConfig
from service.redis_streams import SCRIPT, base, script_arguments
from service.shipcall import ShipCall
from surefoot import Gap
from surefoot.exchange import Exchange, run
from surefoot.group import Delivery, Group
from surefoot.streams import Transitions
from surefoot.survey import following
from tests.surefoot.stream_entries import add, fields, key
from tests.surefoot.test_streams import numbers, reader
from tests.surefoot.test_streams_joined import NOW_MS, decision
from tests.surefoot.valkey import Valkey


def gap(stream: Transitions) -> Gap:
    with pytest.raises(Gap) as caught:
        next(stream)
    return caught.value


def steps(stream: Transitions) -> list[int]:
    return [int(step) for batch in stream for step in batch.steps]


def test_trimmed_tells_the_first_entry_that_is_left(valkey: Valkey, store: redis.Redis, policy: str) -> None:
    ids = add(store, policy, range(10))
    with reader(valkey, policy, batch_size=4) as stream:
        next(stream)
        store.xtrim(key(policy), minid=ids[7], approximate=False)
        found = gap(stream)
        assert (found.reason, found.lost, found.resume) == ("trimmed", 3, ids[7].decode())
        assert found.resume in found.detail
        assert "3 entries" in found.detail
        assert steps(stream) == [7, 8, 9]


def test_trimmed_to_nothing_it_goes_on_behind_what_was_there(valkey: Valkey, store: redis.Redis, policy: str) -> None:
    ids = add(store, policy, range(6))
    with reader(valkey, policy, batch_size=2) as stream:
        next(stream)
        store.xtrim(key(policy), maxlen=0, approximate=False)
        found = gap(stream)
        assert (found.reason, found.lost) == ("trimmed", 4)
        assert found.resume == following(ids[1]).decode()  # nothing is left, so nobody knows a better one
        (added,) = add(store, policy, [6])
        assert found.resume <= added.decode()
        assert steps(stream) == [6]


def test_a_group_that_began_with_what_came_misses_what_is_trimmed_before_it_read(
    valkey: Valkey, store: redis.Redis, policy: str
) -> None:
    add(store, policy, range(3))
    with reader(valkey, policy, start="$") as stream:
        assert next(stream, None) is None
        ids = add(store, policy, range(3, 8))
        store.xtrim(key(policy), minid=ids[2], approximate=False)
        found = gap(stream)
        assert (found.reason, found.lost, found.resume) == ("trimmed", 2, ids[2].decode())
        assert steps(stream) == [5, 6, 7]


@pytest.mark.parametrize("counts", [True, False])
def test_a_group_that_began_in_the_middle_misses_what_is_trimmed_before_it_read(
    valkey: Valkey, store: redis.Redis, policy: str, counts: bool
) -> None:
    """Redis does not count for such a group until it has reached the end."""
    ids = add(store, policy, range(10))
    with reader(valkey, policy, start=ids[1].decode(), batch_size=2) as stream:
        assert next(stream).steps.tolist() == [2, 3]
        if counts:  # what it reads next is the first there is, which Redis can count
            store.xtrim(key(policy), minid=ids[4], approximate=False)
        assert next(stream).steps.tolist() == [4, 5]
        store.xtrim(key(policy), minid=ids[8], approximate=False)
        found = gap(stream)
        assert (found.reason, found.lost, found.resume) == ("trimmed", 2 if counts else None, ids[8].decode())
        assert steps(stream) == [8, 9]
        more = add(store, policy, range(10, 14))
        store.xtrim(key(policy), minid=more[3], approximate=False)
        assert gap(stream).lost == 3  # now it counts
        assert steps(stream) == [13]
    assert numbers(reader(valkey, policy)) == []


@pytest.mark.parametrize("all_of_it", [True, False])
def test_what_is_trimmed_between_the_making_of_a_group_and_its_first_read_is_missed(
    valkey: Valkey, store: redis.Redis, policy: str, all_of_it: bool
) -> None:
    ids = add(store, policy, range(6))
    with reader(valkey, policy, start=ids[1].decode()) as stream, stream._client as client:
        run(stream._consumer._group.open(), client)
        store.xtrim(key(policy), minid=b"%d-0" % 2**60 if all_of_it else ids[4], approximate=False)
        assert gap(stream).reason == "trimmed"
        assert steps(stream) == ([] if all_of_it else [4, 5])


def test_a_group_that_begins_behind_the_end_waits_for_what_lies_there(
    valkey: Valkey, store: redis.Redis, policy: str
) -> None:
    add(store, policy, range(3))
    with reader(valkey, policy, start=f"{2**50}-0") as stream:
        assert next(stream, None) is None
        add(store, policy, [3])
        assert next(stream, None) is None
        store.xadd(key(policy), fields(4), id=f"{2**50}-1")  # type: ignore[arg-type]
        assert steps(stream) == [4]


@pytest.mark.parametrize("size", [8, 100])
def test_deleted_before_they_were_read_are_counted_at_the_end_of_the_stream(
    valkey: Valkey, store: redis.Redis, policy: str, size: int
) -> None:
    ids = add(store, policy, range(8))
    with reader(valkey, policy, batch_size=2) as stream:
        next(stream).ack()
    store.xdel(key(policy), ids[3], ids[5])
    with reader(valkey, policy, batch_size=size) as stream:
        found = gap(stream)
        assert (found.reason, found.lost, found.resume) == ("deleted", 2, ids[6].decode())
        assert steps(stream) == [2, 4, 6, 7]
    assert numbers(reader(valkey, policy)) == []


def test_deleted_in_the_middle_of_what_is_to_come_are_told_without_a_number(
    valkey: Valkey, store: redis.Redis, policy: str
) -> None:
    ids = add(store, policy, range(8))
    with reader(valkey, policy, batch_size=2) as stream:
        next(stream)
        store.xdel(key(policy), ids[3])
        found = gap(stream)
        assert (found.reason, found.lost, found.resume) == ("deleted", None, ids[4].decode())
        assert "at least 1 lost" in found.detail
        assert steps(stream) == [2, 4, 5, 6, 7]


def test_trimmed_and_deleted_at_once_are_one_number(valkey: Valkey, store: redis.Redis, policy: str) -> None:
    ids = add(store, policy, range(10))
    with reader(valkey, policy, batch_size=2) as stream:
        next(stream).ack()
    store.xdel(key(policy), ids[6])
    store.xtrim(key(policy), minid=ids[4], approximate=False)
    with reader(valkey, policy, batch_size=50) as stream:
        found = gap(stream)
        assert (found.reason, found.lost, found.resume) == ("trimmed", 3, ids[4].decode())
        assert steps(stream) == [4, 5, 7, 8, 9]


def test_deleted_behind_a_trim_is_rather_told_twice_than_never(valkey: Valkey, store: redis.Redis, policy: str) -> None:
    ids = add(store, policy, range(10))
    with reader(valkey, policy, batch_size=2) as stream:
        next(stream).ack()
        store.xdel(key(policy), ids[6])
        store.xtrim(key(policy), minid=ids[4], approximate=False)
        assert gap(stream).lost == 3
        assert next(stream).steps.tolist() == [4, 5]
        found = gap(stream)
        assert (found.reason, found.lost) == ("deleted", None)
        assert steps(stream) == [7, 8, 9]


def test_pending_entries_that_were_deleted_are_named(valkey: Valkey, store: redis.Redis, policy: str) -> None:
    ids = add(store, policy, range(4))
    with reader(valkey, policy) as stream:
        next(stream)
    store.xdel(key(policy), ids[0], ids[2])
    with reader(valkey, policy) as stream:
        found = gap(stream)
        assert (found.reason, found.lost) == ("deleted", 2)
        assert found.ids == (ids[0].decode(), ids[2].decode())
        assert found.resume == following(ids[2]).decode()
        assert steps(stream) == [1, 3]


@pytest.mark.parametrize("rest", [0, 2])
def test_a_vanished_group_tells_where_the_new_one_begins(
    valkey: Valkey, store: redis.Redis, policy: str, rest: int
) -> None:
    add(store, policy, range(3))
    with reader(valkey, policy) as stream:
        next(stream)
        store.delete(key(policy))
        ids = add(store, policy, range(3, 3 + rest))
        found = gap(stream)
        assert (found.reason, found.lost) == ("group_missing", None)
        assert found.resume == (ids[0].decode() if rest else "0-1")
        assert (f"{rest} entries" if rest else "nothing") in found.detail
        assert steps(stream) == list(range(3, 3 + rest))


def test_a_hole_that_the_join_stepped_over_is_told_by_producer(valkey: Valkey, store: redis.Redis, policy: str) -> None:
    """A spool that no longer holds what Redis asks for: the join counts the hole, whoever reads is told."""
    script = store.register_script(SCRIPT)

    def ship(producer: str, first: int, n: int, force: bool = False) -> None:
        call = ShipCall(policy, producer, 3, first, 1, 0, NOW_MS, force, blobs=(encode_events([decision(n, "")]),))
        reply: Any = script([base(policy)], script_arguments(call, JoinConfig(), NOW_MS))
        assert reply[0] == b"OK"

    with reader(valkey, policy) as stream:
        ship("w0", 1, 0)
        ship("w1", 1, 1)
        assert next(stream, None) is None
        ship("w0", 5, 2, force=True)
        ship("w1", 3, 3, force=True)
        found = gap(stream)
        assert (found.reason, found.lost) == ("spool", 4)
        assert "w0:3: 3, w1:3: 1" in found.detail
        (added,) = add(store, policy, [9])
        assert found.resume <= added.decode()
        assert steps(stream) == [9]
    assert numbers(reader(valkey, policy)) == []


def test_what_goes_between_the_first_look_and_the_new_group_is_not_its_loss(
    valkey: Valkey, store: redis.Redis, policy: str
) -> None:
    """The service trims beside it: what others have acknowledged goes, also while a group is being made."""
    ids = add(store, policy, range(10))
    exchange = Group(policy, "g", "one", "0").open()
    request: Any = next(exchange)
    while True:
        try:
            reply = request.on(store)
        except redis.ResponseError as error:
            request = exchange.throw(error)
            continue
        if getattr(request, "name", "") == "xinfo_stream":
            store.xtrim(key(policy), minid=ids[8], approximate=False)
            add(store, policy, [10])
        request = _next(exchange, reply)
        if request is None:
            break
    with reader(valkey, policy, batch_size=4) as stream:
        assert steps(stream) == [8, 9, 10]


def _next(exchange: Exchange[Delivery], reply: Any) -> Any:
    """What it asks for next; None at its end."""
    try:
        return exchange.send(reply)
    except StopIteration:
        return None
