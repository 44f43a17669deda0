"""A trainer outlives a Redis that refuses writes for a while, as the service does."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Thread, Timer

import pytest

from surefoot import Unreachable, transitions
from surefoot.streams import Transitions
from tests.faults.stores import FORGETFUL, Store
from tests.surefoot.stream_entries import add
from tests.waiting import until

POLICY = "refused"


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store(tmp_path, *FORGETFUL) as server:
        yield server


def without_replicas(store: Store) -> None:
    store.configure("min-replicas-to-write", 1)


def failing_snapshots(store: Store) -> None:
    (store.folder / "dump.rdb").mkdir()
    store.configure("save", "3600 1")
    store.ask("BGSAVE")
    until_misconf(store)


def until_misconf(store: Store) -> None:
    def failed() -> bool:
        with store.client() as client:
            return str(client.info("persistence")["rdb_last_bgsave_status"]) == "err"

    until(failed, "a snapshot that fails")


def read_only(store: Store) -> None:
    store.ask("REPLICAOF", "127.0.0.1", 1)


def read_on(stream: Transitions) -> None:
    for _ in range(3):
        next(stream)


@pytest.mark.parametrize("refuse", [without_replicas, failing_snapshots, read_only])
def test_a_redis_that_takes_no_writes_is_away_and_not_final(store: Store, refuse: Callable[[Store], None]) -> None:
    with store.client() as client:
        add(client, POLICY, range(3))
    with transitions(POLICY, "group", "one", redis_url=store.url, batch_size=1, max_wait_s=0.5) as stream:
        next(stream).ack()
        refuse(store)
        with pytest.raises(Unreachable):
            read_on(stream)


def test_a_redis_that_changes_its_role_while_a_trainer_waits_is_away_and_not_final(store: Store) -> None:
    with store.client() as client:
        add(client, POLICY, range(1))
    with transitions(POLICY, "group", "one", redis_url=store.url, batch_size=1, max_wait_s=6.0) as stream:
        next(stream).ack()

        def flip() -> None:
            blocked(store)
            read_only(store)
            store.ask("REPLICAOF", "NO", "ONE")
            with store.client() as client:
                add(client, POLICY, range(1, 2))

        flipping = Thread(target=flip)
        flipping.start()
        try:
            assert len(next(stream)) == 1
        finally:
            flipping.join()


def blocked(store: Store) -> None:
    """Wait until somebody waits in a blocking command."""

    def waits() -> bool:
        with store.client() as client:
            return int(client.info("clients")["blocked_clients"]) > 0

    until(waits, "a trainer that waits")


def test_the_longest_wait_holds_where_only_writes_are_refused(store: Store) -> None:
    with store.client() as client:
        add(client, POLICY, range(3))
    with transitions(
        POLICY, "group", "one", redis_url=store.url, batch_size=1, max_wait_s=0.5, auto_ack=False
    ) as stream:
        next(stream).ack()
        without_replicas(store)
        healing = Timer(10.0, store.configure, ("min-replicas-to-write", 0))  # so that waiting on has an end
        healing.start()
        try:
            with pytest.raises(Unreachable):
                read_on(stream)
        finally:
            healing.cancel()
            healing.join()
