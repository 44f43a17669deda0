"""Calibration through the pipeline: a wrong ε is found in shipped records, by all replicas together, and once each."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import redis
import structlog
from prometheus_client import CollectorRegistry

import policies.continuous
import service.settle
from policies.draw import Drawn, draw
from policies.errors import StoreAway
from policies.explore import Behaviour
from policies.types import Floats
from service.act import Decider
from service.calibration import MOST_BYTES, MOST_EVENTS, Calibrations
from service.calibration_state import (
    MOST_LANES,
    MOST_SPACES,
    Absorption,
    Chunk,
    State,
    decode,
    encode,
    report,
    strength,
    view,
)
from service.clock import ManualClock
from service.decision import DecisionEvent, Record, encode_events, encode_record
from service.ids import policy_digest
from service.lanes import Lane
from service.ledger import Ledger
from service.metrics import Metrics
from service.plan import Row
from service.redis_streams import RedisStreams, base, connect
from service.shipper import Shipper
from service.spool_file import Row as Stored
from tests.policies.networks import linear
from tests.service.admins import Admin, serving
from tests.service.pipelines import decider, plan, version
from tests.service.test_act_spaces import BOX, FACTORS, GOLDEN, WIDE
from tests.surefoot.valkey import LossyProxy, Valkey
from tests.waiting import until

METRICS = Metrics(CollectorRegistry())
DECISIONS = 5_000
NO_LIMIT_S = 1e9
SPACES: dict[str, dict[str, Any]] = {
    "choices": {"exploration": {"epsilon": 0.05}},
    "factors": {
        "exploration": {"epsilon": 0.05}, "action": FACTORS, "fallback": ["l", 1], "golden_outputs": GOLDEN,
        "wide": True,
    },
    "points": {
        "exploration": {"epsilon": 0.05, "sigma": [0.3, 0.3]}, "action": BOX, "fallback": [0.0, 0.0], "head": "action",
    },
}  # fmt: skip


@dataclass
class Replica:
    """The parts of a worker between `/act` and the monitor."""

    policy: str
    pipeline: Decider
    ledger: Ledger
    shipper: Shipper
    calibrations: Calibrations
    clock: ManualClock
    metrics: Metrics

    async def decide(self, count: int, rows: int = 250) -> None:
        """Make decisions, ship them and judge them."""
        for _ in range(count // rows):
            await self.pipeline.decide([Row(state=[0.0, 1.0]) for _ in range(rows)])
        await self.ship()
        await self.judge()

    async def ship(self) -> None:
        while self.ledger.statistics().unshipped_events:
            self.shipper.kick()
            await self.shipper.run_once()

    async def judge(self) -> None:
        await self.calibrations.run_once(NO_LIMIT_S)

    async def known(self) -> dict[str, Any]:
        return await self.calibrations.view(self.policy)

    def gauge(self, name: str) -> float | None:
        return self.metrics.registry.get_sample_value(f"surefoot_calibration_{name}", {"policy": self.policy})


@asynccontextmanager
async def replica(
    url: str, policy: str, space: str = "choices", monitor_url: str | None = None
) -> AsyncIterator[Replica]:
    """A worker's parts. monitor_url: how the monitor alone reaches Redis."""
    changes = dict(SPACES[space])
    network = linear(WIDE) if changes.pop("wide", False) else linear([[1, 0], [0, 1]])
    in_force = plan({"v1": version(METRICS, "v1", network, **changes)})
    metrics = Metrics(CollectorRegistry())
    streams, apart = RedisStreams(connect(url)), RedisStreams(connect(monitor_url or url))
    with decider(replace(in_force, policy=policy, digest=policy_digest(policy)), metrics) as (pipeline, ledger, clock):
        calibrations = Calibrations(apart, clock, metrics)
        shipper = Shipper(ledger, streams, clock, jitter=lambda: 0.0)
        shipper.on_shipped = calibrations.offer
        try:
            yield Replica(policy, pipeline, ledger, shipper, calibrations, clock, metrics)
        finally:
            await calibrations.aclose()
            await streams.aclose()
            await apart.aclose()


