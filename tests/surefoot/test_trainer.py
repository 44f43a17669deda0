"""Trainers that are killed: each transition is in the weights exactly once, by its id. Real processes, real SIGKILL."""

from __future__ import annotations

import itertools
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import redis

from service.decision import RewardFlags
from surefoot.entries import Row
from tests.surefoot import training
from tests.surefoot.stream_entries import add, key
from tests.surefoot.test_streams import pending
from tests.surefoot.test_streams_joined import Shipper, decision, reward
from tests.surefoot.valkey import Valkey
from tests.waiting import until

ROOT = Path(__file__).parents[2]
KILLS = 20


@contextmanager
def trainer(valkey: Valkey, policy: str, path: Path, *options: str) -> Iterator[subprocess.Popen[str]]:
    """A trainer that is killed at the end, if it has not killed itself."""
    command = [sys.executable, "-m", "tests.surefoot.training", valkey.url, policy, str(path), *options]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def delivered(store: redis.Redis, policy: str) -> dict[str, Row]:
    """All transitions there are, by decision id."""
    entries: Any = store.xrange(key(policy))
    rows = (Row.read(*entry) for entry in entries)
    return {row.id: row for row in rows}


def assert_in_the_weights(kept: training.Kept, rows: dict[str, Row]) -> None:
    """The weights are those that come of training on just these ids, in this order: nothing more, nothing less."""
    weights = np.zeros(4)
    for each in kept.ids:
        weights = training.step(weights, np.frombuffer(rows[each].state, "<f4"), rows[each].reward)
    assert kept.weights == weights.tolist()


def trained(*paths: Path) -> Counter[str]:
    return Counter(each for path in paths for each in training.load(path).ids)


def settled(store: redis.Redis, policy: str, *paths: Path) -> bool:
    return set(trained(*paths)) == set(delivered(store, policy)) and not pending(store, policy)


def doubled(store: redis.Redis, policy: str) -> None:
    """Send the newest transition once more, as a service does whose Redis has come back from an old backup."""
    newest: Any = store.xrevrange(key(policy), count=1)
    if newest:
        store.xadd(key(policy), newest[0][1])


@pytest.mark.parametrize("seed", [1])
def test_killed_at_random_and_restarted_it_has_trained_on_each_transition_once(
    valkey: Valkey, store: redis.Redis, policy: str, tmp_path: Path, seed: int
) -> None:
    chance, shipper, path, shipped = random.Random(seed), Shipper(store, policy), tmp_path / "c.kept", 0
    for _ in range(KILLS):
        with trainer(valkey, policy, path) as process:
            for _ in range(chance.randint(1, 12)):
                line(process)
                # At least two: one is born at once, so that there is another line to come.
                for n in range(shipped, shipped + chance.randint(2, 8)):
                    shipper.ship(decision(n), reward(n, RewardFlags.TERMINATED if n % 7 == 6 else RewardFlags.NONE))
                    shipped = n + 1
                if chance.random() < 0.1:
                    doubled(store, policy)
    shipper.ship(reward_of_the_last := reward(shipped, RewardFlags.TERMINATED), decision(shipped))
    assert reward_of_the_last.id in delivered(store, policy)
    with trainer(valkey, policy, path):
        until(lambda: settled(store, policy, path), "all transitions to be trained on")
    rows = delivered(store, policy)
    assert len(rows) == shipped + 1
    assert set(trained(path).values()) == {1}
    assert_in_the_weights(training.load(path), rows)


@pytest.mark.parametrize("die_at", ["started", "trained", "kept", "acked"])
def test_killed_at_each_point_it_has_trained_on_each_transition_once(
    valkey: Valkey, store: redis.Redis, policy: str, tmp_path: Path, die_at: str
) -> None:
    path = tmp_path / "c.kept"
    add(store, policy, range(30))
    for _ in range(4):
        with trainer(valkey, policy, path, "--die-at", die_at, "--keep-every", "2") as process:
            process.wait(60.0)
        doubled(store, policy)
    with trainer(valkey, policy, path):
        until(lambda: settled(store, policy, path), "all transitions to be trained on")
    assert set(trained(path).values()) == {1}
    assert_in_the_weights(training.load(path), delivered(store, policy))


@pytest.mark.parametrize("die_at", ["trained", "kept", "acked"])
def test_of_two_consumers_one_dies_for_good_and_the_other_takes_over(
    valkey: Valkey, store: redis.Redis, policy: str, tmp_path: Path, die_at: str
) -> None:
    dead, heir, numbers = tmp_path / "dead.kept", tmp_path / "heir.kept", itertools.count()

    def add_until(condition: Callable[[], object], what: str) -> None:
        """Both are given their share of what keeps coming."""
        until(lambda: add(store, policy, list(itertools.islice(numbers, 6))) and condition(), what)

    with trainer(valkey, policy, heir, "--peers") as second:
        assert line(second) == "started"
        with trainer(valkey, policy, dead, "--die-at", die_at, "--keep-every", "2") as first:
            add_until(lambda: first.poll() is not None, "the first to die")
        known = set(trained(heir))
        add_until(lambda: set(trained(heir)) > known, "the other to go on")
    with trainer(valkey, policy, heir, "--peers", "--claim-idle-s", "0.001"):
        until(lambda: settled(store, policy, dead, heir), "the other to take over")
    assert set(trained(dead, heir).values()) == {1}
    for path in (dead, heir):
        assert_in_the_weights(training.load(path), delivered(store, policy))


def test_without_the_states_of_its_peers_it_trains_again_on_what_a_dead_one_has_kept(
    valkey: Valkey, store: redis.Redis, policy: str, tmp_path: Path
) -> None:
    dead, heir = tmp_path / "dead.kept", tmp_path / "heir.kept"
    add(store, policy, range(6))
    with trainer(valkey, policy, dead, "--die-at", "kept", "--keep-every", "1") as first:
        first.wait(60.0)
    with trainer(valkey, policy, heir, "--claim-idle-s", "0.001"):
        until(lambda: settled(store, policy, dead, heir), "the other to take over")
    assert sorted(trained(dead, heir).values()) == [1, 1, 2, 2, 2, 2]


def test_a_checkpoint_without_a_state_is_read() -> None:
    empty = msgspec.msgpack.encode({"ids": [], "weights": []})
    assert msgspec.msgpack.decode(empty, type=training.Kept).state is None
