"""Trimming against a plain model, over random groups, deliveries, acknowledgements and claims; and real trainers."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import redis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from surefoot import transitions
from surefoot.streams import Transitions
from tests.service.trimmers import BY_GROUPS, Trimmer, fill, key, left, nodes_of
from tests.surefoot.stream_entries import add
from tests.surefoot.valkey import Valkey

GROUPS, CONSUMERS = ("a", "b", "c"), ("one", "two")
SOON_S = 0.001


@pytest.fixture(scope="module", params=[1, 3], ids=["nodes-of-1", "nodes-of-3"])
def server(request: pytest.FixtureRequest) -> Iterator[tuple[Valkey, int]]:
    with nodes_of(request.param) as valkey:
        yield valkey, request.param


@dataclass
class Group:
    delivered: int
    pending: dict[int, str] = field(default_factory=dict)  # by consumer

    @property
    def needed(self) -> int:
        return min([self.delivered, *self.pending])


@dataclass
class World:
    """What a stream holds and who has read what, kept twice: in Redis, and in dictionaries."""

    store: redis.Redis
    name: str
    made: int = 0
    entries: list[int] = field(default_factory=list)
    groups: dict[str, Group] = field(default_factory=dict)
    trimmed: int = 0

    def add(self, count: int) -> None:
        news = range(self.made + 1, self.made + count + 1)
        fill(self.store, self.name, news)
        self.entries += news
        self.made += count

    def create(self, group: str, at: int) -> None:
        if group not in self.groups and self.made:
            self.store.xgroup_create(self.name, group, f"{at}-0")
            self.groups[group] = Group(at)

    def destroy(self, group: str) -> None:
        if self.groups.pop(group, None):
            self.store.xgroup_destroy(self.name, group)

    def read(self, group: str, consumer: str, count: int, noack: bool) -> None:
        if not (held := self.groups.get(group)):
            return
        reply: Any = self.store.xreadgroup(group, consumer, {self.name: ">"}, count=count, noack=noack)
        got = [int(each.partition(b"-")[0]) for each, _ in reply[0][1]] if reply else []
        assert got == [n for n in self.entries if n > held.delivered][:count], "something was not delivered"
        if got:
            held.delivered = got[-1]
            held.pending |= {} if noack else dict.fromkeys(got, consumer)

    def ack(self, group: str, places: list[int]) -> None:
        if (held := self.groups.get(group)) and held.pending:
            waiting = sorted(held.pending)
            for n in {waiting[place % len(waiting)] for place in places}:
                assert self.store.xack(self.name, group, f"{n}-0") == 1
                del held.pending[n]

    def claim(self, group: str, consumer: str, place: int) -> None:
        if (held := self.groups.get(group)) and held.pending:
            n = sorted(held.pending)[place % len(held.pending)]
            claimed: Any = self.store.xclaim(self.name, group, consumer, 0, [f"{n}-0"])
            assert len(claimed) == 1, "a pending entry was gone"
            held.pending[n] = consumer

    def set_id(self, group: str, at: int) -> None:
        if held := self.groups.get(group):
            self.store.xgroup_setid(self.name, group, f"{at}-0")
            held.delivered = at

    def leave(self, group: str, consumer: str) -> None:
        """An operator removes a consumer: what was pending with it is nobody's any more."""
        if held := self.groups.get(group):
            self.store.xgroup_delconsumer(self.name, group, consumer)
            held.pending = {n: who for n, who in held.pending.items() if who != consumer}

    def trim(self, trimmer: Trimmer, nodes: int, limit: int, keep: int) -> None:
        view = trimmer(replace(BY_GROUPS, limit=limit, keep=keep))
        needed = min((group.needed for group in self.groups.values()), default=0)
        may_go = sum(n < needed for n in self.entries)
        most = max(0, min(may_go, limit, len(self.entries) - keep))
        stands = left(self.store, self.name)
        gone = len(self.entries) - len(stands)
        assert stands == self.entries[gone:], "something went from the middle"
        assert max(0, most - (nodes - 1)) <= gone <= most
        self.entries, self.trimmed = stands, self.trimmed + gone
        if view is not None:
            assert (view.trimmed, view.entries) == (gone, len(stands))
            assert {g.name: (g.pending, int(g.first_needed.partition("-")[0])) for g in view.groups} == {
                name: (len(group.pending), group.needed) for name, group in self.groups.items()
            }


