"""Random worlds in which decisions get several rewards, episodes get theirs, and records of n steps are written.

As in `test_join_oracle.py` each world is driven through the script and the model, and what comes out is held against
what happened: the rewards that count are computed here from event times alone, by other code than the model's.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from fractions import Fraction

import pytest
import redis

from service.decision import DecisionEvent, Event, RewardFlags
from service.join import Aggregation, JoinConfig
from service.redis_streams import SCRIPT
from tests.service.joining import Fields, ScriptJoin, reward, whole
from tests.service.test_join_oracle import CONFIG, START_MS, WINDOW_MS, Happens, Producer, Run, Truth, World, failover

AGGREGATIONS: tuple[Aggregation, ...] = ("sum", "last", "max", "min", "mean")
FINAL, TERMINATED = int(RewardFlags.FINAL), int(RewardFlags.TERMINATED)


@dataclass(frozen=True)
class Part:
    at: int
    id: str
    value: float
    flags: int


class Generous(World):
    """Each decision gets up to five rewards, from anywhere; steps before the last may be told that one was final."""

    def __init__(self, seed: int, steps: bool) -> None:
        self.parts: dict[str, list[Part]] = {}
        self.due: dict[str, tuple[int, str]] = {}  # and the episode
        super().__init__(seed, steps, noise=False)

    def _rewards(self, after: int, taken: DecisionEvent, terminal: bool) -> list[tuple[int, Producer, Event]]:
        found = self.parts.setdefault(taken.id, [])
        self.due[taken.id] = taken.due_ms, taken.episode
        posted: list[tuple[int, Producer, Event]] = []
        for number in range(self.random.randint(1, 5)):
            producer = self.random.choice(self.producers)
            when = after + self.random.randint(5, int(WINDOW_MS * 1.2))
            flags = 0 if terminal else self.random.choice([0, 0, 0, 0, FINAL])
            if terminal and number == 0:
                flags = TERMINATED
            part = Part(when + producer.skew_ms, f"r{number}", self.random.choice([-2.5, 0.1, 0.2, 3.0]), flags)
            for _ in range(self.random.choice([1, 1, 2])):  # a copy is accepted later, and changes nothing
                until = part.at + WINDOW_MS
                posted.append(
                    (when, producer, reward(taken.id, part.at, repr(part.value), part.id, flags, until=until))
                )
            found.append(part)
        return posted

    def expected(self, id: str, how: Aggregation) -> Fraction | None:
        """The reward that a decision's transition should have; None: the default."""
        (due, episode), parts = self.due.get(id, (0, "")), self.parts.get(id, [])
        ends = [
            part.at
            for other, found in self.parts.items()
            for part in found
            if episode and self.due[other][1] == episode and part.flags & TERMINATED and part.at <= self.due[other][0]
        ]
        timely = [part for part in parts if part.at <= due]
        if not timely:
            return None
        until = min([due, *(part.at for part in timely if part.flags & (FINAL | TERMINATED))])
        if ends:
            until = min(until, max(min(ends), min(part.at for part in timely)))
        counted = [Fraction(part.value) for part in sorted(timely, key=lambda p: (p.at, p.id)) if part.at <= until]
        mean = sum(counted, Fraction()) / len(counted)
        return {
            "sum": mean * len(counted),
            "last": counted[-1],
            "max": max(counted),
            "min": min(counted),
            "mean": mean,
        }[how]


def check_rewards(run: Run, world: Generous, how: Aggregation) -> None:
    wrong = {}
    for id, fields in run.check().items():
        expected = world.expected(id, how)
        told = float(fields["r"]) if fields["j"] == b"joined" else None
        same = told is None if expected is None else told is not None and math.isclose(told, expected, abs_tol=1e-12)
        if not same:
            wrong[id] = (told, expected, world.parts.get(id))
    assert wrong == {}


def check_chains(run: Run, n: int) -> int:
    """Every transition with a reward begins one record, which follows the transitions' own links."""
    born = {each["i"].decode(): each for each in run.script.entries()}
    records = {each["i"].decode(): each for each in run.script.entries("nstep")}
    assert set(records) == {id for id, each in born.items() if each["r"]}
    assert len(records) == len(run.script.entries("nstep"))
    for id, record in records.items():
        ids, at = [id], born[id]
        while len(ids) < n and at["x"] == b"none" and at["ni"] and born[at["ni"].decode()]["r"]:
            at = born[at["ni"].decode()]
            ids.append(at["i"].decode())
        assert record["ids"].decode().split(",") == ids
        assert record["rs"].split(b",") == [born[each]["r"] for each in ids]
        assert all(record[name] == at[name] for name in ("x", "b", "n", "nm", "ni", "o"))
    return max(int(record["k"]) for record in records.values())


