"""Shadows beside the pipeline: whatever they do, answers and records are the same, byte for byte, and come first."""

from __future__ import annotations

import asyncio
import gc
import weakref
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry

from policies.errors import LedgerFull
from safety.document import read_rules
from service.clock import SystemClock
from service.coalesce import Coalescer
from service.ledger import Appended, Ledger
from service.metrics import SECONDS
from service.plan import LoadedVersion, Outcome, Row, Safeguards, Settled
from service.redis_streams import RedisStreams, connect
from service.ruling import Ruling
from service.shadow_metrics import ShadowMetrics
from service.shadow_stream import ShadowStream
from service.shadows import Shadows
from tests.policies.growing import ENDLESS
from tests.service.pipelines import IDENTITY, KEYS, decider, plan, rows, version
from tests.service.test_act_spaces import factors, points
from tests.service.watching import (
    METRICS,
    NOWHERE,
    TURNS,
    crashing,
    decided,
    deployed,
    drained,
    honest,
    odd,
    rows_of,
    settled,
    shadows_of,
    sleeping,
)

LIVE = {
    "greedy": version(METRICS, "v1", IDENTITY, exploration={"epsilon": 0.3}),
    "soft": version(METRICS, "v1", IDENTITY, head="logits", exploration={"epsilon": 0.5}),
    "still": version(METRICS, "v1", IDENTITY, exploration={"epsilon": 0.0}),
    "refusing": version(METRICS, "v1", IDENTITY, fallback="none"),
}
SHADOWS = {"honest": honest(), "crash": crashing(), "NaN": odd(), "sleep": sleeping()}
RULES = [
    "{kind: forbid, name: hot, when: 'state.f0 > 1.0 && action.index == 1'}",
    "{kind: forbid, name: all, when: 'state.f1 > 2.0'}",
    "{kind: confidence, name: sure, min_gap: 0.4, then: fallback}",
    "{kind: never_explore, name: calm, actions: [a0]}",
]
NUMBERS = st.sampled_from([-1.0, 0.0, 1.0, 2.0, 3.0, TURNS])


def ruled(live: LoadedVersion, rules: list[str]) -> Safeguards:
    if not rules:
        return Safeguards()
    source = "schema: 1\npolicy: toy\nrules:\n" + "".join(f"- {rule}\n" for rule in rules)
    return Safeguards(ruling=Ruling.fitting(read_rules(source.encode()), live.bundle))


ROWS = st.builds(
    Row,
    state=st.lists(NUMBERS, min_size=2, max_size=2),
    key=st.sampled_from([None, "k", "l"]),
    episode=st.sampled_from([None, "e", "f"]),
    step=st.sampled_from([None, 0, 1, 2]),
    allowed=st.sampled_from([None, (0,), (1,), (0, 1), ()]),
    explore=st.booleans(),
    include=st.sampled_from([(), ("values", "distribution")]),
)


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    live=st.sampled_from(sorted(LIVE)),
    shadow=st.sampled_from(sorted(SHADOWS)),
    rules=st.lists(st.sampled_from(RULES), unique=True),
    batches=st.lists(st.lists(ROWS, min_size=1, max_size=6), min_size=1, max_size=4),
)
def test_answers_and_records_are_the_same_with_and_without_a_shadow(
    live: str, shadow: str, rules: list[str], batches: list[list[Row]]
) -> None:
    safeguards = ruled(LIVE[live], rules)
    alone = decided(plan({"v1": LIVE[live]}), batches, safeguards)
    shadows, _ = shadows_of(limit_s=0.05)
    watched = decided(plan({"v1": LIVE[live], "s": SHADOWS[shadow]}), batches, safeguards, shadows)
    asyncio.run(shadows.aclose())
    assert watched == alone


def test_it_looked_on_meanwhile() -> None:
    """What the property above does not show: that those shadows were asked, and failed as they should."""
    batches = [rows([5.0, 1.0], [-2.0, 1.0], ENDLESS)]
    seen: dict[str, Any] = {}
    for name, shadow in SHADOWS.items():
        shadows, stream = shadows_of(limit_s=0.5)  # all but the one that sleeps must keep it, on a busy machine, too
        decided(plan({"v1": LIVE["greedy"], "s": shadow}), batches, None, shadows)
        (seen[name],) = shadows.view("toy")
        assert stream.statistics()["entries"] == 3
        asyncio.run(shadows.aclose())
    assert {name: view["scored"] for name, view in seen.items()} == dict.fromkeys(SHADOWS, 3)
    assert [round(seen[name]["fault_rate"] * 3) for name in ("honest", "crash", "NaN", "sleep")] == [0, 2, 2, 3]
    assert seen["sleep"]["faults"] == 1, "ended once, not asked again"