group, consumer, place = st.sampled_from(GROUPS), st.sampled_from(CONSUMERS), st.integers(0, 30)
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("add"), st.integers(1, 8)),
        st.tuples(st.just("create"), group, place),
        st.tuples(st.just("read"), group, consumer, st.integers(1, 6), st.booleans()),
        st.tuples(st.just("read"), group, consumer, st.integers(1, 6), st.just(False)),
        st.tuples(st.just("ack"), group, st.lists(place, min_size=1, max_size=8)),
        st.tuples(st.just("claim"), group, consumer, place),
        st.tuples(st.just("trim"), st.integers(1, 12), st.integers(0, 4)),
        st.tuples(st.just("set_id"), group, place),
        st.tuples(st.just("leave"), group, consumer),
        st.tuples(st.just("destroy"), group),
    ),
    min_size=8,
    max_size=40,
)


@given(steps=STEPS)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_what_goes_is_what_the_model_lets_go(server: tuple[Valkey, int], steps: list[tuple[Any, ...]]) -> None:
    valkey, nodes = server
    policy = f"p-{uuid.uuid4().hex[:12]}"
    with valkey.client() as store:
        world, trimmer = World(store, key(policy)), Trimmer(valkey.url, policy)
        world.add(6)
        for verb, *arguments in steps:
            if verb == "trim":
                world.trim(trimmer, nodes, *arguments)
            else:
                getattr(world, verb)(*arguments)
        world.trim(trimmer, nodes, 10_000, 0)
        store.delete(world.name)


class Trainer:
    """A real consumer that dies now and then, and what it was given."""

    def __init__(self, valkey: Valkey, policy: str, group: str) -> None:
        self._options = {"redis_url": valkey.url, "block_s": SOON_S, "max_wait_s": 0.0, "batch_size": 3}
        self._names = policy, group, "c"
        self.trained: set[int] = set()
        self._stream = self._open()

    def train(self, batches: int) -> None:
        """Acknowledge all these batches but the last, which is still being trained on. A Gap would be raised here."""
        for batch in (next(self._stream, None) for _ in range(batches)):
            if batch is not None:
                self.trained |= {int(step) for step in batch.steps}

    def die(self) -> None:
        self._stream.close()
        self._stream = self._open()

    def finish(self) -> None:
        with self._stream as stream:
            self.trained |= {int(step) for batch in stream for step in batch.steps}

    def _open(self) -> Transitions:
        return transitions(*self._names, **self._options)  # type: ignore[arg-type]


DEEDS = st.lists(
    st.one_of(
        st.tuples(st.just("add"), st.integers(1, 9)),
        st.tuples(st.just("train"), st.integers(0, 1), st.integers(1, 3)),
        st.tuples(st.just("die"), st.integers(0, 1)),
        st.tuples(st.just("trim"), st.integers(1, 20)),
    ),
    min_size=4,
    max_size=25,
)


@given(deeds=DEEDS)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_trimming_is_no_gap_to_any_trainer(server: tuple[Valkey, int], deeds: list[tuple[Any, ...]]) -> None:
    valkey, _ = server
    policy = f"p-{uuid.uuid4().hex[:12]}"
    trimmer, made = Trimmer(valkey.url, policy), 0
    with valkey.client() as store:
        trainers = [Trainer(valkey, policy, name) for name in ("dqn", "audit")]
        for trainer in trainers:
            trainer.train(1)  # makes its group
        for verb, *arguments in deeds:
            if verb == "add":
                add(store, policy, range(made, made := made + arguments[0]))
            elif verb == "train":
                trainers[arguments[0]].train(arguments[1])
            elif verb == "die":
                trainers[arguments[0]].die()
            else:
                trimmer(replace(BY_GROUPS, limit=arguments[0]))
        for trainer in trainers:
            trainer.finish()
            assert trainer.trained == set(range(made))
        store.delete(key(policy))
