"""Random worlds of holders and one bank: whatever happens, no cap is passed under any window; and budgets get spent."""

from __future__ import annotations

import random
import uuid
from typing import Any

import pytest
import redis
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)

from safety.exploration import parse_exploration
from tests.service.banks import START_MS, Bank, Fleet, World

CAPS: list[dict[str, Any]] = [
    {"rate": {"limit": 12, "window_s": 10}},
    {"share": {"limit": 0.1, "window_s": 7}},
    {"regret": {"limit": 4.5, "window_s": 13}},
    {
        "rate": {"limit": 9, "window_s": 10},
        "share": {"limit": 0.25, "window_s": 7},
        "regret": {"limit": 3, "window_s": 13},
    },
]
replicas = st.integers(0, 2)
rows = st.sampled_from([1, 3, 10, 40])


class Machine(RuleBasedStateMachine):
    """Worlds that hypothesis chooses, and makes small when it finds a fault."""

    store: redis.Redis
    world: World

    @initialize(caps=st.sampled_from(CAPS), start=st.sampled_from(["now", "next_window"]), seed=st.integers(0, 2**32))
    def begin(self, caps: dict[str, Any], start: str, seed: int) -> None:
        self.world = World(self.store, f"p-{uuid.uuid4().hex}", parse_exploration(caps | {"start": start}), seed)

    @rule(index=replicas, rows=rows, worst=st.sampled_from([0.01, 0.2, 1.0]), unlucky=st.booleans())
    def decide(self, index: int, rows: int, worst: float, unlucky: bool) -> None:
        self.world.decide(index, rows, worst, unlucky)

    @rule(index=replicas, rows=rows)
    def renew(self, index: int, rows: int) -> None:
        self.world.renew(index, rows)

    @rule(index=replicas, applied=st.booleans(), rows=rows)
    def cut_off(self, index: int, applied: bool, rows: int) -> None:
        self.world.cut_off(index, applied, rows)

    @rule(index=replicas)
    def delay(self, index: int) -> None:
        self.world.delay(index)

    @rule(which=st.integers(0, 100))
    def arrive(self, which: int) -> None:
        self.world.arrive(which)

    @rule(index=replicas)
    def die(self, index: int) -> None:
        self.world.die(index)

    @rule(index=replicas, delivered=st.booleans())
    def leave(self, index: int, delivered: bool) -> None:
        self.world.leave(index, delivered)

    @rule(ms=st.sampled_from([10, 300, 700, 2_100, 9_000, 15_000]))
    def wait(self, ms: int) -> None:
        self.world.wait(ms)

    @rule(index=replicas, seconds=st.sampled_from([-3600.0, -5.0, -0.5, 0.5, 5.0, 3600.0]))
    def turn_a_replicas_clock(self, index: int, seconds: float) -> None:
        self.world.turn_a_replicas_clock(index, seconds)

    @rule(ms=st.sampled_from([-20_000, -3_000, -100, 3_000, 20_000]))
    def turn_the_banks_clock(self, ms: int) -> None:
        self.world.turn_the_banks_clock(ms)

    @rule()
    def lose_memory(self) -> None:
        self.world.lose_memory()

    @invariant()
    def no_cap_is_passed(self) -> None:
        if hasattr(self, "world"):
            self.world.check()

    def teardown(self) -> None:
        if hasattr(self, "world"):
            self.world.bank.forget()


def test_no_cap_is_ever_passed(store: redis.Redis) -> None:
    Machine.store = store
    quick = settings(max_examples=40, stateful_step_count=50, deadline=None, suppress_health_check=list(HealthCheck))
    run_state_machine_as_test(Machine, settings=quick)


