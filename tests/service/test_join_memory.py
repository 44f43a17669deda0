"""What the join keeps in Redis, and for how long: as little as gives exact transitions, and never less."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import redis

from service.decision import RewardFlags
from service.join import JoinConfig
from tests.service.joining import Both, ScriptJoin, beat, decision, reward

TERMINATED = int(RewardFlags.TERMINATED)
DAY_MS = 86_400_000


@pytest.fixture
def join(store: redis.Redis, policy: str) -> Both:
    return Both(ScriptJoin(store, policy))


def of_episodes(join: Both) -> set[str]:
    return {key for key in join.script.suffixes() if key[:2] in {"e:", "w:", "s:", "t:"}}


def test_an_endless_episode_leaves_nothing_behind(join: Both) -> None:
    for n in range(30):
        now = 1_000 + n * 100
        join(decision(f"s{n}", "steps", n, now), decision(f"t{n}", "time", -1, now), through=now - 1)
        join(reward(f"s{n}", now), reward(f"t{n}", now), through=now)
        join(decision(f"u{n}", "told", n, now), reward(f"u{n}", now, sent=b"x"), through=now)
    assert of_episodes(join) == {"w:steps:30", "w:told:30", "s:t29", "t:time"}
    assert join.script.client.zcard(join.script.base + ":t:time") == 1


@pytest.mark.parametrize(
    "options", [{"flags": TERMINATED}, {"sent": b"x"}, {"executed": "0"}], ids=["end", "sent", "void"]
)
def test_ended_episodes_leave_nothing_behind(join: Both, options: dict[str, Any]) -> None:
    """Here each decision closes before its time has passed, and no later one of its episode cleans up behind it."""
    for n in range(10):
        now = 1_000 + n * 100
        join(decision(f"{n}", f"ep{n}", -1, now), reward(f"{n}", now, **options), through=now - 1)
    join(through=3_000)
    assert of_episodes(join) == set()


def test_an_ended_episode_of_steps_leaves_nothing_behind(join: Both) -> None:
    for n in range(10):
        join(decision(f"{n}", "ep", n), reward(f"{n}", flags=TERMINATED if n == 9 else 0))
    assert of_episodes(join) == set()


def test_a_record_is_packed_as_an_array(join: Both) -> None:
    join(decision("p"), decision("c"), reward("c"))
    heads = [join.script.client.getrange(f"{join.script.base}:d:{id}", 0, 1) for id in "pc"]
    assert heads == [b"P\x9d", b"C\xdc"]


def test_what_a_machine_ships_again_after_a_long_night_gives_no_second_transition(
    store: redis.Redis, policy: str
) -> None:
    """Killed before its spool was tidied up, and started again when the closed records had long expired."""
    script = ScriptJoin(store, policy, JoinConfig(record_ttl_ms=1))
    shipped = decision("a"), reward("a")
    script.ship(beat("w", 1, *shipped, now=1_000))
    gone(lambda: not store.exists(script.base + ":d:a"))
    later = 1_000 + 60 * DAY_MS
    for _ in range(2):
        script.ship(beat("new", 1, now=later))
    seen = script.ship(beat("w", 1, *shipped, decision("b"), now=later))
    assert (seen.gap, seen.last, seen.pending) == (False, 3, 1)
    assert [each["i"] for each in script.entries()] == [b"a"]


@pytest.mark.parametrize(("bye", "days"), [(True, 7), (False, 90)], ids=["bye", "vanished"])
def test_a_lane_is_forgotten_once_nothing_of_it_can_come_again(join: Both, bye: bool, days: int) -> None:
    join(decision("a"), lane="old")
    join(lane="old", bye=bye)
    lanes = join.script.base + ":wm"
    join.script.ship(beat("w", 1, now=1_000 + days * DAY_MS - 1))
    assert join.script.client.hlen(lanes) == 2
    join.script.ship(beat("w", 1, now=1_000 + days * DAY_MS))
    assert join.script.client.hkeys(lanes) == [b"w:1"]


def gone(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


@pytest.mark.parametrize("step", [0, -1], ids=["steps", "time"])
def test_a_state_outlives_its_record_until_its_predecessor_has_closed(
    store: redis.Redis, policy: str, step: int
) -> None:
    script = ScriptJoin(store, policy, JoinConfig(record_ttl_ms=1))
    script.ship(
        beat("w", 1, decision("a", "ep", step, 1_000), decision("b", "ep", step + 1 if step >= 0 else -1, 1_001))
    )
    script.ship(beat("w", 3, reward("b", flags=TERMINATED), through=2_000))
    gone(lambda: not store.exists(script.base + ":d:b"))
    assert script.ship(beat("w", 4, reward("a"), through=2_000)).transitions["a"]["n"] == b"state of b"


def test_of_an_episode_its_last_decision_is_known_for_a_while(store: redis.Redis, policy: str) -> None:
    script = ScriptJoin(store, policy, JoinConfig(episode_ttl_ms=70_000))
    script.ship(beat("w", 1, decision("a", "ep", 0), decision("b", "ep", 1), reward("b", flags=TERMINATED)))
    ttl: Any = store.pttl(script.base + ":z:ep")
    assert 0 < ttl <= 70_000


def test_open_records_do_not_expire_and_closed_ones_do(store: redis.Redis, policy: str) -> None:
    script = ScriptJoin(store, policy, JoinConfig(record_ttl_ms=50_000, successor_ttl_ms=90_000))
    script.ship(beat("w", 1, decision("a", "ep", 0), decision("b"), reward("b"), reward("early")))
    ttl: dict[str, Any] = {key: store.pttl(f"{script.base}:{key}") for key in ("d:a", "r:early", "d:b")}
    assert ttl["d:a"] == ttl["r:early"] == -1
    assert 0 < ttl["d:b"] <= 50_000