@pytest.mark.parametrize("how", AGGREGATIONS)
def test_what_was_accepted_in_time_is_aggregated(store: redis.Redis, policy: str, how: Aggregation) -> None:
    config = JoinConfig(CONFIG.max_lag_ms, CONFIG.sweep_limit, default_reward="-0.5", aggregation=how, n_step=3)
    gaps = 0
    for seed in range(500, 508):
        world = Generous(seed, steps=seed % 2 == 0)
        run = Run(world, ScriptJoin(store, f"{policy}{seed}", config))
        _live(failover, run)
        check_rewards(run, world, how)
        assert check_chains(run, 3) > 1
        gaps += run.gaps
    assert gaps > 0


def _live(happens: Happens, run: Run) -> None:
    happens(run)
    run.to_the_end()


class Contradicting(World):
    """Noise as in the other worlds, whole episodes that are rewarded, and versions that change within them."""

    def _episode(self, name: str) -> list[tuple[int, Producer, Event]]:
        happening = super()._episode(name)
        for _ in range(self.random.choice([0, 1, 1, 2])):
            producer, when = self.random.choice(self.producers), START_MS + self.random.randint(0, 60_000)
            value, id = self.random.choice(["5.0", "6.0"]), self.random.choice(["", "w"])
            flags = self.random.choice([TERMINATED, int(RewardFlags.TRUNCATED)])
            played = self.random.choice([name, name, name, "never-played"])
            if played:
                happening.append((when, producer, whole(played, when + producer.skew_ms, value, id, flags)))
        return happening


@pytest.mark.parametrize("how", ["first", *AGGREGATIONS])
def test_contradictions_do_in_redis_what_they_do_in_the_model(
    store: redis.Redis, policy: str, how: Aggregation
) -> None:
    config = JoinConfig(
        CONFIG.max_lag_ms, CONFIG.sweep_limit, default_reward="-0.5", aggregation=how, low="-100", high="9", n_step=3
    )
    seen: Counter[str] = Counter()
    for seed in range(600, 608):
        world = Contradicting(seed, steps=seed % 2 == 0, noise=True)
        for producer in world.producers[: seed % 3]:
            producer.away = (producer.away[0], producer.away[0] + CONFIG.max_lag_ms + 60_000)
        run = Run(world, ScriptJoin(store, f"{policy}{seed}", config))
        run.to_the_end()
        run.check()
        check_chains(run, 3)
        seen.update(f"join {each['j'].decode()}" for each in run.script.entries())
        for stream in ("late", "correction", "quarantined", "orphan"):
            seen.update(_words(stream, each) for each in run.script.entries(stream))
    words = {"joined", "defaulted", "void", "quarantined"}
    assert {f"join {word}" for word in words} <= set(seen)
    assert {"late late", "late closed", "correction", "orphan"} <= set(seen)


def _words(stream: str, entry: Fields) -> str:
    return f"{stream} {entry['w'].decode()}" if stream == "late" else stream


def test_the_truth_is_computed_from_event_times() -> None:
    """The oracle of this page, on a case worked out by hand."""
    world = Generous.__new__(Generous)
    world.truth = {"a": Truth()}
    world.due = {"a": (100, "ep"), "b": (200, "ep")}
    world.parts = {
        "a": [Part(90, "1", 1.0, 0), Part(20, "2", 2.0, 0), Part(101, "3", 4.0, 0)],
        "b": [Part(50, "1", 8.0, TERMINATED)],
    }
    assert world.expected("a", "sum") == 2
    world.due["a"] = (100, "other")
    assert world.expected("a", "sum") == 3


# What the script would be without one of its rules; the worlds above must notice.
WEAKENED = {
    "a last word is overheard": ("if last_word then til = math.min(til, r[3]) end", ""),
    "an episode's end is overheard": ("return ended and math.min(til, math.max(ended, earliest)) or til", "return til"),
    "an episode's end shuts out the first reward": ("math.max(ended, earliest)", "ended"),
    "what comes behind the last word counts": ("if r[3] <= til then counted", "if true then counted"),
    "the order of arrival counts": (
        "table.sort(counted, function(a, b) return a[3] < b[3] or (a[3] == b[3] and a[1] < b[1]) end)", "",
    ),
    "sums close by the wall clock": ("until_time(DUE, low)", "until_time(DUE, now)"),
    "records are as long as there are steps": ("#steps < n_step do", "true do"),
    "records do not wait": ("if not d.closed then return nil, d.id end", "if not d.closed then break end"),
}  # fmt: skip


@pytest.mark.parametrize("rule", WEAKENED)
def test_a_script_without_one_of_its_rules_is_noticed(store: redis.Redis, policy: str, rule: str) -> None:
    there, instead = WEAKENED[rule]
    source = SCRIPT.decode()
    assert source.count(there) == 1
    weak = source.replace(there, instead).encode()
    config = JoinConfig(CONFIG.max_lag_ms, CONFIG.sweep_limit, default_reward="-0.5", aggregation="last", n_step=3)
    noticed = 0
    for seed in range(500, 516):
        world = Generous(seed, steps=seed % 2 == 0)
        run = Run(world, ScriptJoin(store, f"{policy}{seed}", config, weak), compared=False)
        try:
            _live(failover, run)
            check_rewards(run, world, "last")
            check_chains(run, 3)
        except (AssertionError, redis.ResponseError):
            noticed += 1
            break
    assert noticed
