"""The controller on a real Valkey: every unit counts once and every move is made once, whoever leads, dies or loses an
answer.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from itertools import count
from typing import Any, cast

import numpy as np
import pytest
import redis
from msgspec.structs import replace
from prometheus_client import CollectorRegistry

from policies.deployment import Deployment, RewardPolicy
from policies.errors import GenerationMoved, StoreAway
from policies.route import Routes, assign
from service.catalog import Catalog
from service.changes import Changes
from service.clock import ManualClock
from service.control import Control, Moved
from service.decision import Record, encode_record
from service.document import Document
from service.ids import policy_digest
from service.leader import Leader
from service.redis_streams import RedisStreams, base, connect
from service.rolling import begun, paused, salt_of
from service.rollout_metrics import RolloutMetrics
from service.rollout_store import GROUP, KEEP, READ, RolloutStore, View, before
from service.rollouts import EPISODE_MS, FORGET_MS, SETTLE_MS, Rollouts
from service.standing import Known, PolicyState
from shadow.gate import Verdict as GateVerdict
from shadow.rollout import Move, Stage, Standing
from shadow.rollout_plan import GuardPlan, RolloutPlan

PLAN = RolloutPlan(
    return_range=(0.0, 1.0), steps=(0.2, 0.5), shadow=False, hold_s=0.0, min_units=30, unit_time_s=1.0,
    max_duration_s=1_000.0, guards={"return": GuardPlan(margin=0.2)},
)  # fmt: skip
WINDOW_MS = 1_000
RECORD = Record(
    policy="p", assigned_version="v1", version="v1", digest="d", role="champion", generation=2, dtype="<f4",
    shape=(2,), head="q_values", outputs_dtype="<f4", outputs=b"", target=b"", behaviour=b"", epsilon=0.0,
    explored=False, proposed=0, action_name=None, propensity=1.0, key_id=1,
)  # fmt: skip


@dataclass
class Documents:
    """What a catalog and its changes are to the controller: one policy's document, in Redis, by compare-and-set."""

    control: Control
    policy: str
    moves: list[str] = field(default_factory=list)

    @property
    def states(self) -> dict[str, PolicyState]:
        return {self.policy: self.state}

    async def begin(self, document: Document) -> None:
        assert await self.control.change(self.policy, document, unwritten=document.generation - 1) is None
        await self.poll()

    async def poll(self) -> None:
        rev, document = (await self.control.read())[self.policy]
        self.state = PolicyState(self.policy, known=Known(rev, document))

    async def amend(
        self, policy: str, expected: int | None, change: Callable[[PolicyState, Document], Document], by: str
    ) -> PolicyState:
        await self.poll()
        document = self.state.document
        assert document is not None
        wanted = replace(change(self.state, document), generation=document.generation + 1)
        refused = await self.control.change(policy, wanted, unwritten=0)
        if isinstance(refused, Moved):
            raise GenerationMoved("somebody was faster")
        self.moves.append("" if wanted.standing is None else wanted.standing.reason)
        await self.poll()
        return self.state