def run(scenario: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(scenario())  # type: ignore[arg-type]


@pytest.fixture
def twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw with twice the recorded ε: u_0 is compared with 2ε, all else as ever."""

    def halved(u: Floats) -> Floats:
        changed = u.copy()
        changed[:, 0] /= 2.0
        return changed

    def choose(behaviour: Behaviour, u: Floats) -> Drawn:
        return draw(behaviour, halved(u))

    honest = policies.continuous.draw
    monkeypatch.setattr(service.settle, "draw", choose)
    monkeypatch.setattr(policies.continuous, "draw", lambda behaviour, u: honest(behaviour, halved(u)))


@pytest.fixture
def short() -> Iterator[Path]:
    """A directory whose name is short enough for a socket."""
    with tempfile.TemporaryDirectory(prefix="sf-") as directory:
        yield Path(directory)


# -- through the pipeline


@pytest.mark.usefixtures("twice")
@pytest.mark.parametrize("space", SPACES)
def test_a_doubled_epsilon_is_found_within_5000_decisions_and_stays_found(
    valkey_url: str, policy: str, space: str
) -> None:
    async def scenario() -> None:
        async with replica(valkey_url, policy, space) as one:
            with structlog.testing.capture_logs() as logs:
                await one.decide(DECISIONS)
            (entry, *_) = [each for each in logs if each["event"] == "calibration_alarm"]
            assert (entry["policy"], entry["group"], entry["log_level"]) == (policy, "explored", "error")
            assert entry["hits"] - entry["expected"] == pytest.approx(entry["S"])
            assert entry["evidence"] >= entry["threshold"]
            assert entry["V"] > 0.0
            known = await one.known()
            assert (known["alarm"], known["broken"], known["unknown"]) == (True, 0, 0)
            assert known["spaces"][0]["decisions"] == DECISIONS
            assert one.gauge("alarm") == 1.0
            assert (one.gauge("evidence") or 0.0) >= 1.0
        async with replica(valkey_url, policy, space) as another:  # one that has decided nothing, or was started again
            another.clock.advance(60_000)
            await another.calibrations.run_once()
            assert (await another.known())["alarms"] == known["alarms"]
            assert another.gauge("alarm") == 1.0

    run(scenario)


@pytest.mark.parametrize("space", SPACES)
def test_honest_decisions_raise_no_alarm(valkey_url: str, policy: str, space: str) -> None:
    async def scenario() -> None:
        async with replica(valkey_url, policy, space) as one:
            for _ in range(20):  # looked at all the time
                await one.decide(DECISIONS // 20)
                assert (await one.known())["alarm"] is False
            assert (await one.known())["spaces"][0]["decisions"] == DECISIONS
            assert one.gauge("alarm") == 0.0
            assert 0.0 <= (one.gauge("evidence") or 0.0) < 1.0

    run(scenario)


def test_evidence_that_sinks_again_leaves_the_alarm(
    valkey_url: str, policy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario() -> None:
        async with replica(valkey_url, policy) as one:
            with monkeypatch.context() as patch:
                patch.setattr(service.settle, "draw", lambda b, u: draw(b, u * [0.5, 1.0]))
                while not (await one.known())["alarm"]:
                    await one.decide(250)
            while (one.gauge("evidence") or 0.0) >= 1.0:
                await one.decide(2_500)
            assert one.gauge("alarm") == 1.0
            await one.calibrations.anew(policy)
            known = await one.known()
            assert (known["alarm"], known["alarms"], known["round"], known["spaces"]) == (False, [], 2, [])
            assert one.gauge("alarm") == 0.0

    run(scenario)


@pytest.mark.parametrize("space", SPACES)
def test_what_the_fallback_answers_is_no_fault(valkey_url: str, policy: str, space: str) -> None:
    async def scenario() -> None:
        async with replica(valkey_url, policy, space) as one:
            await one.pipeline.decide([Row(state=[np.nan, 1.0]) for _ in range(50)])
            await one.decide(250)
            known = await one.known()
            assert (known["alarm"], known["broken"], known["unknown"]) == (False, 0, 0)

    run(scenario)


def test_decisions_without_a_propensity_are_left_out_and_counted(
    valkey_url: str, policy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario() -> None:
        async with replica(valkey_url, policy) as one:
            monkeypatch.setattr(service.settle, "check", lambda actions, *_: np.zeros(len(actions), np.bool_))
            await one.decide(250)
            known = await one.known()
            assert (known["alarm"], known["unknown"], one.gauge("unknown_total")) == (False, 250, 250.0)

    run(scenario)


# -- each decision once


def test_what_is_shipped_again_counts_once(short: Path, policy: str) -> None:
    async def scenario() -> None:
        async with replica(server.url, policy) as one:
            offered: list[tuple[Lane, list[Stored]]] = []
            one.shipper.on_shipped = lambda lane, rows: offered.append((lane, rows))
            await one.decide(1_000)
            for _ in range(2):
                for lane, rows in offered:
                    one.calibrations.offer(lane, rows)
                await one.judge()
            assert (await one.known())["spaces"][0]["decisions"] == 1_000

    with Valkey(short) as server:
        run(scenario)


def test_a_lost_answer_counts_once(short: Path, policy: str) -> None:
    async def scenario() -> None:
        async with replica(server.url, policy, monitor_url=proxy.url) as one:
            await one.decide(250)
            for lost, known in ((b"HMGET", 250), (b"EVALSHA", 500)):  # the state is not read; it is, in vain, written
                await one.pipeline.decide([Row(state=[0.0, 1.0]) for _ in range(250)])
                await one.ship()
                proxy.lose = lost
                await one.judge()
                assert proxy.lose is None
                assert one.calibrations.waiting(policy) == 250
                assert (await one.known())["spaces"][0]["decisions"] == known + 250 * (lost == b"EVALSHA")
                await one.judge()
                assert one.calibrations.waiting(policy) == 0
                assert (await one.known())["spaces"][0]["decisions"] == known + 250

    with Valkey(short) as server:
        proxy = LossyProxy(server.socket_path)
        try:
            run(scenario)
        finally:
            proxy.close()


def test_replicas_know_together_what_one_would_know(valkey_url: str, policy: str) -> None:
    async def scenario() -> None:
        async with replica(valkey_url, policy) as one, replica(valkey_url, policy) as two:
            two.clock.advance(1_000)  # so that their decisions have other ids
            for _ in range(5):
                await asyncio.gather(one.decide(500), two.decide(500))
            while one.calibrations.waiting(policy) or two.calibrations.waiting(policy):
                await asyncio.gather(one.judge(), two.judge())
            known = await one.known()
            assert known == await two.known()
            assert known["spaces"][0]["decisions"] == DECISIONS

    run(scenario)


# -- Redis away, and back


def test_without_redis_decisions_wait_and_are_judged_later(short: Path, policy: str) -> None:
    async def scenario() -> None:
        async with replica(server.url, policy) as one:
            await one.decide(250)
            await one.pipeline.decide([Row(state=[0.0, 1.0]) for _ in range(250)])
            await one.ship()
            server.kill()
            await one.judge()
            assert one.calibrations.waiting(policy) == 250
            assert (await one.known())["spaces"][0]["decisions"] == 250  # what was known last
            with pytest.raises(StoreAway):
                await one.calibrations.anew(policy)
            server.start()
            await one.judge()
            assert (await one.known())["spaces"][0]["decisions"] == 500

    with Valkey(short, durable=True) as server:
        run(scenario)


def test_a_redis_that_has_forgotten_is_told_again(short: Path, policy: str) -> None:
    async def scenario() -> None:
        async with replica(server.url, policy) as one, replica(server.url, policy) as two:
            await one.decide(500)
            await two.known()
            server.kill()
            server.start()
            two.clock.advance(60_000)
            for _ in range(2):  # the first call meets the old connection
                await two.judge()
            with server.client() as client:
                raw = client.hget(f"{base(policy)}:calibration", "state")
                assert isinstance(raw, bytes)
                assert decode(raw).through == {f"{one.ledger.producer}:1": 500}
            await two.decide(250)
            assert (await two.known())["spaces"][0]["decisions"] == 750

    with Valkey(short) as server:
        run(scenario)


def test_a_state_of_another_release_is_begun_anew(valkey_url: str, store: redis.Redis, policy: str) -> None:
    key = f"{base(policy)}:calibration"

    async def scenario() -> None:
        async with replica(valkey_url, policy) as one:
            for raw in (b"\xc1", encode({"round": 9, "monitors": [{"space": {"continuous": False, "sizes": [2]},
                        "sums": {"ever": b"", "recent": b""}}]})):  # fmt: skip
                store.hset(key, mapping={"version": "7", "state": raw})
                with structlog.testing.capture_logs() as logs:
                    await one.decide(250)
                assert "calibration_state_unreadable" in [each["event"] for each in logs]
                assert one.calibrations.waiting(policy) == 0
                assert (await one.known())["alarm"] is False
        assert int(store.hget(key, "version") or b"0") > 7

    run(scenario)


# -- bounds


def test_what_there_is_no_room_for_is_skipped_and_counted(valkey_url: str, policy: str) -> None:
    async def scenario() -> None:
        async with replica(valkey_url, policy) as one:
            for _ in range(MOST_EVENTS // 256 + 2):
                await one.pipeline.decide([Row(state=[0.0, 1.0]) for _ in range(256)])
            await one.ship()
            assert one.calibrations.waiting(policy) == MOST_EVENTS
            assert one.gauge("skipped_total") == 512.0
            large = Stored("other", 1, 1, 0, bytes(MOST_BYTES) + b"\xa1D")
            one.calibrations.offer(Lane("other", "p", 1), [large, large])  # one that comes first is always taken
            assert one.calibrations.waiting("other") == 1
            await one.judge()
            assert (await one.known())["spaces"][0]["decisions"] == MOST_EVENTS

    run(scenario)


def test_a_turn_ends_when_its_time_is_spent(valkey_url: str, policy: str) -> None:
    async def scenario() -> None:
        async with replica(valkey_url, policy) as one:
            for _ in range(6):
                await one.pipeline.decide([Row(state=[0.0, 1.0]) for _ in range(50)])
            await one.ship()
            spent = iter(range(1_000))
            one.calibrations._cpu_s = lambda: float(next(spent))  # one job takes a second
            await one.calibrations.run_once(1.5)
            assert (await one.known())["spaces"][0]["decisions"] == 200  # jobs have 64 decisions at least: 100 here
            assert one.calibrations.waiting(policy) == 100

    run(scenario)


# -- records


def event(record: Record | dict[str, Any], action: str = "0", mask: bytes = b"\1\1") -> DecisionEvent:
    raw = encode_record(record) if isinstance(record, Record) else msgspec.msgpack.encode(record)
    return DecisionEvent("d", "", -1, 0, 0, action, b"", mask, raw)


def logged(n: int = 2, **changes: Any) -> dict[str, Any]:
    return {
        "behaviour": np.full(n, 1 / max(n, 1)).tobytes(), "target": np.full(n, 1 / max(n, 1)).tobytes(), "epsilon": 0.0,
        "explored": False, "propensity": 1 / max(n, 1),
    } | changes  # fmt: skip


def absorbed(state: State, *events: DecisionEvent, lane: str = "a:1", first_seq: int = 1) -> State:
    absorption = Absorption(state)
    absorption.take([Chunk(lane, first_seq, first_seq + len(events), encode_events(list(events)))])
    return absorption.state(7)


@pytest.mark.parametrize(
    "wrong",
    [
        event({"behaviour": 1}),
        event(logged(0, propensity=1.0)),
        event(logged(nvec=(2, 2), action_kind="multi_discrete")),
        event(logged(), action="0,1"),
        event(logged(action_kind="continuous", transform="none"), mask=bytes(16), action="0.0"),
        event(logged(propensity=0.9)),
        event(logged(behaviour=np.array([0.5, 0.6]).tobytes())),
    ],
)
def test_a_record_that_contradicts_itself_raises_the_alarm(wrong: DecisionEvent) -> None:
    before = absorbed(State(), event(logged()))
    after = absorbed(before, wrong, first_seq=2)
    assert (before.alarmed, before.broken) == (False, 0)
    assert (after.alarmed, after.broken, after.alarms) == (True, 1, ())
    assert view("p", after)["alarm"] is True


def test_a_blob_that_cannot_be_read_counts_with_all_its_decisions() -> None:
    absorption = Absorption(State())
    absorption.take([Chunk("a:1", 1, 4, b"\xc1")])
    assert absorption.state(0).broken == 3


def test_what_cannot_be_raises_the_alarm_at_once_and_says_when() -> None:
    impossible = logged(behaviour=np.array([1.0, 0.0]).tobytes(), propensity=0.0)
    state = absorbed(State(), event(impossible, action="1"))
    assert {(alarm.space, alarm.scope, alarm.impossible, alarm.at_ms) for alarm in state.alarms} == {
        ("2 choices", "ever", 1, 7),
        ("2 choices", "recent", 1, 7),
    }
    again = absorbed(state, *[event(logged())] * 100, first_seq=2)
    assert again.alarms == state.alarms
    assert state.anew() == State(round=2, version=2, through={"a:1": 1})


def test_each_space_has_its_own_monitor_and_a_share_of_alpha() -> None:
    state = State()
    for n in range(2, 4 + MOST_SPACES):
        state = absorbed(state, event(logged(n)), first_seq=n)
    assert [str(kept.space) for kept in state.monitors] == [f"{n} choices" for n in range(2, 2 + MOST_SPACES)]
    assert state.unwatched == 2
    shares = [sum(np.exp(-line.threshold) for line in each.lines) for each in report(state).values()]
    assert shares == pytest.approx([0.75 * 0.05 / (i * (i + 1)) for i in range(1, 1 + MOST_SPACES)])
    assert strength(State()) == 0.0


def test_the_lanes_heard_of_last_are_remembered() -> None:
    state = State()
    for lane in range(MOST_LANES + 3):
        state = absorbed(state, event(logged()), lane=f"w:{lane}")
    assert list(state.through) == [f"w:{lane}" for lane in range(3, MOST_LANES + 3)]


def test_bins_get_the_names_of_the_most_probable_actions() -> None:
    behaviour = np.zeros(100)
    behaviour[40:50] = 0.1
    rows = [
        event(logged(100, behaviour=behaviour.tobytes(), propensity=0.1), action=str(40 + i % 10)) for i in range(500)
    ]
    state = absorbed(State(), *rows)
    assert "action #0" in {line.bin.name for line in report(state)["100 choices"].lines}
    state = absorbed(absorbed(state, *rows, first_seq=501), *rows, first_seq=1_001)
    seen = {line.bin.name: line.tosses for line in report(state)["100 choices"].lines if line.scope == "ever"}
    assert "action #0" not in seen
    assert seen["action 45"] == 500


def test_versions_with_other_transforms_share_a_monitor_of_points() -> None:
    def point(**changes: Any) -> DecisionEvent:
        fields = {
            "behaviour": b"", "target": np.array([0.0, 1.0]).tobytes(), "action_kind": "continuous",
            "transform": "none", "bounds": np.array([-9.0, 9.0]).tobytes(),
            "raw_action": np.array([0.3]).tobytes(), "at_bound": (0,),
            "log_propensity": -1.0, "propensity": None, "epsilon": 0.0, "explored": False,
        }  # fmt: skip
        return event(fields | changes, action="0.3", mask=np.array([-9.0, 9.0]).tobytes())

    state = absorbed(
        State(), point(), point(transform="tanh"), point(fallback="not_finite"), point(log_propensity=None)
    )
    assert [str(kept.space) for kept in state.monitors] == ["1 coordinates"]
    (found,) = report(state).values()
    assert (found.decisions, found.unknown, found.broken) == (2, 1, 0)


def test_scipy_is_loaded_by_the_first_point_only() -> None:
    program = "import sys, service.calibration; sys.exit('scipy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


# -- through the service


def test_operators_see_it_in_every_replica_and_after_a_restart(tmp_path: Path, policy: str) -> None:
    with serving(tmp_path) as admin:
        admin.pushed(policy, "v1", exploration={"epsilon": 0.5})
        body = {"policy": policy, "states": [[1.0, 2.0]] * 300}
        assert admin.http.post("/v1/act/batch", json=body).status_code == 200
        until(lambda: judged(admin, policy) == 300, "the judgement")
        found = admin.http.get(f"/admin/policies/{policy}/calibration").json()
        assert (found["alarm"], found["alpha"], found["round"]) == (False, 0.05, 1)
        explored = next(line for line in found["spaces"][0]["lines"] if line["group"] == "explored")
        assert (explored["tosses"], explored["expected"]) == (300, 150.0)
        scraped = admin.http.get("/metrics").text
        assert f'surefoot_calibration_alarm{{policy="{policy}"}} 0.0' in scraped
        admin.act(policy)
        assert admin.server.stop() == 0  # which judges what it has shipped
        admin.server.start()
        admin.http.base_url = admin.server.url
        assert judged(admin, policy) == 301
        assert admin.http.delete(f"/admin/policies/{policy}/calibration").status_code == 204
        assert admin.http.get(f"/admin/policies/{policy}/calibration").json()["round"] == 2
        assert judged(admin, policy) == 0
        unknown = admin.http.get("/admin/policies/nowhere/calibration")
        assert (unknown.status_code, unknown.json()["code"]) == (404, "unknown_policy")


def judged(admin: Admin, policy: str) -> int:
    answer = admin.http.get(f"/admin/policies/{policy}/calibration")
    return sum(each["decisions"] for each in answer.json()["spaces"])
