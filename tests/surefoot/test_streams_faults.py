"""What `transitions` does when Redis, the network, the stream or the trainer itself fails. All of them real."""

from __future__ import annotations

import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import redis

from surefoot import Gap, Refused, Unreachable, streams, transitions
from surefoot.streams import Transitions
from tests.surefoot.stream_entries import add, key
from tests.surefoot.test_streams import numbers, pending, reader
from tests.surefoot.valkey import LossyProxy, Valkey


@pytest.fixture
def proxy(valkey: Valkey) -> Iterator[LossyProxy]:
    proxy = LossyProxy(valkey.socket_path)
    yield proxy
    proxy.close()


def gap(stream: Transitions) -> Gap:
    with pytest.raises(Gap) as caught:
        next(stream)
    return caught.value


def trim(store: redis.Redis, policy: str, before: bytes) -> None:
    store.xtrim(key(policy), minid=before, approximate=False)


def test_a_trim_past_the_group_is_a_gap_with_its_size_raised_once(
    valkey: Valkey, store: redis.Redis, policy: str
) -> None:
    ids = add(store, policy, range(10))
    with reader(valkey, policy, batch_size=4) as stream:
        assert next(stream).steps.tolist() == [0, 1, 2, 3]
        trim(store, policy, ids[7])
        found = gap(stream)
        assert (found.reason, found.lost) == ("trimmed", 3)
        assert next(stream).steps.tolist() == [7, 8, 9]
        assert next(stream, None) is None
    assert numbers(reader(valkey, policy)) == []


def test_a_trim_past_the_group_is_found_at_the_next_start(valkey: Valkey, store: redis.Redis, policy: str) -> None:
    ids = add(store, policy, range(10))
    with reader(valkey, policy, batch_size=4) as stream:
        next(stream).ack()
    trim(store, policy, ids[6])
    with reader(valkey, policy) as stream:
        found = gap(stream)
        assert (found.reason, found.lost) == ("trimmed", 2)
        assert next(stream).steps.tolist() == [6, 7, 8, 9]


def test_a_stream_trimmed_to_nothing_is_a_gap_once(valkey: Valkey, store: redis.Redis, policy: str) -> None:
    add(store, policy, range(10))
    with reader(valkey, policy, batch_size=4) as stream:
        next(stream).ack()
        store.xtrim(key(policy), maxlen=0, approximate=False)
        assert gap(stream).lost == 6
        assert next(stream, None) is None
    assert numbers(reader(valkey, policy)) == []
    add(store, policy, [10])
    assert numbers(reader(valkey, policy)) == [10]


def test_a_gap_is_raised_although_the_reply_that_showed_it_was_lost(
    valkey: Valkey, store: redis.Redis, policy: str, proxy: LossyProxy
) -> None:
    ids = add(store, policy, range(10))
    with reader(valkey, policy, batch_size=4, redis_url=proxy.url, max_wait_s=60.0) as stream:
        next(stream).ack()
        trim(store, policy, ids[7])
        stream._consumer._open = False  # as after any break of the connection
        proxy.lose = b"XREADGROUP"
        assert gap(stream).lost == 3
        assert next(stream).steps.tolist() == [7, 8, 9]


def test_trimming_what_the_group_has_read_is_no_gap(valkey: Valkey, store: redis.Redis, policy: str) -> None:
    ids = add(store, policy, range(10))
    with reader(valkey, policy, batch_size=4) as stream:
        next(stream).ack()
        trim(store, policy, ids[3])
        assert next(stream).steps.tolist() == [4, 5, 6, 7]
        trim(store, policy, ids[8])  # exactly behind what was read
        stream.ack()
        assert next(stream).steps.tolist() == [8, 9]
        stream.ack()
        store.xtrim(key(policy), maxlen=0, approximate=False)
        assert next(stream, None) is None
        add(store, policy, [10])
        assert next(stream).steps.tolist() == [10]


def test_what_was_removed_before_the_group_existed_is_no_gap(valkey: Valkey, store: redis.Redis, policy: str) -> None:
    ids = add(store, policy, range(6))
    trim(store, policy, ids[2])
    store.xdel(key(policy), ids[4])
    assert numbers(reader(valkey, policy, batch_size=1)) == [2, 3, 5]