class World:
    """A policy under way, and what has closed of it."""

    def __init__(self, streams: RedisStreams, policy: str, seed: int = 1) -> None:
        self.streams, self.policy = streams, policy
        self.clock = ManualClock()
        self.rng = np.random.default_rng(seed)
        self.numbers = count()
        self.gate: GateVerdict | None = None
        self.fault: str | None = None
        self.documents = Documents(Control(streams), policy)
        self.registries: list[CollectorRegistry] = []

    async def begin(self, plan: RolloutPlan = PLAN, **reward: Any) -> None:
        deployment = Deployment(
            schema=1, policy=self.policy, champion="v1", reward=RewardPolicy(window_s=WINDOW_MS / 1000, **reward)
        )
        first = Document(1, deployment, 0, "me", rollout=plan)
        begins = begun(first, "v2", "digest", "r1", "", self.clock.event_ms())
        await self.documents.begin(replace(begins, generation=2))

    def gate_of(self, policy: str, label: str) -> GateVerdict | None:
        return self.gate

    def controller(self, name: str, streams: RedisStreams | None = None, leader: Leader | None = None) -> Rollouts:
        own = Documents(Control(streams or self.streams), self.policy)
        own.state, own.moves = self.documents.state, self.documents.moves
        streams = streams or self.streams
        self.registries.append(CollectorRegistry())
        return Rollouts(
            RolloutStore(streams),
            leader or Leader(streams, name),
            cast(Catalog, own),
            cast(Changes, own),
            self.clock,
            self.gate_of,
            lambda policy, label: self.fault,
            RolloutMetrics(self.registries[-1]),
        )

    @property
    def standing(self) -> Standing:
        document = self.documents.state.document
        assert document is not None
        assert document.standing is not None
        return document.standing

    async def close(self, decisions: int, worth: Callable[[bool], float], episode: str = "", **changes: Any) -> None:
        """Let decisions happen, and close with what they are worth by whether the challenger was assigned."""
        await self.documents.poll()
        document = self.documents.state.document
        assert document is not None
        salt = salt_of(document, policy_digest(self.policy))
        routes = Routes(salt, "v1", "v2", self.standing.weight)
        commands: list[tuple[Any, ...]] = []
        for _ in range(decisions):
            self.clock.advance(2)
            name = f"d{next(self.numbers):08}"
            assigned = assign(routes, changes.get("key") or episode or name)
            label, challenger = assigned.version, assigned.role == "challenger"
            record = replace(
                RECORD, assigned_version=label, version=label, weight=assigned.weight, generation=document.generation
            )
            record = replace(record, **changes)
            commands.append(
                ("i", name, "ep", episode, "t", str(self.clock.event_ms()),
                 "r", repr(worth(challenger)), "j", "joined", "x", "single", "d", encode_record(record))
            )  # fmt: skip
        for each in commands:
            await self.streams.command("XADD", f"{base(self.policy)}:transitions", "*", *each)

    async def through(self) -> None:
        """Let everything that has closed be known to have."""
        self.clock.advance(WINDOW_MS + 1_100)
        await self.streams.command("SET", f"{base(self.policy)}:horizon", self.clock.event_ms())

    async def fields(self) -> dict[str, bytes]:
        flat = await self.streams.command("HGETALL", f"{base(self.policy)}:rollout")
        items = flat.items() if isinstance(flat, dict) else zip(flat[::2], flat[1::2], strict=True)
        return {name.decode(): value for name, value in items}

    async def view(self) -> View:
        found = await self.controller("reader").view(self.policy)
        assert found is not None
        return found


@asynccontextmanager
async def world(url: str, policy: str, seed: int = 1) -> AsyncIterator[World]:
    streams = RedisStreams(connect(url))
    try:
        yield World(streams, policy, seed)
    finally:
        await streams.aclose()


def run(url: str, policy: str, scenario: Callable[[World], Awaitable[None]], seed: int = 1) -> None:
    async def within() -> None:
        async with world(url, policy, seed) as mine:
            await scenario(mine)

    asyncio.run(within())


def alike(challenger: bool) -> float:
    return 0.5


async def turn(mine: World, controller: Rollouts) -> None:
    """A turn on what the document is now."""
    await mine.documents.poll()
    controller._catalog.states[mine.policy]  # a policy is there
    cast(Documents, controller._catalog).state = mine.documents.state
    await controller.run_once()
    await mine.documents.poll()


def test_a_rollout_walks_step_by_step_and_each_step_counts_its_own(valkey_url: str, policy: str) -> None:
    async def scenario(mine: World) -> None:
        await mine.begin()
        controller = mine.controller("a")
        for weight in (0.2, 0.5):
            assert mine.standing.weight == weight
            await mine.close(1_500, alike)
            await turn(mine, controller)
            assert mine.standing.weight == weight, "nothing is ripe"
            await mine.through()
            await turn(mine, controller)
        assert mine.standing.stage is Stage.CHAMPION
        assert len(mine.documents.moves) == 2
        assert (await mine.view()).evidence is not None

    run(valkey_url, policy, scenario)