@pytest.mark.parametrize("kind", ["gaussian", "deterministic", "factors"])
def test_the_same_holds_for_points_and_for_several_factors(kind: str) -> None:
    live = {"gaussian": points("gaussian"), "deterministic": points("action"), "factors": factors()}[kind]
    random = np.random.default_rng(4)
    batches = [[Row(state=random.normal(size=2).tolist()) for _ in range(20)] for _ in range(5)]
    alone = decided(plan({"v1": live}), batches)
    shadows, _ = shadows_of()
    # The same network watches itself: another label, the same content.
    assert decided(plan({"v1": live, "s": live}), batches, None, shadows) == alone
    (view,) = shadows.view("toy")
    assert (view["scored"], view["agreement"], view["divergence"], view["fault_rate"]) == (100, 1.0, 0.0, 0.0)
    asyncio.run(shadows.aclose())


def test_an_answer_has_left_before_a_shadow_is_shown_anything() -> None:
    order: list[str] = []

    async def work() -> None:
        with decider(plan({"v1": LIVE["greedy"]})) as (pipeline, _, _):
            pipeline.onlooker = lambda seen: order.append("shown")
            coalescer = Coalescer(pipeline, 64)

            async def caller() -> None:
                await coalescer.submit([Row(state=[0.0, 1.0])])
                order.append("answered")

            await asyncio.gather(*(caller() for _ in range(3)))
            while "shown" not in order:
                await asyncio.sleep(0)

    asyncio.run(work())
    assert order == ["answered"] * 3 + ["shown"]


def test_what_was_not_recorded_or_was_refused_is_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    in_force = plan({"v1": LIVE["refusing"]})
    shown = rows_of(in_force, [Row(state=[0.0, 1.0]), Row(state=[0.0, 1.0], allowed=()), Row(state=[1.0, 0.0])])
    assert (len(shown), shown.states[:, 0].tolist()) == (2, [0.0, 1.0])

    def full(self: Ledger, policy: str, count: int, blob: bytes, at_ms: int) -> Appended:
        raise LedgerFull("no room")

    monkeypatch.setattr(Ledger, "append_nowait", full)
    found: list[Settled] = []

    async def work() -> list[Outcome]:
        with decider(in_force) as (pipeline, _, _):
            pipeline.onlooker = found.extend
            outcomes = await pipeline.decide([Row(state=[0.0, 1.0])])
            for _ in range(5):
                await asyncio.sleep(0)
            return outcomes

    (answer,) = asyncio.run(work())
    assert not answer.logged  # type: ignore[union-attr]
    assert found == []


def test_what_rows_hold_keeps_neither_plan_nor_version_alive() -> None:
    live = version(METRICS, "v1", IDENTITY)
    engine = weakref.ref(live.engine)
    shown = [rows_of(plan({"v1": live}), [Row(state=[0.0, 1.0])])]
    del live
    gc.collect()
    assert engine() is None
    assert shown[0].version == "v1"


def test_rules_are_told_apart_from_what_callers_allow() -> None:
    live = LIVE["still"]
    hot = ruled(live, [RULES[0]])
    shown = rows_of(plan({"v1": live}), [Row(state=[5.0, 9.0], allowed=(0,)), Row(state=[0.0, 9.0], allowed=(0,))], hot)
    logged: Any = shown.logged
    assert logged.mask.tolist() == [[True, False], [True, False]]
    assert logged.ruled.tolist() == [[True, False], [True, True]]
    free: Any = rows_of(plan({"v1": live}), [Row(state=[5.0, 9.0], allowed=(0,))]).logged
    assert free.ruled is None


def test_boxes_of_rules_are_told_apart_from_what_callers_allow() -> None:
    live = points("gaussian")
    bounds = ruled(
        live,
        [
            "{kind: bounds, name: one, low: [-0.5, null], high: [0.5, null]}",
            "{kind: bounds, name: two, low: [-0.7, 0.0], high: [0.2, 1.0]}",
        ],
    )
    allowed = ((0.0, -1.0), (0.1, 2.0))
    logged: Any = rows_of(plan({"v1": live}), [Row(state=[9.0, 9.0], allowed=allowed)], bounds).logged
    assert (logged.ruled_low.tolist(), logged.ruled_high.tolist()) == ([[-0.5, 0.0]], [[0.2, 1.0]])
    assert (logged.low.tolist(), logged.high.tolist()) == ([[0.0, 0.0]], [[0.1, 1.0]])


def test_scores_that_nobody_writes_are_bounded_and_counted() -> None:
    metrics = ShadowMetrics(registry := CollectorRegistry(), SECONDS)
    stream = ShadowStream(RedisStreams(connect(NOWHERE)), metrics, 100, most_bytes=2_000)
    for i in range(30):
        stream.put("toy", "s", [(f"d{i}", b"x" * 50)])
    now = stream.statistics()
    assert now["bytes"] <= 2_000
    asyncio.run(stream.run_once())  # Redis is away: what waits goes on waiting, as one batch
    assert stream.statistics() == now
    stream.put("toy", "t", [("e", b"x")])
    labels = {"policy": "toy", "version": "s", "reason": "stream"}
    dropped = registry.get_sample_value("surefoot_shadow_drops_total", labels)
    assert dropped is not None
    assert dropped + stream.statistics()["entries"] == 31