def test_an_entry_deleted_before_it_was_read_is_a_gap(valkey: Valkey, store: redis.Redis, policy: str) -> None:
    ids = add(store, policy, range(6))
    with reader(valkey, policy, batch_size=2) as stream:
        next(stream).ack()
        store.xdel(key(policy), ids[4])
        assert next(stream).steps.tolist() == [2, 3]
        assert gap(stream).reason == "deleted"
        assert next(stream).steps.tolist() == [5]
        assert next(stream, None) is None


def test_a_pending_entry_deleted_is_a_gap_that_names_it(valkey: Valkey, store: redis.Redis, policy: str) -> None:
    ids = add(store, policy, range(3))
    with reader(valkey, policy) as stream:
        next(stream)
    store.xdel(key(policy), ids[1])
    with reader(valkey, policy) as stream:
        found = gap(stream)
        assert (found.reason, found.ids) == ("deleted", (ids[1].decode(),))
        assert next(stream).steps.tolist() == [0, 2]
    assert numbers(reader(valkey, policy)) == [0, 2]


def test_an_entry_of_a_dead_consumer_deleted_is_a_gap_that_names_it(
    valkey: Valkey, store: redis.Redis, policy: str
) -> None:
    ids = add(store, policy, range(3))
    with reader(valkey, policy, "dead") as stream:
        next(stream)
    store.xdel(key(policy), ids[0])
    with reader(valkey, policy, "heir", claim_idle_s=0.0001) as stream:
        assert gap(stream).ids == (ids[0].decode(),)
        assert next(stream).steps.tolist() == [1, 2]


def test_an_entry_deleted_while_it_is_trained_on_is_no_gap(valkey: Valkey, store: redis.Redis, policy: str) -> None:
    ids = add(store, policy, range(2))
    with reader(valkey, policy, auto_ack=False, claim_idle_s=0.0001) as stream:
        batch = next(stream)
        store.xdel(key(policy), *ids)
        stream._consumer._open = False
        assert next(stream, None) is None
        batch.ack()
    assert pending(store, policy) == 0


@pytest.mark.parametrize("whole_stream", [True, False], ids=["stream", "group"])
def test_a_group_that_vanishes_is_a_gap_and_copies_are_still_known(
    valkey: Valkey, store: redis.Redis, policy: str, whole_stream: bool
) -> None:
    add(store, policy, range(3))
    with reader(valkey, policy, start="$") as stream:
        assert next(stream, None) is None
        add(store, policy, range(3, 5))
        assert next(stream).steps.tolist() == [3, 4]
        if whole_stream:
            store.delete(key(policy))
            add(store, policy, range(2, 6))  # the service sends again what its spool still holds
        else:
            store.xgroup_destroy(key(policy), "g")
            add(store, policy, [5])
        assert gap(stream).reason == "group_missing"
        # All that is there is read, wherever the group was to start at first: it cannot be known what it had read.
        assert next(stream).steps.tolist() == ([2, 5] if whole_stream else [0, 1, 2, 5])
        assert next(stream, None) is None


def test_what_the_service_lost_before_redis_is_told_each_group_once(
    valkey: Valkey, store: redis.Redis, policy: str
) -> None:
    lost = f"sf:{{{policy}}}:lost"
    store.hset(lost, "w0:1", "5")
    add(store, policy, [0])
    with reader(valkey, policy) as stream:  # lost before the group existed
        assert next(stream).steps.tolist() == [0]
        store.hset(lost, mapping={"w0:1": "7", "w1:4": "1"})
        found = gap(stream)
        assert (found.reason, found.lost) == ("spool", 3)
        add(store, policy, [1])
        assert next(stream).steps.tolist() == [1]
    assert numbers(reader(valkey, policy)) == [1]
    store.hincrby(lost, "w0:1", 2)
    with reader(valkey, policy) as stream:
        assert gap(stream).lost == 2