@pytest.mark.parametrize("keyed", [True, False])
def test_whoever_leads_every_unit_counts_once(
    valkey_url: str, policy: str, monkeypatch: pytest.MonkeyPatch, keyed: bool
) -> None:
    monkeypatch.setattr("service.rollouts.SETTLE_MS", 3_600_000)  # the one who is alone begins late
    plan = replace(PLAN, min_units=10**6)  # it stays in its step

    async def scenario(mine: World) -> None:
        await mine.begin(plan)
        rng = np.random.default_rng(5)
        leaders = [mine.controller(name) for name in "abc"]
        for _ in range(25):
            key = {"key": f"k{rng.integers(0, 60)}"} if keyed else {}
            await mine.close(
                int(rng.integers(1, 10 if keyed else 60)), lambda challenger: float(mine.rng.random()), **key
            )
            mine.clock.advance(int(rng.integers(0, 1_500)))
            if rng.random() < 0.7:
                await mine.streams.command("SET", f"{base(policy)}:horizon", mine.clock.event_ms() - 300)
            if rng.random() < 0.5:  # its lease has run out
                await mine.streams.command("DEL", f"{base(policy)}:leader")
            await turn(mine, leaders[int(rng.integers(0, 3))])
            if rng.random() < 0.2:  # it dies, and comes back knowing nothing
                leaders[int(rng.integers(0, 3))] = mine.controller(f"n{rng.integers(10**9)}")
        await mine.through()
        await mine.streams.command("DEL", f"{base(policy)}:leader")
        await turn(mine, leaders[0])
        disturbed = (await mine.view()).evidence
        await mine.streams.command("DEL", f"{base(policy)}:rollout", f"{base(policy)}:rollout:through")
        alone = mine.controller("alone")
        await mine.streams.command("DEL", f"{base(policy)}:leader")
        mine.clock.now_ms = mine.standing.since_ms + 1  # as if it had been there from the beginning
        await turn(mine, alone)
        undisturbed = (await mine.view()).evidence
        assert disturbed is not None
        assert undisturbed is not None
        assert disturbed.units == undisturbed.units
        assert disturbed.units.challenger + disturbed.units.champion > (10 if keyed else 100)
        assert disturbed.ratio == undisturbed.ratio
        for name, reading in disturbed.guards.items():
            assert reading.estimate == pytest.approx(undisturbed.guards[name].estimate, abs=1e-9)

    run(valkey_url, policy, scenario)


class Sure(Leader):
    """One that believes it leads, whatever Redis says: it was stopped for longer than its term."""

    async def leads(self, policy: str) -> bool:
        return True


def test_two_who_believe_that_they_lead_count_once_and_move_once(valkey_url: str, policy: str) -> None:
    async def scenario(mine: World) -> None:
        await mine.begin()
        leaders = [mine.controller(name, leader=Sure(mine.streams, name)) for name in "ab"]
        for each in range(6):
            await mine.close(400, alike)
            await mine.through()
            for leader in leaders:
                cast(Documents, leader._catalog).state = mine.documents.state
            await asyncio.gather(*(leader.run_once() for leader in leaders))
            await mine.documents.poll()
            leaders[each % 2] = mine.controller(f"n{each}", leader=Sure(mine.streams, f"n{each}"))
        for _ in range(4):
            for leader in leaders:
                await turn(mine, leader)
        assert mine.standing.stage is Stage.CHAMPION
        assert len(mine.documents.moves) == 2, mine.documents.moves

    run(valkey_url, policy, scenario)


class Stopped(RedisStreams):
    """Is stopped before what is known is kept, and goes on when somebody else has done something."""

    meanwhile: Callable[[], Awaitable[None]] | None = None

    async def script(self, source: bytes, key: str, *arguments: Any) -> Any:
        if source is KEEP and self.meanwhile is not None:
            something, self.meanwhile = self.meanwhile, None
            await something()
        return await super().script(source, key, *arguments)


