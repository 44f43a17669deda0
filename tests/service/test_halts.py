"""Kill switches act on the next decision of the replica that is told, in all others by polling, and without Redis."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from prometheus_client import CollectorRegistry

from service.judge import Past, hand_rows_over, judge
from service.metrics import Metrics
from service.plan import LoadedVersion, Row, Safeguards
from service.valkey import EmbeddedValkey
from service.wire import ActResponse
from tests.policies.networks import linear
from tests.service.admins import Admin, serving
from tests.service.pipelines import decider, plan, version
from tests.service.valkeys import SMALL
from tests.waiting import until

METRICS = Metrics(CollectorRegistry())
EPSILON = {"epsilon": 1.0}


@pytest.fixture(scope="module")
def admin(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Admin]:
    with serving(tmp_path_factory.mktemp("halts")) as mine:
        yield mine


def halt(admin: Admin, policy: str, *on: str) -> dict[str, object]:
    answer = admin.http.put(f"/admin/policies/{policy}/halts", json={"on": list(on)})
    assert answer.status_code == 200, answer.text
    body: dict[str, object] = answer.json()
    return body


def with_baseline(admin: Admin, policy: str) -> None:
    """v1, which prefers action 1 and only explores, decides; v0, which prefers 0, is the baseline."""
    admin.pushed(policy, "v1", prefers=1, exploration=EPSILON)
    admin.pushed(policy, "v0", prefers=0, exploration=EPSILON)
    assert admin.deploy(policy, '"1"', champion="v1", baseline="v0").status_code == 200


def test_each_switch_acts_on_the_next_decision_and_is_turned_off_again(admin: Admin, policy: str) -> None:
    with_baseline(admin, policy)
    assert admin.act(policy)["exploration"]["epsilon"] == 1.0
    assert halt(admin, policy, "freeze_exploration") == {
        "policy": policy,
        "on": ["freeze_exploration"],
        "published": True,
        "behind": [],
    }
    frozen = admin.act(policy)
    assert (frozen["action"], frozen["propensity"], frozen["exploration"]["epsilon"]) == (1, 1.0, 0.0)
    halt(admin, policy, "baseline_only")
    stood_in = admin.act(policy)
    assert (stood_in["assigned_version"], stood_in["version"], stood_in["role"]) == ("v1", "v0", "baseline")
    assert (stood_in["action"], stood_in["propensity"]) == (0, 1.0)
    assert stood_in["safety"]["stand_in"] == "baseline_only"
    halt(admin, policy, "fallback_only", "baseline_only")
    fallen = admin.act(policy)
    assert (fallen["fallback"], fallen["action"], fallen["propensity"]) == ("fallback_only", 0, 1.0)
    assert halt(admin, policy)["on"] == []
    assert admin.act(policy)["version"] == "v1"
    assert admin.view(policy)["generation"] == fallen["generation"] + 1
    where = f"/v1/decisions/{stood_in['decision_id']}"
    until(lambda: admin.http.get(where).status_code == 200, "the record")
    kept = admin.http.get(where).json()
    assert (kept["stand_in"], kept["version"], kept["role"]) == ("baseline_only", "v0", "baseline")


def test_a_deployment_keeps_the_switches_and_the_other_way_round(admin: Admin, policy: str) -> None:
    with_baseline(admin, policy)
    halt(admin, policy, "fallback_only")
    admin.promote(policy, "v0")
    assert admin.view(policy)["halts"] == ["fallback_only"]
    assert admin.act(policy)["fallback"] == "fallback_only"
    halt(admin, policy)
    assert (admin.view(policy)["champion"], admin.act(policy)["fallback"]) == ("v0", None)


def test_what_is_no_switch_is_refused_by_field(admin: Admin, policy: str) -> None:
    admin.pushed(policy, "v1")
    answer = admin.http.put(f"/admin/policies/{policy}/halts", json={"on": ["everything"]})
    assert (answer.status_code, answer.json()["errors"][0]["field"]) == (422, "on[0]")
    unknown = admin.http.put("/admin/policies/nowhere/halts", json={"on": []})
    assert (unknown.status_code, unknown.json()["code"]) == (404, "unknown_policy")


@pytest.fixture
def shared(tmp_path: Path) -> Iterator[EmbeddedValkey]:
    mine = EmbeddedValkey(tmp_path / "shared", maxmemory_bytes=SMALL)
    yield mine
    mine.stop()


def test_switches_reach_other_replicas_and_work_without_redis(
    tmp_path: Path, policy: str, shared: EmbeddedValkey
) -> None:
    url = shared.start()
    with serving(tmp_path / "one", redis_url=url) as one, serving(tmp_path / "two", redis_url=url) as two:
        with_baseline(one, policy)
        until(lambda: two.http.get(f"/admin/policies/{policy}").json().get("baseline") == "v0", "the other replica")
        halt(one, policy, "baseline_only")
        until(lambda: two.act(policy)["version"] == "v0", "the baseline in the other replica")
        shared.stop()
        thrown = halt(one, policy, "baseline_only", "fallback_only")
        assert (thrown["on"], thrown["published"]) == (["baseline_only", "fallback_only"], False)
        assert one.act(policy)["fallback"] == "fallback_only"
        assert two.act(policy)["fallback"] is None
        refused = one.http.put(f"/admin/policies/{policy}/halts", json={"on": []})
        assert refused.status_code == 503
        assert one.act(policy)["fallback"] == "fallback_only"
        shared.start()
        until(lambda: two.act(policy)["fallback"] == "fallback_only", "the fallback in the other replica")
        until(lambda: one.http.get(f"/admin/policies/{policy}/halts").json()["published"] is True, "agreement")


def test_without_a_baseline_the_fallback_answers() -> None:
    async def work() -> None:
        with decider(plan({"v1": version(METRICS, "v1", linear([[1, 0], [0, 1]]))})) as (pipeline, _, _):
            pipeline.safeguards = Safeguards(frozenset({"baseline_only"}))
            (answer,) = await pipeline.decide([Row(state=[0.0, 1.0])])
            assert isinstance(answer, ActResponse)
            assert (answer.fallback, answer.action, answer.version) == ("no_baseline", 0, "v1")

    asyncio.run(work())


def test_a_switch_thrown_while_the_network_runs_wins() -> None:
    async def work() -> None:
        with decider(plan({"v1": version(METRICS, "v1", linear([[1, 0], [0, 1]]))})) as (pipeline, _, _):
            groups = await pipeline.infer([Row(state=[0.0, 1.0])])
            pipeline.safeguards = Safeguards(frozenset({"fallback_only"}))
            (answer,) = await pipeline.settle(groups)
            assert isinstance(answer, ActResponse)
            assert (answer.fallback, answer.action) == ("fallback_only", 0)

    asyncio.run(work())


def swap() -> dict[str, LoadedVersion]:
    """v1 prefers the larger feature, v0 the smaller."""
    v0 = version(METRICS, "v0", linear([[0, 1], [1, 0]]), golden_outputs=[[1.0, 0.0], [0.0, 1.0]])
    return {"v1": version(METRICS, "v1", linear([[1, 0], [0, 1]])), "v0": v0}


def test_the_baseline_stands_in_for_whole_batches_and_never_explores() -> None:
    async def work() -> None:
        with decider(plan(swap(), baseline="v0")) as (pipeline, _, _):
            pipeline.safeguards = Safeguards(frozenset({"baseline_only"}))
            answers = await pipeline.decide([Row(state=[0.0, 1.0]), Row(state=[1.0, 0.0])])
            assert [(a.version, a.action, a.propensity) for a in answers if isinstance(a, ActResponse)] == [
                ("v0", 0, 1.0),
                ("v0", 1, 1.0),
            ]

    asyncio.run(work())


def test_a_baseline_that_fails_is_replaced_by_its_fallback() -> None:
    async def work() -> None:
        with decider(plan(swap(), baseline="v0")) as (pipeline, _, _):
            pipeline.safeguards = Safeguards(frozenset({"baseline_only"}))
            (answer,) = await pipeline.decide([Row(state=[np.nan, 0.0])])
            assert isinstance(answer, ActResponse)
            assert (answer.version, answer.fallback, answer.action) == ("v0", "not_finite", 0)

    asyncio.run(work())


def test_a_group_splits_into_what_its_version_answers_and_what_the_baseline_must() -> None:
    async def work() -> None:
        with decider(plan(swap(), baseline="v0")) as (pipeline, _, _):
            (group,) = await pipeline.infer([Row(state=[0.0, 1.0]), Row(state=[1.0, 0.0])])
            judged = replace(judge(group, Safeguards(), "v0"), instead="v0", reasons=[None, "a_rule"])
            kept, handed = hand_rows_over(group, judged)
            assert (kept.index, handed.index, handed.stand_in) == ([0], [1], ["a_rule"])
            assert (kept.version.bundle.version, handed.version.bundle.version) == ("v1", "v0")
            assert handed.some([0]).stand_in == ["a_rule"]
            assert hand_rows_over(kept, judge(kept, Safeguards(), "v0")) == [kept]

    asyncio.run(work())


def test_points_fall_back_too() -> None:
    box = {"kind": "continuous", "low": [-1.0, -1.0], "high": [1.0, 1.0]}
    changes: dict[str, Any] = {"head": "action", "action": box, "fallback": [0.25, 0.5], "exploration": None}

    async def work() -> None:
        with decider(plan({"v1": version(METRICS, "v1", linear([[1, 0], [0, 1]]), **changes)})) as (pipeline, _, _):
            pipeline.safeguards = Safeguards(frozenset({"fallback_only"}))
            (answer,) = await pipeline.decide([Row(state=[0.0, 1.0])])
            assert isinstance(answer, ActResponse)
            assert (answer.action, answer.fallback, answer.propensity) == ([0.25, 0.5], "fallback_only", 1.0)

    asyncio.run(work())


def test_a_past_that_nobody_asked_for_is_not_known() -> None:
    unasked = Past.unasked(2)
    assert (unasked.previous, unasked.known.tolist(), unasked.verdicts) == ([None, None], [False, False], {})