@pytest.mark.parametrize("seed", range(24))
def test_no_cap_is_ever_passed_in_a_long_world(store: redis.Redis, policy: str, seed: int) -> None:
    caps = CAPS[seed % len(CAPS)] | {"start": "now" if seed // len(CAPS) % 2 else "next_window"}
    world = World(store, policy, parse_exploration(caps), seed)
    chance = random.Random(seed)
    for _ in range(500):
        world.one_of_many_things(chance)
        world.check()
    assert sum(world.fleet.record.explored.values()) > 10


@pytest.mark.parametrize("start", ["now", "next_window"])
def test_long_worlds_keep_their_caps_and_still_explore(store: redis.Redis, policy: str, start: str) -> None:
    """Much traffic, renewals as they fall due, a death every few seconds: most of what may be spent is."""
    caps = {"rate": {"limit": 300, "window_s": 20}, "share": {"limit": 0.2, "window_s": 20}}
    fleet = Fleet(Bank(store, policy), parse_exploration(caps | {"start": start}), seed=5)
    for _ in range(3):
        fleet.add()
    for turn in range(20):
        fleet.play(START_MS + (turn + 1) * 3_000, 50, 40.0, 0.5)
        fleet.replicas.pop(turn % 3)
        fleet.add()
    assert not fleet.record.excess(fleet.exploration)
    whole = {START_MS // 20_000 + n for n in (1, 2)}  # the first is closed when the budget starts with the next window
    for kind in ("rate", "share"):
        spent = [n for (k, window), n in fleet.record.explored.items() if k == kind and int(window[6:]) in whole]
        assert len(spent) == 2
        assert min(spent) > 200


# Pacing: what a budget undershoots by under steady load

STEADY = [
    ({"rate": {"limit": 60, "window_s": 60}}, 1, 20.0),
    ({"rate": {"limit": 60, "window_s": 60}}, 4, 10.0),
    ({"rate": {"limit": 40, "window_s": 10}}, 2, 25.0),
    ({"share": {"limit": 0.05, "window_s": 60}}, 3, 20.0),
    ({"regret": {"limit": 30, "window_s": 60}}, 3, 20.0),
]


@pytest.mark.parametrize(("caps", "count", "per_s"), STEADY)
def test_under_steady_load_nine_tenths_of_a_budget_are_spent_and_evenly(
    store: redis.Redis, policy: str, caps: dict[str, Any], count: int, per_s: float
) -> None:
    fleet = Fleet(Bank(store, policy), parse_exploration(caps | {"start": "now"}), seed=3)
    for _ in range(count):
        fleet.add()
    cap = fleet.exploration.caps[0]
    windows = 3
    halves = []
    for half in range(2 * windows):
        fleet.play(START_MS + (half + 1) * cap.window_ms // 2 - 50, 50, per_s, 0.4)
        spent = fleet.record.paid if cap.kind == "regret" else fleet.record.explored
        halves.append(sum(spent.values()))
    record = fleet.record
    assert not record.excess(fleet.exploration)
    for index in range(windows):
        key = cap.kind, f"{cap.window_ms}:{START_MS // cap.window_ms + index}"
        whole = cap.limit * record.decisions[key] if cap.kind == "share" else cap.limit
        spent_here = record.paid[key] if cap.kind == "regret" else record.explored[key]
        assert spent_here >= 0.9 * whole
    if cap.kind != "share":
        first_half = halves[2] - halves[1]
        assert 0.3 * cap.limit < first_half < 0.7 * cap.limit


def test_a_budget_of_a_few_is_found_by_those_who_decide(store: redis.Redis, policy: str) -> None:
    """Six explored decisions a minute for ten replicas: an idle one that holds some gives it back."""
    caps = {"rate": {"limit": 6, "window_s": 60}, "start": "now"}
    fleet = Fleet(Bank(store, policy), parse_exploration(caps), seed=1)
    for _ in range(10):
        fleet.add()
    fleet.play(START_MS + 2_000, 50, 5.0, 0.0)  # all have leases and have measured their load; nothing wants to explore
    idle, fleet.replicas = fleet.replicas[:9], fleet.replicas[9:]
    for _ in range(58):
        for each in idle:
            each.clock_s += 1.0
            if each.holder.due_s <= each.clock_s:
                each.renew()
        fleet.play(fleet.bank.now_ms + 1_000, 50, 50.0, 0.5)
    assert sum(fleet.record.explored.values()) == 6


def test_a_dead_holder_burns_little(store: redis.Redis, policy: str) -> None:
    caps = {"rate": {"limit": 1_000, "window_s": 3_600}, "start": "now"}
    fleet = Fleet(Bank(store, policy), parse_exploration(caps), seed=2)
    fleet.add(), fleet.add()
    fleet.play(START_MS + 20_000, 50, 20.0, 1.0)
    dead = fleet.replicas.pop()
    burnt = dead.holder.standing(dead.clock_s).left.rate
    assert 0 < burnt <= 5
    assert fleet.bank.now_ms < START_MS + 3_600_000