def test_a_leader_that_was_stopped_undoes_nothing(valkey_url: str, policy: str) -> None:
    async def scenario(mine: World) -> None:
        await mine.begin(replace(PLAN, min_units=10**6))
        stopped = Stopped(connect(valkey_url))
        one = mine.controller("a", stopped, leader=Sure(stopped, "a"))
        two = mine.controller("b", leader=Sure(mine.streams, "b"))

        async def another_counts() -> None:
            for name in ("k1", "k2", "k3", "k4"):
                await mine.close(1, alike, key=name)
            await mine.through()
            await turn(mine, two)

        await turn(mine, one)
        stopped.meanwhile = another_counts
        await mine.close(1, alike, key="k0")
        await mine.through()
        await turn(mine, one)
        await turn(mine, mine.controller("c", leader=Sure(mine.streams, "c")))
        evidence = (await mine.view()).evidence
        assert evidence is not None
        assert evidence.units.challenger + evidence.units.champion == 5
        await stopped.aclose()

    run(valkey_url, policy, scenario)


def test_what_a_person_did_meanwhile_stands(valkey_url: str, policy: str) -> None:
    async def scenario(mine: World) -> None:
        await mine.begin()
        controller = mine.controller("a")
        await mine.close(1_500, alike)
        await mine.through()
        document = mine.documents.state.document
        assert document is not None
        held = replace(paused(document, "holidays"), generation=document.generation + 1)
        assert await mine.documents.control.change(policy, held, unwritten=0) is None
        await controller.run_once()  # it has not heard of it
        await mine.documents.poll()
        assert (mine.standing.weight, mine.standing.paused) == (0.2, "holidays")

    run(valkey_url, policy, scenario)


class Losing(RedisStreams):
    """Loses some answers of what is kept, after it was."""

    lose = False

    async def script(self, source: bytes, key: str, *arguments: Any) -> Any:
        found = await super().script(source, key, *arguments)
        if source is KEEP and self.lose:
            self.lose = False
            raise StoreAway("no answer came")
        return found


def test_a_lost_answer_changes_nothing(valkey_url: str, policy: str) -> None:
    async def scenario(mine: World) -> None:
        await mine.begin(replace(PLAN, min_units=10**6))
        losing = Losing(connect(valkey_url))
        controller = mine.controller("a", losing)
        for each in range(6):
            await mine.close(50, alike)
            await mine.through()
            losing.lose = each % 2 == 0
            await turn(mine, controller)
        await turn(mine, controller)
        evidence = (await mine.view()).evidence
        assert evidence is not None
        assert evidence.units.challenger + evidence.units.champion == 300
        await losing.aclose()

    run(valkey_url, policy, scenario)


class Slow(RedisStreams):
    """Answers every second reading of the stream, as a Redis does that is always close to the limit."""

    readings = 0

    async def script(self, source: bytes, key: str, *arguments: Any) -> Any:
        self.readings += source is READ
        if source is READ and self.readings % 2 == 0:
            raise StoreAway("no answer came")
        return await super().script(source, key, *arguments)


