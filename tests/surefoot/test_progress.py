"""What a reader's state says: all that was handed out, nothing that was not, and only to its own stream."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
import redis
from hypothesis import given
from hypothesis import strategies as st

from surefoot.dedupe import Identity, Ids
from surefoot.progress import Progress, Stream
from tests.surefoot.stream_entries import add, key
from tests.surefoot.test_streams import numbers, pending, reader
from tests.surefoot.valkey import Valkey

OF = Stream("sf:{p}:transitions", "g")
WINDOW = 2048
SMALL = 1024
EVENTS = st.lists(st.tuples(st.sampled_from(["a", "b"]), st.integers(1, 2), st.integers(0, 10_000)), max_size=100)


@given(EVENTS, EVENTS, EVENTS)
def test_it_holds_what_is_seen_and_held_but_what_is_only_collected(
    seen: list[Identity], held: list[Identity], collected: list[Identity]
) -> None:
    first = Progress(OF, 1 << 20)
    for each in [*seen, *collected]:
        first.seen.add(*each)
    second = Progress.read(OF, 1 << 20, first.dump(held, collected))
    for each in [*seen, *held, *collected]:
        assert second.trained(each) == (each not in collected)
    assert set(map(second.trained, held)) <= {True, False}
    assert Progress.read(OF, 1 << 20, second.dump([], [])).trained(("c", 1, 1)) is False


@given(EVENTS)
def test_what_is_held_is_known_whatever_the_window(held: list[Identity]) -> None:
    first = Progress(OF, 1)
    first.seen.add("a", 1, 1 << 40)
    second = Progress.read(OF, 1, first.dump(held, []))
    assert all(map(second.trained, held))


@given(EVENTS, EVENTS)
def test_ids_are_a_set(added: list[Identity], removed: list[Identity]) -> None:
    ids = Ids(added)
    for each in removed:
        ids.discard(*each)
    plain = set(added) - set(removed)
    assert len(ids) == len(plain)
    assert all((each in ids) == (each in plain) for each in [*added, *removed])
    again = Ids()
    again.load(ids.dump())
    assert all(each in again for each in plain)
    assert len(again) == len(plain)


@pytest.mark.parametrize("state", [b"", b"no", b"\x00" * 40, Progress(OF, 1).dump([], [])[:-6]])
def test_what_is_no_state_is_refused(state: bytes) -> None:
    with pytest.raises(ValueError, match="no state"):
        Progress.read(OF, WINDOW, state)


def test_a_state_of_another_stream_group_or_version_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    state = Progress(OF, 1).dump([], [])
    with pytest.raises(ValueError, match="belongs to"):
        Progress.read(Stream(OF.key, "other"), WINDOW, state)
    monkeypatch.setattr("surefoot.progress._VERSION", 2)
    newer = Progress(OF, 1).dump([], [])
    monkeypatch.undo()
    with pytest.raises(ValueError, match="version 2: upgrade"):
        Progress.read(OF, WINDOW, newer)


def test_a_state_is_small() -> None:
    progress = Progress(OF, 1 << 20)
    for seq in range(0, 1_000_000, 2):
        progress.seen.add("w0", 1, seq)
    assert len(progress.dump([], [])) < 20_000


def test_what_was_collected_but_not_handed_out_is_delivered(valkey: Valkey, store: redis.Redis, policy: str) -> None:
    """Three observations make three batches at once; the state knows of the first alone."""
    wide: dict[str, Any] = {"s": bytes(32), "n": b"", "b": 0, "record": {"shape": (2, 2), "dtype": "<f8"}}
    add(store, policy, [0, 1])
    add(store, policy, [2, 3], **wide)
    with reader(valkey, policy, auto_ack=False) as stream:
        assert next(stream).steps.tolist() == [0, 1]
        state = stream.state()
        assert stream.statistics()["in_flight"] == 4
    assert numbers(reader(valkey, policy, state=state)) == [2, 3]
    assert pending(store, policy) == 0


def test_what_lies_below_the_window_and_was_not_acknowledged_is_known(
    valkey: Valkey, store: redis.Redis, policy: str
) -> None:
    add(store, policy, [0])
    add(store, policy, [1], q=1 << 30)
    options: dict[str, Any] = {"auto_ack": False, "dedupe_window": SMALL}
    state: bytes | None = None
    for _ in range(3):  # the first hands out, the others know
        with reader(valkey, policy, batch_size=1, state=state, **options) as stream:
            found = [batch.steps.tolist() for batch in stream]
            assert found == ([[0], [1]] if state is None else [])
            state = stream.state()
    assert pending(store, policy) == 0


def test_copies_that_come_after_a_restart_are_known(valkey: Valkey, store: redis.Redis, policy: str) -> None:
    add(store, policy, range(3))
    with reader(valkey, policy) as stream:
        assert len([*stream]) == 1
        state = stream.state()
    add(store, policy, [1, 3, 0])
    assert numbers(reader(valkey, policy, state=state)) == [3]
    assert pending(store, policy) == 0


def test_peers_are_asked_only_about_what_somebody_was_given(valkey: Valkey, store: redis.Redis, policy: str) -> None:
    add(store, policy, range(4))
    with reader(valkey, policy, "dead", batch_size=2, auto_ack=False) as dead:
        next(dead)
        state = dead.state()
        next(dead)  # trained on, but not kept
    asked = []

    def peers() -> list[bytes]:
        asked.append(1)
        return [state]

    add(store, policy, [4])
    assert sorted(numbers(reader(valkey, policy, "heir", claim_idle_s=0.0001, peers=peers))) == [2, 3, 4]
    assert len(asked) == 1
    assert pending(store, policy) == 0


def test_peers_that_cannot_be_read_lose_nothing(valkey: Valkey, store: redis.Redis, policy: str) -> None:
    add(store, policy, range(2))
    with reader(valkey, policy, "dead") as dead:
        next(dead)
    states = [b"torn"]
    with reader(valkey, policy, "heir", claim_idle_s=0.0001, peers=lambda: states) as heir:
        with pytest.raises(ValueError, match="no state"):
            next(heir)
        states.clear()
        assert next(heir).steps.tolist() == [0, 1]


def test_a_group_that_vanished_while_the_trainer_was_away_is_a_gap_for_one_with_a_state(
    valkey: Valkey, store: redis.Redis, policy: str
) -> None:
    add(store, policy, range(3))
    with reader(valkey, policy) as stream:
        next(stream)
        state = stream.state()
    store.delete(key(policy))
    add(store, policy, [2, 3])
    with reader(valkey, policy, state=state) as stream:
        with pytest.raises(Exception, match="vanished; a new group begins with 2 entries") as caught:
            next(stream)
        assert caught.value.reason == "group_missing"  # type: ignore[attr-defined]
        assert next(stream).steps.tolist() == [3]


def test_a_state_is_msgpack_within() -> None:
    """So that other programs can look into one."""
    import zlib

    raw = zlib.decompress(Progress(OF, 1).dump([("w", 1, 1)], []))
    assert msgspec.msgpack.decode(raw) == [1, *OF, [], [["w", 1, {0: (2).to_bytes(128, "little")}]]]
