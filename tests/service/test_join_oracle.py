"""Random worlds: producers that are cut off, lose replies and resend; Redis that is set back, emptied or away.

Each world is driven through the script and the model, which must do the same at every call. Where the world has one
reward for a decision, what comes out is also held against what happened: one transition for each decision, with the
reward that was accepted in time and the successor that there was.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import pytest
import redis

from service.decision import DecisionEvent, Event, RewardFlags
from service.join import BREAK_MS, JoinConfig
from service.join_model import Batch, ReferenceJoin
from service.redis_streams import SCRIPT
from tests.service.joining import Fields, ScriptJoin, decision, modelled, reward

START_MS = 1_000_000
TICK_MS = 1_000
QUIET_TICK_MS = BREAK_MS // 2
WINDOW_MS = 20_000
CONFIG = JoinConfig(max_lag_ms=90_000, sweep_limit=10_000, default_reward="-0.5")
PRODUCERS = ("A", "B", "C")


@dataclass
class Truth:
    """What happened: the reward accepted in time, and the state that came next."""

    reward: str | None = None
    following: str = ""


@dataclass
class Producer:
    name: str
    skew_ms: int
    away: tuple[int, int]  # cut off from Redis between these times
    spool: list[tuple[int, Event]] = field(default_factory=list)
    written: int = 0  # rows of the spool that have happened by now
    acked: int = 0


class World:
    """What will happen, in order of true time, and who records it."""

    def __init__(self, seed: int, steps: bool, noise: bool, episodes: int = 6) -> None:
        self.random = random.Random(seed)
        self.steps, self.noise = steps, noise
        self.truth: dict[str, Truth] = {}
        begin = self.random.randint(START_MS, START_MS + 40_000)
        self.producers = [
            Producer(name, self.random.choice([0, -3000, 2500]), (begin + lag, begin + lag + 60_000))
            for name in PRODUCERS
            for lag in [self.random.randint(0, 30_000)]
        ]
        happening: list[tuple[int, Producer, Event]] = []
        for number in range(episodes):
            happening += self._episode(f"e{number}" if number else "")
        happening.sort(key=lambda each: each[0])
        for _, producer, event in happening:
            producer.spool.append((event.at_ms, event))
        for producer in self.producers:
            producer.spool.sort(key=lambda each: each[0])
        self.end_ms = happening[-1][0] + WINDOW_MS

    def _episode(self, name: str) -> list[tuple[int, Producer, Event]]:
        when = START_MS + self.random.randint(0, 30_000)
        played: list[tuple[int, Producer, DecisionEvent]] = []
        for step in range(self.random.randint(3, 10)):
            when += self.random.randint(50, 2_000)
            producer = self.random.choice(self.producers)
            number = step if self.steps else -1
            taken = decision(f"{name}_{step}", name, number, when + producer.skew_ms, WINDOW_MS)
            played.append((when, producer, taken))
        order = played if self.steps else sorted(played, key=lambda each: (each[2].at_ms, each[2].id))
        happening: list[tuple[int, Producer, Event]] = [*played]
        for index, (at, _, taken) in enumerate(order):
            last = index == len(order) - 1 or not name
            self.truth[taken.id] = Truth(None, "" if last else order[index + 1][2].state.decode())
            if last or self.random.random() < 0.85:
                happening += self._rewards(at, taken, last and bool(name))
        return happening

    def _rewards(self, after: int, taken: DecisionEvent, terminal: bool) -> list[tuple[int, Producer, Event]]:
        """One reward, perhaps posted twice; with noise, also others that contradict it."""
        flags = int(RewardFlags.TERMINATED) if terminal else 0
        value = f"{len(self.truth)}.5"
        posted: list[tuple[int, Producer, Event]] = []
        when = after + self.random.randint(5, int(WINDOW_MS * 1.1))
        for _ in range(self.random.choice([1, 1, 1, 2])):
            producer = self.random.choice(self.producers)
            at = when + producer.skew_ms
            posted.append((when, producer, reward(taken.id, at, value, flags=flags, until=at + WINDOW_MS)))
            if at <= taken.due_ms:
                self.truth[taken.id].reward = value
            when += self.random.randint(1, 500)
        if self.noise:
            posted += [self._noise(after, taken) for _ in range(self.random.choice([0, 0, 1, 2, 12]))]
        return posted

    def _noise(self, after: int, taken: DecisionEvent) -> tuple[int, Producer, Event]:
        producer, when = self.random.choice(self.producers), after + self.random.randint(-500, int(WINDOW_MS * 1.2))
        at = when + producer.skew_ms
        event = reward(
            taken.id if self.random.random() < 0.9 else "never-shipped",
            at,
            self.random.choice(["7.0", "8.0"]),
            self.random.choice(["", "a", "b", *"cdefghij"]),
            self.random.choice([0, 0, 0, *RewardFlags]),
            self.random.choice(["", "", "", taken.action, taken.action + "1"]),
            self.random.choice([b"", b"", b"sent"]),
            until=at + self.random.choice([0, WINDOW_MS]),
        )
        return when, producer, event


class Run:
    """One world, through script and model side by side. `compared` is False for a script that is wrong on purpose."""

    def __init__(self, world: World, script: ScriptJoin, compared: bool = True) -> None:
        self.world, self.script, self.model = world, script, ReferenceJoin(script.config)
        self.compared = compared
        self.gaps = self.resent = 0
        self.now = START_MS
        self.until(START_MS - 10_000, START_MS)  # all are heard of before anything happens, whatever their clocks say

    def to_the_end(self) -> None:
        """Play to the end of the world, and on until nothing can wait for anything any more."""
        self.now = self.until(self.now, max(self.now, self.world.end_ms))
        # Nothing happens any more but heartbeats: so rarely as still passes for a shipper's pace.
        self.now = self.until(self.now, self.now + 3 * CONFIG.max_lag_ms, tick_ms=QUIET_TICK_MS)

    def until(self, begin_ms: int, end_ms: int, cut_off: bool = False, tick_ms: int = TICK_MS) -> int:
        for now in range(begin_ms, end_ms, tick_ms):
            for producer in self.world.random.sample(self.world.producers, len(PRODUCERS)):
                while producer.written < len(producer.spool) and (
                    producer.spool[producer.written][0] <= now + producer.skew_ms
                ):
                    producer.written += 1
                if not cut_off and not producer.away[0] <= now < producer.away[1]:
                    self._ship_all(producer, now)
        return end_ms

    def _ship_all(self, producer: Producer, now: int) -> None:
        """Ship what is written, as the shipper does: rewind at a gap, again when the reply is lost."""
        while True:
            stop = min(producer.written, producer.acked + self.world.random.choice([1, 4, 16]))
            rest = producer.spool[stop][0] if stop < producer.written else now + producer.skew_ms
            events = tuple(event for _, event in producer.spool[producer.acked : stop])
            batch = Batch(producer.name, 1, producer.acked + 1, events, rest - 1, now)
            seen = self.script.ship(batch, self.world.random.choice([1, 2, 5]))
            if self.compared:
                assert seen == modelled(self.model.ship(batch))
            if seen.gap:
                producer.acked, self.gaps = seen.last, self.gaps + 1
            elif self.world.random.random() < 0.05:
                self.resent += len(events)
            else:
                assert seen.last >= stop
                producer.acked = seen.last
                if stop == producer.written:
                    return

    def set_back(self, ms: int) -> None:
        """Live on for a while, then have Redis as it was before."""
        snapshot, model = self.script.snapshot(), copy.deepcopy(self.model)
        self.now = self.until(self.now, self.now + ms)
        self.script.restore(snapshot)
        self.model = model

    def check(self) -> dict[str, Fields]:
        """Every decision gave exactly one transition; nothing is left but what has a life of its own."""
        born = self.script.entries()
        found = {each["i"].decode(): each for each in born}
        assert len(born) == len(found)
        assert set(found) == set(self.world.truth)
        passing = {"r", "due", "ord", "early", "o", "whole", "ends", "kw"}
        left = {key for key in self.script.suffixes() if key.split(":")[0] in passing}
        assert left == set()
        return found

    def check_truth(self) -> None:
        wrong = {}
        for id, fields in self.check().items():
            truth = self.world.truth[id]
            told = Truth(fields["r"].decode() if fields["j"] == b"joined" else None, fields["n"].decode())
            if told != truth:
                wrong[id] = (told, truth)
        assert wrong == {}


def failover(run: Run) -> None:
    """Redis is replaced by a replica four seconds behind."""
    run.now = run.until(START_MS, START_MS + 30_000)
    run.set_back(4_000)


def emptied(run: Run) -> None:
    run.now = run.until(START_MS, START_MS + 45_000)
    run.script.forget()
    run.model = ReferenceJoin(run.script.config)


def redis_away(run: Run) -> None:
    """For longer than max_lag: each producer's silence is Redis's, and the first to come back must not close what the
    others hold."""
    for producer in run.world.producers:
        producer.away = (0, 0)
    run.now = run.until(START_MS, START_MS + 8_000)
    run.now = run.until(run.now, run.now + CONFIG.max_lag_ms + 30_000, cut_off=True)


def old_backup(run: Run) -> None:
    """Older than max_lag."""
    run.now = run.until(START_MS, START_MS + 12_000)
    run.set_back(CONFIG.max_lag_ms + 40_000)


Happens = Callable[[Run], None]
HAPPENS: dict[Happens, Sequence[int]] = {
    failover: range(14),
    emptied: [*range(100, 106), 5012, 5018],  # in the last two the first to come back has shipped nothing before
    redis_away: range(200, 208),
    old_backup: range(300, 304),
}


def live(happens: Happens, run: Run) -> None:
    happens(run)
    run.to_the_end()
    run.check_truth()


@pytest.mark.parametrize("happens", HAPPENS, ids=lambda happens: happens.__name__)
def test_every_decision_gets_its_reward_and_its_successor(store: redis.Redis, policy: str, happens: Happens) -> None:
    gaps = resent = 0
    for seed in HAPPENS[happens]:
        run = Run(World(seed, steps=seed % 2 == 0, noise=False), ScriptJoin(store, f"{policy}{seed}", CONFIG))
        live(happens, run)
        gaps, resent = gaps + run.gaps, resent + run.resent
    assert resent > 0
    assert gaps > 0 or happens is redis_away


def test_contradicting_and_early_rewards_do_in_redis_what_they_do_in_the_model(store: redis.Redis, policy: str) -> None:
    """Here some producers are silent for longer than max_lag, so that what they bring is overtaken."""
    ends, joins, aside = set(), set(), set()
    for seed in range(400, 412):
        world = World(seed, steps=seed % 2 == 0, noise=True)
        for producer in world.producers[: seed % 3]:
            producer.away = (producer.away[0], producer.away[0] + CONFIG.max_lag_ms + 60_000)
        run = Run(world, ScriptJoin(store, f"{policy}{seed}", CONFIG))
        run.to_the_end()
        found = run.check().values()
        ends |= {each["x"] for each in found}
        joins |= {each["j"] for each in found}
        aside |= {each["w"] for each in run.script.entries("late")}
        aside |= {b"correction" for _ in run.script.entries("correction")}
        aside |= {b"orphan" for _ in run.script.entries("orphan")}
    assert ends == {b"none", b"terminated", b"truncated", b"lost", b"single"}
    assert joins == {b"joined", b"defaulted", b"void"}
    assert aside == {b"late", b"closed", b"correction", b"orphan"}


# What the script would be without one of its rules, and the worlds that must notice.
WEAKENED: dict[str, tuple[Happens, str, str]] = {
    "sweep by the wall clock": (failover, "if not low or now < hold then low = 0 end", "low = now"),
    "no order behind the watermark": (failover, "or tonumber(found[2]) > horizon then", "then"),
    "any later step follows": (failover, "d[1], d[2] + 1))\n  else", "d[1], d[2] + 2))\n  else"),
    "no gap": (failover, "if first > last + 1 and not force then return {'GAP', last} end", ""),
    "late by arrival": (failover, "if r[3] > d[3] then", "if now > d[3] then"),
    "default overtaken": (failover, "if r[3] > d[3] then", "if false then"),
    "a loss of memory goes unnoticed": (emptied, "hold = now + max_lag", "hold = 0"),
    "the past of a new lane goes unnoticed": (emptied, "oldest < since - BREAK_MS", "false"),
    "a break is the producers' silence": (redis_away, "or now - called > BREAK_MS then", "then"),
}


@pytest.mark.parametrize("rule", WEAKENED)
def test_a_script_without_one_of_its_rules_is_noticed(store: redis.Redis, policy: str, rule: str) -> None:
    happens, there, instead = WEAKENED[rule]
    source = SCRIPT.decode()
    assert source.count(there) == 1
    weak = source.replace(there, instead).encode()
    noticed = 0
    for seed in HAPPENS[happens]:
        world = World(seed, steps=seed % 2 == 0, noise=False)
        run = Run(world, ScriptJoin(store, f"{policy}{seed}", CONFIG, weak), compared=False)
        try:
            live(happens, run)
        except AssertionError:
            noticed += 1
            break
    assert noticed