def test_a_turn_that_is_cut_short_has_read_what_it_has_read(
    valkey_url: str, policy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.rollouts.PAGE", 50)

    async def scenario(mine: World) -> None:
        await mine.begin(replace(PLAN, min_units=10**6))
        slow = Slow(connect(valkey_url))
        controller = mine.controller("a", slow)
        await mine.close(300, alike)
        await mine.through()
        for _ in range(10):
            await turn(mine, controller)
        evidence = (await mine.view()).evidence
        assert evidence is not None
        assert evidence.units.challenger + evidence.units.champion == 300
        await slow.aclose()

    run(valkey_url, policy, scenario)


def test_a_worse_version_is_quarantined_also_while_paused_and_by_hand(valkey_url: str, policy: str) -> None:
    async def scenario(mine: World) -> None:
        await mine.begin(replace(PLAN, mode="manual"))
        controller = mine.controller("a")
        await mine.close(400, lambda challenger: 0.1 if challenger else 0.9)
        await mine.through()
        await turn(mine, controller)
        document = mine.documents.state.document
        assert document is not None
        assert (mine.standing.stage, document.deployment.challengers) == (Stage.QUARANTINED, [])
        assert document.marks["v2"].reason.startswith("return")

    run(valkey_url, policy, scenario)


def test_every_replica_tells_prometheus_the_same_and_nothing_once_it_is_over(valkey_url: str, policy: str) -> None:
    def told(mine: World) -> list[dict[str, float]]:
        return [
            {
                f"{each.name}{sorted(each.labels.items())}": each.value
                for family in registry.collect()
                for each in family.samples
                if family.type == "gauge"
            }
            for registry in mine.registries
        ]

    async def scenario(mine: World) -> None:
        await mine.begin(replace(PLAN, min_units=150))
        leader, other = mine.controller("a"), mine.controller("b")
        await mine.close(200, alike)
        await mine.through()
        for controller in (leader, other):
            await turn(mine, controller)
        one, two = told(mine)
        assert one == two
        assert sum(value for name, value in one.items() if name.startswith("surefoot_rollout_units")) == 200
        assert any("quarantine" in name and "upper" in name for name in one)
        await mine.close(800, lambda challenger: 0.0 if challenger else 1.0)
        await mine.through()
        for _ in range(2):
            for controller in (leader, other):
                await turn(mine, controller)
        assert mine.standing.stage is Stage.QUARANTINED
        assert told(mine) == [{}, {}]
        moves = mine.registries[0].get_sample_value(
            "surefoot_rollout_moves_total", {"policy": policy, "version": "v2", "move": "roll_back"}
        )
        assert moves == 1.0

    run(valkey_url, policy, scenario)


def test_by_hand_a_proposal_waits_and_is_written_once(valkey_url: str, policy: str) -> None:
    async def scenario(mine: World) -> None:
        await mine.begin(replace(PLAN, mode="manual"))
        controller = mine.controller("a")
        await mine.close(1_500, alike)
        await mine.through()
        for _ in range(3):
            await turn(mine, controller)
        assert (mine.standing.weight, mine.standing.proposal) == (0.2, Move.ADVANCE)
        assert len(mine.documents.moves) == 1
        for name, times in (("propose_advance", 1.0), ("advance", None)):
            labels = {"policy": policy, "version": "v2", "move": name}
            told = mine.registries[0].get_sample_value("surefoot_rollout_moves_total", labels)
            assert told == times, "nothing has advanced"

    run(valkey_url, policy, scenario)


def test_the_stream_is_kept_for_the_rollout_and_no_longer(valkey_url: str, policy: str) -> None:
    async def scenario(mine: World) -> None:
        await mine.begin(replace(PLAN, min_units=10**6, unit_time_s=3_600.0))
        stream = f"{base(policy)}:transitions"
        controller = mine.controller("a")
        await mine.close(5, alike, key="k")  # one unit, open for an hour
        await mine.through()
        await turn(mine, controller)
        first = (await mine.streams.command("XRANGE", stream, "-", "+", "COUNT", 1))[0][0]
        groups = await mine.streams.command("XINFO", "GROUPS", stream)
        (group,) = [
            each if isinstance(each, dict) else dict(zip(each[::2], each[1::2], strict=True)) for each in groups
        ]
        named = {str(k.decode() if isinstance(k, bytes) else k): v for k, v in group.items()}
        assert named["name"] in (GROUP, GROUP.encode())
        delivered = named["last-delivered-id"]
        assert (delivered.decode() if isinstance(delivered, bytes) else delivered) == before(first.decode())
        wanted = mine.documents.state.document
        assert wanted is not None
        away = replace(
            wanted, standing=replace(mine.standing, stage=Stage.REGISTERED), generation=wanted.generation + 1
        )
        assert await mine.documents.control.change(policy, away, unwritten=0) is None
        await turn(mine, controller)
        assert await mine.streams.command("XINFO", "GROUPS", stream) == []
        assert "kept" not in await mine.fields()

    run(valkey_url, policy, scenario)


def test_a_leader_that_comes_late_counts_only_what_began_since(valkey_url: str, policy: str) -> None:
    async def scenario(mine: World) -> None:
        await mine.begin(replace(PLAN, min_units=10**6))
        await mine.close(30, alike)
        mine.clock.advance(SETTLE_MS + 1)
        controller = mine.controller("late")
        await turn(mine, controller)
        await mine.close(20, alike)
        await mine.through()
        await turn(mine, controller)
        evidence = (await mine.view()).evidence
        assert evidence is not None
        assert evidence.units.challenger + evidence.units.champion == 20
        assert evidence.units.left_out == {"before": 30}

    run(valkey_url, policy, scenario)


def test_a_weight_that_deals_nobody_anew_measures_nothing_and_holds_nothing_back(valkey_url: str, policy: str) -> None:
    async def scenario(mine: World) -> None:
        await mine.begin()
        document = mine.documents.state.document
        assert document is not None
        lowered = replace(document, standing=replace(mine.standing, floor=0.3), generation=document.generation + 1)
        assert await mine.documents.control.change(policy, lowered, unwritten=0) is None
        for name in "ab":  # another one goes on with it
            await turn(mine, mine.controller(name))
            await mine.streams.command("DEL", f"{base(policy)}:leader")
        view = await mine.view()
        assert view.evidence is None
        assert mine.documents.moves == []

    run(valkey_url, policy, scenario)


def test_what_another_release_kept_and_cannot_be_read_begins_the_step_again(valkey_url: str, policy: str) -> None:
    async def scenario(mine: World) -> None:
        await mine.begin(replace(PLAN, min_units=10**6))
        await turn(mine, mine.controller("a"))
        await mine.streams.command("HSET", f"{base(policy)}:rollout", "kept", b"\xc1")
        await mine.streams.command("DEL", f"{base(policy)}:leader")
        await mine.close(7, alike)
        await mine.through()
        await turn(mine, mine.controller("b"))
        evidence = (await mine.view()).evidence
        assert evidence is not None
        assert evidence.units.challenger + evidence.units.champion == 7

    run(valkey_url, policy, scenario)


@pytest.mark.parametrize(
    ("outcome", "stage", "paused"),
    [("passes", Stage.CANARY, False), ("no_evidence", Stage.SHADOW, False), ("fails", Stage.SHADOW, True)],
)
def test_the_gate_stands_before_the_canary(
    valkey_url: str, policy: str, outcome: Any, stage: Stage, paused: bool
) -> None:
    async def scenario(mine: World) -> None:
        await mine.begin(replace(PLAN, shadow=True))
        mine.gate = GateVerdict(outcome=outcome, reasons=("because",))
        await turn(mine, mine.controller("a"))
        assert (mine.standing.stage, bool(mine.standing.paused)) == (stage, paused)
        view = await mine.view()
        assert view.gate == mine.gate

    run(valkey_url, policy, scenario)


@pytest.mark.parametrize("mode", ["auto", "manual"])
def test_a_shadow_that_is_broken_goes_at_once(valkey_url: str, policy: str, mode: Any) -> None:
    async def scenario(mine: World) -> None:
        await mine.begin(replace(PLAN, shadow=True, mode=mode, hold_s=100.0))
        mine.fault = "its shadow tripped"
        await turn(mine, mine.controller("a"))
        document = mine.documents.state.document
        assert document is not None
        assert (mine.standing.stage, document.deployment.shadows) == (Stage.QUARANTINED, [])
        assert document.marks["v2"].reason == "its shadow tripped"

    run(valkey_url, policy, scenario)


def test_without_redis_nothing_moves_and_nothing_raises(policy: str) -> None:
    async def scenario() -> None:
        streams = RedisStreams(connect("unix:///nowhere/valkey.sock"))
        mine = World(streams, policy)
        deployment = Deployment(schema=1, policy=policy, champion="v1")
        document = begun(Document(1, deployment, 0, "me", rollout=PLAN), "v2", "", "r1", "", 0)
        mine.documents.state = PolicyState(policy, known=Known(1, document))
        await mine.controller("a").run_once()
        assert mine.documents.moves == []
        await streams.aclose()

    asyncio.run(scenario())


@pytest.mark.parametrize(("one", "two"), [("5-3", "5-2"), ("5-0", f"4-{2**64 - 1}")])
def test_the_id_before_another(one: str, two: str) -> None:
    assert before(one) == two


def test_the_lease_is_held_by_one_and_given_up(valkey_url: str, policy: str, store: redis.Redis) -> None:
    async def scenario(mine: World) -> None:
        one, two = Leader(mine.streams), Leader(mine.streams)
        assert (await one.leads(policy), await two.leads(policy), await one.leads(policy)) == (True, False, True)
        ttl: Any = store.pttl(f"{base(policy)}:leader")
        assert 0 < ttl <= 5_000
        await two.resign(policy)
        assert not await two.leads(policy)
        await one.resign(policy)
        assert await two.leads(policy)

    run(valkey_url, policy, scenario)


def test_episodes_are_dealt_anew_in_each_step(valkey_url: str, policy: str) -> None:
    async def scenario(mine: World) -> None:
        await mine.begin()
        document = mine.documents.state.document
        assert document is not None
        assert document.standing is not None
        for route_by, meant in (("episode", 0.5), ("decision", 0.5), ("key", 0.375)):
            deployment = replace(document.deployment, route_by=route_by)
            standing = replace(document.standing, weight=0.5, floor=0.2)
            mine.documents.state = PolicyState(
                policy, known=Known(1, replace(document, deployment=deployment, standing=standing))
            )
            await mine.streams.command("DEL", f"{base(policy)}:rollout")
            await mine.controller("a").run_once()
            evidence = (await mine.view()).evidence
            assert evidence is not None
            assert evidence.ratio.meant == meant, route_by

    run(valkey_url, policy, scenario)


def test_an_episode_that_was_assigned_before_the_rollout_is_no_unit_of_it(valkey_url: str, policy: str) -> None:
    async def scenario(mine: World) -> None:
        await mine.begin(replace(PLAN, min_units=10**6))
        for pinned in (1, 0):
            episode: dict[str, Any] = {"pinned": pinned, "weight": 0.8, "assigned_version": "v1", "version": "v1"}
            await mine.close(1, alike, **episode)
        await mine.through()
        await turn(mine, mine.controller("a"))
        evidence = (await mine.view()).evidence
        assert evidence is not None
        assert (evidence.units.champion, evidence.ratio.champions, evidence.units.left_out) == (1, 1, {"before": 1})

    run(valkey_url, policy, scenario)


@pytest.mark.parametrize(("route_by", "left"), [("episode", 3), ("key", 8)])
def test_episodes_that_are_long_through_are_forgotten_and_keys_never(
    valkey_url: str, policy: str, route_by: Any, left: int
) -> None:
    """A step of days would else be full of names, and count nothing more."""

    async def scenario(mine: World) -> None:
        await mine.begin(replace(PLAN, min_units=10**6, max_duration_s=10**6))
        document = mine.documents.state.document
        assert document is not None
        deployment = replace(document.deployment, route_by=route_by)
        await mine.documents.begin(replace(document, deployment=deployment, generation=document.generation + 1))
        controller = mine.controller("a")
        for part, units in enumerate((5, 3)):
            for number in range(units):
                await mine.close(1, alike, **{route_by: f"u{part}{number}"})
            mine.clock.advance(int(PLAN.unit_time_s * 1000))
            await mine.through()
            await turn(mine, controller)
            mine.clock.advance(EPISODE_MS + FORGET_MS if not part else 0)
        assert await mine.streams.command("ZCARD", f"{base(policy)}:rollout:through") == left
        evidence = (await mine.view()).evidence
        assert evidence is not None
        assert evidence.units.champion + evidence.units.challenger == 8

    run(valkey_url, policy, scenario)
