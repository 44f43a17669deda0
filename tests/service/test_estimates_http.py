"""Live estimates of a real service: values that are known cover, and only a shadow that is better passes the gate.

A bandit with four states and three actions whose mean rewards are a table. The champion explores; shadows watch. Who
promises itself too much is worse, whatever its network says; whose actions the log never took is told apart by nothing.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import msgspec
import numpy as np
import pytest
from prometheus_client import CollectorRegistry

from policies.deployment import RewardPolicy
from policies.types import Choices, ObservationSpec
from service.clock import SystemClock
from service.estimate_metrics import EstimateMetrics
from service.estimate_tallies import View, Watched
from service.estimating import Estimating
from service.leader import Leader
from service.redis_streams import RedisStreams, connect
from shadow.rollout_plan import GuardPlan, RolloutPlan
from tests.policies.networks import bundle_files, linear
from tests.service.admins import Admin, serving
from tests.service.test_shadows_http import watch
from tests.waiting import until

STATES = np.eye(4)
MEANS = np.array([[0.1, 0.8, 0.4], [0.7, 0.2, 0.4], [0.3, 0.2, 0.8], [0.1, 0.9, 0.5]])
CHAMPION = np.array([2, 0, 0, 2])  # what it does in each state
BETTER = MEANS.argmax(axis=1)
WORSE = MEANS.argmin(axis=1)
ROWS, BATCHES = 500, 8
RULE = """schema: 1
policy: {policy}
rules:
- {{kind: forbid, name: not-the-last, when: 'action.index == 1', except_fallback: true}}
"""


@pytest.fixture(scope="module")
def admin(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Admin]:
    with serving(tmp_path_factory.mktemp("estimates")) as mine:
        yield mine


def value(actions: Any) -> float:
    """Of a version that does this in each state, with states as likely as each other."""
    return float(MEANS[np.arange(4), actions].mean())


def push(admin: Admin, policy: str, label: str, actions: Any, promised: float = 1.0) -> str:
    """A network that says of what it would do that it is worth `promised`, of all else nothing."""
    table = np.zeros((4, 3))
    table[np.arange(4), actions] = promised
    files = bundle_files(linear(table.tolist()), STATES.tolist(), table.tolist(), policy=policy, version=label,
                         exploration={"epsilon": 0.5}, description=label)  # fmt: skip
    answer = admin.push(files, policy)
    assert answer.status_code == 201, answer.text
    return str(answer.json()["digest"])


def caught_up(admin: Admin, policy: str) -> bool:
    """Whether the shadows have scored what they were shown: their queues shed what comes too fast."""
    here = admin.http.get(f"/admin/policies/{policy}/shadows").json()["here"]
    return all(each["waiting"] == each["in_hand"] == 0 for each in here)


def play(admin: Admin, policy: str, rng: np.random.Generator) -> None:
    for _ in range(BATCHES):
        until(lambda: caught_up(admin, policy), "the shadows")
        states = rng.integers(0, 4, ROWS)
        body = {"policy": policy, "states": STATES[states].tolist()}
        answer = admin.http.post("/v1/act/batch", json=body)
        assert answer.status_code == 200, answer.text
        columns = answer.json()
        won = rng.random(ROWS) < MEANS[states, columns["action"]]
        rewards = [
            {"decision_id": name, "reward": float(each)} for name, each in zip(columns["decision_id"], won, strict=True)
        ]
        assert admin.http.post("/v1/reward/batch", json={"rewards": rewards}).status_code == 202


def question(digests: dict[str, str], reward: RewardPolicy, margin: float) -> Watched:
    plan = RolloutPlan(objective="step", return_range=(0.0, 1.0), guards={"return": GuardPlan(margin)})
    shadows = {label: digest for label, digest in digests.items() if label != "v1"}
    space = Choices((("a0", "a1", "a2"),))
    return Watched(plan, "v1", {"v1": digests["v1"]}, shadows, reward, "decision", ObservationSpec((4,)), space)


async def estimated(admin: Admin, policy: str, asked: Watched, rng: np.random.Generator) -> View:
    """Begin, let the policy be played, and read until everything is complete; another worker takes over on the way."""
    streams = RedisStreams(connect(admin.server.redis_url))
    names = ("one", "two")
    readers = [
        Estimating(streams, Leader(streams, f"{policy}-{name}"), SystemClock(), EstimateMetrics(CollectorRegistry()),
                   patience_ms=1_500, save_s=0.0)
        for name in names
    ]  # fmt: skip
    try:
        async with asyncio.timeout(90):
            while readers[0].told(policy) is None:  # the service has the lease, until it knows that nothing is asked
                await readers[0].run_once({policy: asked})
                await asyncio.sleep(0.05)
            await asyncio.to_thread(play, admin, policy, rng)
            for turn in range(10_000):
                found = readers[turn > 20].told(policy)
                if found is not None and found.versions["v1"].estimates.support.units == ROWS * BATCHES:
                    return found
                if turn == 20:  # it dies
                    await Leader(streams, f"{policy}-one").resign(policy)
                await readers[turn >= 20].run_once({policy: asked})
                await asyncio.sleep(0.05)
        raise AssertionError("not complete")
    finally:
        await streams.aclose()


def deployed(admin: Admin, policy: str, versions: dict[str, Any], epsilon: float = 0.5, rule: bool = False) -> Watched:
    """Push and deploy these versions, the first as champion, the others as shadows; reward window of a second."""
    digests = {
        label: push(admin, policy, label, actions, 5.0 if label == "v3" else 1.0) for label, actions in versions.items()
    }
    reward = RewardPolicy(window_s=1.0, range=(0.0, 1.0))
    tag = admin.http.get(f"/admin/policies/{policy}/deployment").headers["etag"]
    answer = admin.deploy(policy, tag, champion="v1", reward=msgspec.to_builtins(reward))
    assert answer.status_code == 200, answer.text
    for label in versions:
        if label != "v1":
            watch(admin, policy, label)
    tag = admin.http.get(f"/admin/policies/{policy}/exploration").headers["etag"]
    put = admin.http.put(f"/admin/policies/{policy}/exploration", json={"epsilon": epsilon}, headers={"If-Match": tag})
    assert put.status_code == 200, put.text
    if rule:
        tag = admin.http.get(f"/admin/policies/{policy}").headers["etag"]
        where = f"/admin/policies/{policy}/safety"
        put = admin.http.put(where, content=RULE.format(policy=policy), headers={"If-Match": tag})
        assert put.status_code == 200, put.text
    return question(digests, reward, margin=0.0)


def test_values_cover_and_only_the_better_shadow_passes(admin: Admin, policy: str) -> None:
    versions = {"v1": CHAMPION, "v2": BETTER, "v3": WORSE}  # v3 promises five times what anybody can earn
    asked = deployed(admin, policy, versions)
    found = asyncio.run(estimated(admin, policy, asked, np.random.default_rng(1)))
    for label, actions in versions.items():
        told = found.versions[label]
        for estimate in told.estimates.methods:
            assert estimate.value is not None
            assert abs(estimate.value - value(actions)) < 4.5 * (estimate.error or 0.0), (label, estimate)
            assert estimate.lower < value(actions) < estimate.upper, (label, estimate)
        assert told.estimates.support.unsupported == 0.0
        assert told.estimates.support.left_out == 0
        assert (told.unscored, told.broken) == (0, 0)
    assert found.versions["v1"].verdict is None
    assert [found.versions[label].verdict.outcome for label in ("v2", "v3")] == ["passes", "fails"]  # type: ignore[union-attr]
    champion = found.versions["v2"].champion_value
    assert champion is not None
    assert abs(champion - value(CHAMPION)) < 0.05
    assert found.left_out == {}


@pytest.mark.parametrize("why", ["never explored", "forbidden"])
def test_what_the_log_never_did_does_not_pass(admin: Admin, policy: str, why: str) -> None:
    """Better as it is: nobody can know. Where rules forbid it, it would do something else, as all versions."""
    asked = deployed(
        admin,
        policy,
        {"v1": CHAMPION, "v2": BETTER},
        epsilon=0.0 if why == "never explored" else 0.5,
        rule=why == "forbidden",
    )
    found = asyncio.run(estimated(admin, policy, asked, np.random.default_rng(2)))
    told = found.versions["v2"]
    assert told.verdict is not None
    if why == "never explored":
        assert told.verdict.outcome == "no_evidence"
        assert told.estimates.support.unsupported == pytest.approx(0.75, abs=0.05)
        assert told.estimates.support.matched == 0
        assert any("unsupported" in each for each in told.verdict.reasons)
    else:
        wanted = np.where(BETTER == 1, 0, BETTER)  # of the rest its network says nothing: the first
        for estimate in told.estimates.methods:
            assert estimate.lower < value(wanted) < estimate.upper
        assert told.verdict.outcome != "passes"


def test_the_service_answers_what_it_estimates(admin: Admin, policy: str) -> None:
    admin.pushed(policy, "v1")
    answer = admin.http.get(f"/admin/policies/{policy}/estimates")
    assert (answer.status_code, answer.json()) == (200, {"policy": policy, "estimates": {}})
    assert admin.http.get(f"/admin/policies/{policy}x/estimates").status_code == 404