def test_while_callers_wait_shadows_are_shown_nothing_and_that_is_counted() -> None:
    metrics = ShadowMetrics(registry := CollectorRegistry(), SECONDS)
    stream = ShadowStream(RedisStreams(connect(NOWHERE)), metrics, 100)
    shadows = Shadows(KEYS, SystemClock(), metrics, stream, 0.2)
    in_force, batches = plan({"v1": LIVE["greedy"], "s": LIVE["greedy"]}), [[Row(state=[0.0, 1.0])] * 5] * 2
    for pressed, scored, dropped in ((True, 0, 10), (False, 10, 10)):
        shadows.pressed = lambda pressed=pressed: pressed  # type: ignore[misc]
        decided(in_force, batches, None, shadows)
        assert shadows.view("toy")[0]["scored"] == scored
        labels = {"policy": "toy", "version": "s", "reason": "overload"}
        assert registry.get_sample_value("surefoot_shadow_drops_total", labels) == dropped
    asyncio.run(shadows.aclose())


def test_a_stuck_shadow_holds_a_bounded_number_of_rows_and_nobody_waits_for_it() -> None:
    shadows, _ = shadows_of(limit_s=1e9)
    live = LIVE["greedy"]
    batches = [rows(ENDLESS), *([[Row(state=[0.0, 1.0])] * 64] * 60)]
    in_force = plan({"v1": live, "s": SHADOWS["sleep"]})
    answers, _ = decided(in_force, batches, None, shadows, until_drained=False)
    (view,) = shadows.view("toy")
    assert len(answers) == 1 + 60 * 64
    assert view["scored"] == 0
    assert view["busy_s"] > 0.0
    assert 0 < view["waiting"] <= 1024
    assert view["waiting"] + view["dropped"]["shed"] >= 59 * 64
    assert view["share"] < 1.0
    # Its call is ended as an operator would not: by the watchdog that this test has told to be patient.
    for call in list(SHADOWS["sleep"].engine._watchdog._running):
        call.terminate = True
    asyncio.run(shadows.aclose())


def test_a_shadow_that_trips_is_left_alone_until_something_changes() -> None:
    shadows, _ = shadows_of()
    in_force = plan({"v1": LIVE["greedy"], "s": SHADOWS["crash"]})
    decided(in_force, [[Row(state=[9.0, 1.0])]] * 12, None, shadows)
    (view,) = shadows.view("toy")
    assert view["status"] == "tripped"
    assert view["dropped"].get("tripped", 0) + view["scored"] == 12
    shadows.follow(in_force, deployed("s"))
    assert shadows.view("toy")[0]["status"] == "tripped", "nothing has changed"
    shadows.follow(replace(in_force, generation=5), deployed("s"))
    assert shadows.view("toy")[0]["status"] == "watching"
    scored = view["scored"]
    decided(replace(in_force, generation=5), [[Row(state=[1.0, 1.0])]], None, shadows)
    assert shadows.view("toy")[0]["scored"] == scored + 1
    asyncio.run(shadows.aclose())


def test_shadows_come_and_go_with_the_deployment() -> None:
    async def work() -> None:
        shadows, _ = shadows_of()
        in_force = plan({"v1": LIVE["greedy"], "s": SHADOWS["honest"]})
        assert not shadows.follow(in_force, deployed())
        assert not shadows.follow(plan({"v1": LIVE["greedy"]}), deployed("s")), "it is not loaded yet"
        shadows.show("toy", [])
        assert shadows.view("toy") == []
        assert shadows.follow(in_force, deployed("s"))
        (first,) = shadows._watching["toy"].values()
        shadows.refresh_metrics()
        assert shadows.follow(in_force, deployed("s"))
        assert list(shadows._watching["toy"].values()) == [first], "it goes on"
        shadows.follow(plan({"v1": LIVE["greedy"], "s": SHADOWS["NaN"]}), deployed("s"))
        (second,) = shadows._watching["toy"].values()
        assert second.digest != first.digest
        assert first.runner.join(5.0)
        assert not shadows.follow(in_force, deployed())
        assert second.runner.join(5.0)
        await drained(shadows)
        await shadows.aclose()

    asyncio.run(work())


def test_a_fault_in_showing_reaches_nobody() -> None:
    shadows, _ = shadows_of()
    in_force = plan({"v1": LIVE["greedy"], "s": SHADOWS["honest"]})
    shadows.follow(in_force, deployed("s"))
    (seen,) = settled(in_force, [Row(state=[0.0, 1.0])])
    shadows.show("toy", [seen, None])  # type: ignore[list-item]
    asyncio.run(drained(shadows))
    assert shadows.view("toy")[0]["scored"] == 1
    asyncio.run(shadows.aclose())