@pytest.mark.parametrize("command", [b"CREATE", b"HGETALL", b"XREADGROUP", b"XAUTOCLAIM", b"XACK", b"XREAD\r\n"])
def test_a_lost_reply_loses_and_doubles_nothing(
    valkey: Valkey, store: redis.Redis, policy: str, proxy: LossyProxy, command: bytes
) -> None:
    add(store, policy, range(3))
    with reader(valkey, policy, "dead") as dead:
        next(dead)
    add(store, policy, range(3, 9))
    proxy.lose = command
    options: dict[str, Any] = {"redis_url": proxy.url, "claim_idle_s": 0.0001, "max_wait_s": 0.5}
    if command == b"CREATE":
        store.xgroup_destroy(key(policy), "g")
    with reader(valkey, policy, batch_size=2, **options) as stream:
        assert sorted(step for batch in stream for step in batch.steps) == list(range(9))
        assert stream.statistics()["reconnects"] == 1
    assert proxy.lost == 1
    assert pending(store, policy) == 0


def test_a_reply_lost_between_exec_and_answer_is_found_as_pending(
    valkey: Valkey, store: redis.Redis, policy: str, proxy: LossyProxy
) -> None:
    add(store, policy, range(4))
    with reader(valkey, policy, redis_url=proxy.url, max_wait_s=60.0) as stream:
        proxy.lose = b"EXEC\r\n"
        assert next(stream).steps.tolist() == [0, 1, 2, 3]
    assert proxy.lost == 1


def test_a_trainer_outlives_a_killed_redis(short_path: Path, policy: str) -> None:
    with Valkey(short_path, durable=True) as server, server.client() as store:
        add(store, policy, range(4))
        with reader(server, policy, batch_size=2, max_wait_s=60.0) as stream:
            assert next(stream).steps.tolist() == [0, 1]
            server.kill()
            waits: list[float] = []

            def start_again(delay_s: float) -> None:
                waits.append(delay_s)
                if len(waits) == 3:
                    server.start()

            stream._sleep = start_again
            assert next(stream).steps.tolist() == [2, 3]
        assert len(waits) == 3
        assert pending(store, policy) == 2


def test_redis_away_for_max_wait_s_is_unreachable(short_path: Path, policy: str) -> None:
    server = Valkey(short_path)  # never started
    with reader(server, policy) as stream, pytest.raises(Unreachable):
        next(stream)
    with pytest.raises(Unreachable):
        next(streams.tail(policy, server.url))


def test_what_redis_refuses_is_not_tried_again(valkey: Valkey, store: redis.Redis, policy: str) -> None:
    store.set(key(policy), "something else")
    with transitions(policy, "g", "c", redis_url=valkey.url) as stream, pytest.raises(Refused, match="WRONGTYPE"):
        next(stream)
    with pytest.raises(Refused, match="WRONGTYPE"):
        next(streams.tail(policy, valkey.url))
    stranger = f"{valkey.url}?username=nobody&password=wrong"
    with transitions(policy, "g", "c", redis_url=stranger) as stream, pytest.raises(Refused):
        next(stream)


TRAINER = """
    import sys
    from surefoot import transitions
    url, policy = sys.argv[1:]
    for batch in transitions(policy, "g", "c", redis_url=url, batch_size=3, block_s=0.01):
        print(*batch.steps, flush=True)
        sys.stdin.readline()  # a training step, as long as the test wants it
"""


def test_a_killed_trainer_loses_only_what_it_had_finished(valkey: Valkey, store: redis.Redis, policy: str) -> None:
    add(store, policy, range(9))
    command = [sys.executable, "-c", textwrap.dedent(TRAINER), valkey.url, policy]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as trainer:
        assert trainer.stdin is not None
        assert trainer.stdout is not None
        assert trainer.stdout.readline() == "0 1 2\n"
        trainer.stdin.write("\n")
        trainer.stdin.flush()
        assert trainer.stdout.readline() == "3 4 5\n"  # so the first batch has been acknowledged
        trainer.send_signal(signal.SIGKILL)
    assert numbers(reader(valkey, policy)) == [3, 4, 5, 6, 7, 8]
