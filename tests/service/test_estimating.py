"""Live estimates over real streams in a real Valkey: units count once, whoever reads, dies, or is overtaken."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import msgspec
import pytest
import redis

from service.estimate_rows import entry_id
from service.estimate_store import GROUP, EstimateStore
from service.estimate_tallies import Line, Watched
from service.redis_streams import RedisStreams, base, connect
from service.trimming import Rules, trim
from tests.service.estimated import SHADOW, Worker, add, add_score, closed, entry, record, score, watched, worker

EVERYTHING_GOES = Rules(max_age_ms=0, max_bytes=10**15, keep=0, settle_ms=0)


Event = tuple[int, Callable[[redis.Redis, str], None]]  # when it reaches Redis


@dataclass
class World:
    """What happens, as calls in the order in which they reach Redis, for one policy or several alike."""

    seed: int
    objective: str
    events: list[Event] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)

    def made(self, base_ms: int, seconds: int = 20) -> World:
        """Episodes with holes, switches and lost ends, keys that come again; entries out of order, scores early."""
        found: list[Event] = []
        rng = self.random
        for unit in range(60):
            start = base_ms + rng.randrange(seconds * 1000)
            length = rng.choice([1, 2, 3, 6])
            for step in range(length):
                at = start + step * rng.choice([50, 300, 700])
                found += self._decision(f"d{unit}-{step}", unit, step, length, at)
        self.events = sorted(found, key=lambda each: each[0])
        return self

    def _decision(self, name: str, unit: int, step: int, length: int, at: int) -> list[Event]:
        rng, action = self.random, self.random.randrange(2)
        if rng.random() < 0.05:
            return []  # lost
        recorded = record(action=action, switched=rng.random() < 0.03, key=f"k{unit % 30}" if unit % 3 else None)
        join = rng.choices(["joined", "defaulted", "void", "quarantined"], [20, 2, 1, 1])[0]
        reward = None if join in ("void", "quarantined") else rng.random()
        last = step == length - 1
        end = rng.choice(["terminated", "truncated", "lost"]) if last else "none"
        place = {"ep": f"e{unit}", "st": step} if self.objective == "episode" else {}
        fields = entry(name, at, recorded, action, reward, j=join, x=end, **place)
        came = at + rng.choice([0, 10, 400, 1_000])
        found: list[Event] = [(came, lambda store, policy: add(store, policy, fields))]
        if rng.random() < 0.9:
            raw = score(name, action)
            found.append((at + rng.choice([0, 200, 800]), lambda store, policy: add_score(store, policy, name, raw)))
        return found


@asynccontextmanager
async def workers(url: str, *names: str, **settings: Any) -> AsyncIterator[list[Worker]]:
    found = [worker(RedisStreams(connect(url)), name, **settings) for name in names]
    try:
        yield found
    finally:
        for each in found:
            await each.close()


async def lines(one: Worker, policy: str) -> dict[str, Line]:
    return (await EstimateStore(one.streams).load(policy)).lines


def run(scenario: Coroutine[Any, Any, None]) -> None:
    asyncio.run(scenario)


async def begun(one: Worker, policy: str, question: Watched) -> int:
    """Begin, and give the first whole second after."""
    await one.turn(policy, question)
    found = one.estimating.told(policy)
    assert found is not None
    return (found.since_ms // 1000 + 2) * 1000


@dataclass
class Trouble:
    """Workers of which some die, lose their lease without noticing, or are stopped on their way."""

    workers: list[Worker]
    store: redis.Redis
    policy: str
    question: Watched
    random: random.Random
    leads: int = 0

    async def turn(self) -> None:
        what = self.random.random()
        if what < 0.3:
            await self._dies()
        elif what < 0.5:
            await self._stopped()
        elif what < 0.7:
            await self._two_lead()
        await self.workers[self.leads].turn(self.policy, self.question)

    async def _dies(self) -> None:
        """What it had in mind is gone."""
        await self.workers[self.leads].leader.resign(self.policy)
        self.workers[self.leads].estimating._held.clear()
        self.leads = self.random.randrange(len(self.workers))

    async def _stopped(self) -> None:
        task = asyncio.create_task(self.workers[self.leads].turn(self.policy, self.question))
        for _ in range(self.random.randrange(30)):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    async def _two_lead(self) -> None:
        """Both go on, each with the lease for a moment."""
        for _ in range(2):
            self.store.delete(f"{base(self.policy)}:leader")
            await self.workers[self.random.randrange(len(self.workers))].turn(self.policy, self.question)
        self.store.delete(f"{base(self.policy)}:leader")


async def keys_are_known(one: Worker, store: redis.Redis, question: Watched, policy: str) -> int:
    """Have it begun with what is a unit here. Gives a whole second after."""
    first = await begun(one, policy, question)
    if question.plan.objective == "step":
        add(store, policy, entry("first", first, record(key="first")))
        first = await begun(one, policy, question)
    return first


@pytest.mark.parametrize("objective", ["step", "episode"])
@pytest.mark.parametrize("seed", range(4))
def test_a_reader_that_dies_at_any_moment_changes_nothing(
    valkey_url: str, store: redis.Redis, policy: str, objective: str, seed: int
) -> None:
    """One policy is read by one worker throughout, the other by workers that take over, die, or lose what they did."""
    question = watched(objective, plan={"return_range": (0.0, 3.0)})
    calm, wild = policy, f"{policy}x"

    async def scenario() -> None:
        async with workers(valkey_url, "a", "b", "c", "d", page_size=7) as (one, *others):
            base_ms = max([await keys_are_known(w, store, question, p) for w, p in ((one, calm), (others[0], wild))])
            store.delete(f"{base(wild)}:leader")
            trouble = Trouble(others, store, wild, question, random.Random(seed))
            for place, (came, event) in enumerate(World(seed, objective).made(base_ms).events):
                for name in (calm, wild):
                    event(store, name)
                    closed(store, name, came - 1)
                if place % 5 == 0:
                    await one.turn(calm, question)
                    await trouble.turn()
                    assert await trim(one.streams, wild, "transitions", EVERYTHING_GOES)
            await finished(store, one, calm, question, base_ms)
            await finished(store, others[0], wild, question, base_ms)
            await same(one, calm, others[0], wild)

    run(scenario())


async def finished(store: redis.Redis, one: Worker, policy: str, question: Watched, base_ms: int) -> None:
    """Let everything become complete."""
    closed(store, policy, base_ms + 40_000)
    store.delete(f"{base(policy)}:leader")
    for _ in range(3):
        await one.turn(policy, question)


async def same(one: Worker, policy: str, other: Worker, other_policy: str) -> None:
    """Hold all that is known of two policies that saw the same against each other."""
    mine, theirs = await lines(one, policy), await lines(other, other_policy)
    assert mine.keys() == theirs.keys() == {"v1", SHADOW}
    assert mine["v1"].tally.units > 15
    assert mine[SHADOW].tally.rows > 30
    for label, line in mine.items():
        assert line == msgspec.structs.replace(theirs[label], since_ms=line.since_ms)
    told, others_told = one.estimating.told(policy), other.estimating.told(other_policy)
    assert told is not None
    assert others_told is not None
    assert (told.left_out, told.waiting) == (others_told.left_out, 0)
    assert others_told.waiting == 0


def test_the_stream_is_kept_as_far_as_it_is_needed_and_let_go_at_the_end(
    valkey_url: str, store: redis.Redis, policy: str
) -> None:
    async def scenario() -> None:
        async with workers(valkey_url, "a") as (one,):
            first = await begun(one, policy, watched())
            key = f"{base(policy)}:transitions"
            for place in range(10):
                add(store, policy, entry(f"d{place}", first + place * 1000, record()))
            closed(store, policy, first + 5_000)  # what started in the first four seconds is complete
            await one.turn(policy, watched())
            groups: Any = store.xinfo_groups(key)
            assert [each["name"] for each in groups] == [GROUP.encode()]
            entries: Any = store.xrange(key)
            fourth, fifth = (each[0] for each in entries[3:5])
            assert entry_id(fourth) <= entry_id(groups[0]["last-delivered-id"]) < entry_id(fifth)
            assert (await lines(one, policy))["v1"].tally.units == 4
            view = await trim(one.streams, policy, "transitions", Rules(limit=0))
            assert view is not None
            assert view.reason == "no_group"  # it is no trainer
            await one.turn(policy, None)
            assert store.xinfo_groups(key) == []
            assert not store.exists(f"{base(policy)}:estimates", f"{base(policy)}:estimates:through")
            assert one.estimating.view(policy) == {"policy": policy, "estimates": {}}

    run(scenario())


def test_what_was_trimmed_under_the_reader_begins_anew(valkey_url: str, store: redis.Redis, policy: str) -> None:
    async def scenario() -> None:
        async with workers(valkey_url, "a") as (one,):
            first = await begun(one, policy, watched())
            add(store, policy, entry("d0", first, record()))
            await one.turn(policy, watched())
            before = one.estimating.told(policy)
            add(store, policy, entry("d1", first, record()))
            store.xtrim(f"{base(policy)}:transitions", maxlen=0, approximate=False)
            await one.turn(policy, watched())
            after = one.estimating.told(policy)
            assert before is not None
            assert after is not None
            assert after.since_ms > before.since_ms

    run(scenario())


def test_another_content_or_question_begins_anew(valkey_url: str, store: redis.Redis, policy: str) -> None:
    async def scenario() -> None:
        async with workers(valkey_url, "a") as (one,):
            first = await begun(one, policy, watched())
            for place in range(4):
                add(store, policy, entry(f"d{place}", first, record()))
                add_score(store, policy, f"d{place}", score(f"d{place}", 0))
            closed(store, policy, first + 3_000)
            await one.turn(policy, watched())
            known = await lines(one, policy)
            assert (known["v1"].tally.units, known[SHADOW].tally.units) == (4, 4)
            await one.turn(policy, watched(shadows={SHADOW: "another"}))
            known = await lines(one, policy)
            assert (known["v1"].tally.units, known[SHADOW].tally.units) == (4, 0)
            await one.turn(policy, watched(plan={"return_range": (0.0, 2.0)}, shadows={}))
            known = await lines(one, policy)
            assert (set(known), known["v1"].tally.units) == ({"v1"}, 0)

    run(scenario())


def test_others_read_what_the_leader_tells(valkey_url: str, store: redis.Redis, policy: str) -> None:
    async def scenario() -> None:
        async with workers(valkey_url, "a", "b") as (one, other):
            await begun(one, policy, watched())
            await other.turn(policy, watched())
            assert other.estimating.told(policy) == one.estimating.told(policy)
            verdict = other.estimating.gate_of(policy, SHADOW)
            assert verdict is not None
            assert verdict.outcome == "no_evidence"
            assert other.estimating.gate_of(policy, "v1") is None
            labels = {"policy": policy, "version": SHADOW, "method": "dr"}
            assert other.registry.get_sample_value("surefoot_estimate_lower", labels) == 0.0
            await other.turn(policy, None)
            assert other.registry.get_sample_value("surefoot_estimate_lower", labels) is None

    run(scenario())


def test_more_than_there_is_time_for_keeps_a_share_and_says_so(
    valkey_url: str, store: redis.Redis, policy: str
) -> None:
    async def scenario() -> None:
        async with workers(valkey_url, "a", work_s=0.0) as (one,):
            first = await begun(one, policy, watched())
            for place in range(50):
                add(store, policy, entry(f"d{place}", first + place * 1000, record()))
            closed(store, policy, first + 60_000)
            await one.turn(policy, watched())
            found = one.estimating.told(policy)
            assert found is not None
            assert found.share == 0.5
            for _ in range(60):
                await one.turn(policy, watched())
            known = await lines(one, policy)
            assert 0 < known["v1"].tally.units < 50

    run(scenario())
