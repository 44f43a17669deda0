"""Exploration with a budget, through the service: strengths, schedules, caps across replicas, freezing, Redis away."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from prometheus_client import CollectorRegistry

from safety.bank import Granted, Progress, Reply, Request
from safety.burn import RUNNING
from safety.exploration import Exploration, RateCap, RegretCap
from safety.lease import Holder
from service.allowance import Allowance
from service.decision import decode_record
from service.history import replay
from service.metrics import Metrics
from service.plan import Plan, Row, Safeguards
from service.valkey import EmbeddedValkey
from service.wire import ActResponse
from tests.policies.networks import linear
from tests.service.admins import STATE, Admin, serving
from tests.service.pipelines import KEYS, decider, plan, recorded, version
from tests.service.valkeys import SMALL
from tests.waiting import until

METRICS = Metrics(CollectorRegistry())


def leased(exploration: Exploration, left: int = 1 << 30) -> Holder:
    """A holder that the bank has given all it wants."""
    holder = Holder("one", exploration, 1)
    request: Request = holder.ask(0.0)
    purses = [Granted(cap.kind, "w", left, 101, 0, cap.limit, False, 0) for cap in exploration.caps]
    progress = Progress(request.progress.schedules or exploration.progress_of, 0, 0)
    holder.granted(Reply(0, purses, 1e-9, progress, RUNNING, []))
    return holder


def allowance(exploration: Exploration, left: int = 1 << 30) -> Allowance:
    return Allowance(exploration, leased(exploration, left), lambda: 0.1)


def single(**changes: Any) -> Plan:
    return plan({"v1": version(METRICS, "v1", linear([[1, 0], [0, 1]]), **changes)})


def decided(in_force: Plan, safeguards: Safeguards, *rows: Row) -> tuple[list[ActResponse], list[Any]]:
    """Answers to rows decided together, and their records."""

    async def work() -> tuple[list[ActResponse], list[Any]]:
        with decider(in_force) as (pipeline, ledger, _):
            pipeline.safeguards = safeguards
            answers = await pipeline.decide(list(rows))
            events = recorded(ledger)
            records = [decode_record(event.record) for event in events]
            for event, record in zip(events, records, strict=True):
                again = replay(event.id, event.mask, record, KEYS.signing.draw)
                assert (again.explored, again.propensity) == (record.explored, record.propensity)
            return [answer for answer in answers if isinstance(answer, ActResponse)], records

    return asyncio.run(work())


def test_the_documents_strength_replaces_the_versions_own() -> None:
    declared = Exploration(epsilon=0.4)
    (answer,), _ = decided(single(), Safeguards(allowance=allowance(declared)), Row(state=[0.0, 1.0]))
    assert answer.exploration.epsilon == pytest.approx(0.4)
    (frozen,), _ = decided(
        single(), Safeguards(allowance=allowance(Exploration(epsilon=0.4, freeze=True))), Row(state=[0.0, 1.0])
    )
    assert (frozen.exploration.epsilon, frozen.propensity) == (0.0, 1.0)


def test_without_a_lease_nothing_is_explored() -> None:
    empty = Allowance(Exploration(epsilon=1.0), Holder("one", Exploration(epsilon=1.0), 1), lambda: 0.0)
    (answer,), _ = decided(single(), Safeguards(allowance=empty), Row(state=[0.0, 1.0]))
    assert (answer.exploration.epsilon, answer.propensity, answer.action) == (0.0, 1.0, 1)


def test_a_batch_explores_no_more_than_is_left_and_says_where_it_was_charged() -> None:
    declared = Exploration(epsilon=1.0, rate=RateCap(1000, 3600.0))
    answers, records = decided(
        single(), Safeguards(allowance=allowance(declared, left=3)), *[Row(state=[0.0, 1.0]) for _ in range(10)]
    )
    assert sum(answer.explored for answer in answers) <= 3
    assert [answer.exploration.left for answer in answers] == [3 - sum(a.explored for a in answers)] * 10
    for answer, record in zip(answers, records, strict=True):
        assert record.window == ("rate:w" if answer.explored else "")
        if answer.exploration.epsilon == 0.0:
            assert (answer.propensity, answer.action) == (1.0, 1)


def test_prices_are_recorded_where_a_regret_budget_asks_for_them() -> None:
    declared = Exploration(epsilon=1.0, regret=RegretCap(50.0, 3600.0))
    rows = [Row(state=[0.0, 1.0]) for _ in range(20)]
    answers, records = decided(single(), Safeguards(allowance=allowance(declared)), *rows)
    explored = [(answer, record) for answer, record in zip(answers, records, strict=True) if answer.explored]
    assert explored
    assert {(answer.action, record.price) for answer, record in explored} <= {(0, 1.0), (1, 0.01)}


def test_softmax_exploration_prefers_the_better_actions_and_is_replayed() -> None:
    declared = Exploration(epsilon=1.0, temperature=0.5)
    (answer,), (record,) = decided(
        single(), Safeguards(allowance=allowance(declared)), Row(state=[0.0, 1.0], include=("distribution",))
    )
    best = 1 / (1 + np.exp(-2.0))
    assert answer.distribution == pytest.approx([1 - best, best])
    assert np.frombuffer(record.exploring) == pytest.approx([1 - best, best])


def test_a_stochastic_head_may_freeze_to_its_mode() -> None:
    still = Exploration(epsilon=0.0, when_frozen="mode")
    (answer,), (record,) = decided(single(head="logits"), Safeguards(allowance=allowance(still)), Row(state=[0.0, 1.0]))
    assert (answer.action, answer.propensity, record.frozen) == (1, 1.0, True)
    going = Exploration(epsilon=0.0)
    (answer,), (record,) = decided(single(head="logits"), Safeguards(allowance=allowance(going)), Row(state=[0.0, 1.0]))
    assert answer.propensity is not None
    assert (answer.propensity < 1.0, record.frozen) == (True, False)


BOX = {"kind": "continuous", "low": [-1.0, -1.0], "high": [1.0, 2.0]}


@pytest.mark.parametrize("sigma", [0.2, 0.0])
def test_points_take_the_documents_deviation(sigma: float) -> None:
    declared = Exploration(epsilon=1.0, sigma=sigma, regret=RegretCap(50.0, 3600.0))
    in_force = single(head="action", action=BOX, fallback=[0.0, 0.0], exploration=None)
    (answer,), (record,) = decided(in_force, Safeguards(allowance=allowance(declared)), Row(state=[0.0, 1.0]))
    assert answer.explored is (sigma > 0)
    assert np.frombuffer(record.sigma).tolist() == ([sigma] * 2 if sigma else [])
    assert (0.01 <= record.price < 1.0) if sigma else record.price == 0.0


def test_points_without_any_deviation_do_not_explore() -> None:
    in_force = single(head="action", action=BOX, fallback=[0.0, 0.0], exploration=None)
    declared = Exploration(epsilon=1.0, regret=RegretCap(50.0, 3600.0))
    (answer,), _ = decided(in_force, Safeguards(allowance=allowance(declared)), Row(state=[0.0, 1.0]))
    assert (answer.explored, answer.propensity) == (False, 1.0)


# Through the service


@pytest.fixture(scope="module")
def admin(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Admin]:
    with serving(tmp_path_factory.mktemp("budget")) as mine:
        yield mine


def explore(admin: Admin, policy: str, **document: Any) -> None:
    tag = admin.http.get(f"/admin/policies/{policy}/exploration").headers["etag"]
    answer = admin.http.put(f"/admin/policies/{policy}/exploration", json=document, headers={"If-Match": tag})
    assert answer.status_code == 200, answer.text


def test_a_document_is_put_read_refused_and_in_force(admin: Admin, policy: str) -> None:
    admin.pushed(policy, "v1", prefers=1)
    assert admin.http.get(f"/admin/policies/{policy}/exploration").json() == {}
    explore(admin, policy, epsilon=1.0, rate={"limit": 5, "window_s": 3600}, start="now")
    until(lambda: admin.act(policy)["exploration"]["epsilon"] > 0.0, "a lease")
    wrong = {"epsilon": 2.0}
    refused = admin.http.put(f"/admin/policies/{policy}/exploration", json=wrong, headers={"If-Match": '"2"'})
    assert (refused.status_code, refused.json()["code"]) == (422, "invalid_field")
    without = admin.http.put(f"/admin/policies/{policy}/exploration", json={})
    assert (without.status_code, without.json()["code"]) == (428, "generation_missing")
    explore(admin, policy, epsilon=1.0, rate={"limit": 0, "window_s": 3600}, start="now")
    until(lambda: admin.act(policy)["exploration"]["left"] == 0, "the end of the budget")
    late = admin.act(policy)
    assert (late["exploration"]["epsilon"], late["explored"], late["action"]) == (0.0, False, 1)


@pytest.fixture
def shared(tmp_path: Path) -> Iterator[EmbeddedValkey]:
    mine = EmbeddedValkey(tmp_path / "shared", maxmemory_bytes=SMALL)
    yield mine
    mine.stop()


def test_replicas_share_a_budget_and_stop_without_redis(tmp_path: Path, policy: str, shared: EmbeddedValkey) -> None:
    url = shared.start()
    with serving(tmp_path / "one", redis_url=url) as one, serving(tmp_path / "two", redis_url=url) as two:
        one.pushed(policy, "v1", prefers=1)
        explore(one, policy, epsilon=1.0, rate={"limit": 40, "window_s": 86_400}, start="now")
        until(lambda: follows(two, policy), "the other replica")
        for admin in (one, two):
            until(lambda admin=admin: admin.act(policy)["exploration"]["epsilon"] > 0.0, "a lease")  # type: ignore[misc]
        explored = 2 + sum(batch(admin, policy, 200) for _ in range(3) for admin in (one, two))
        shared.stop()
        until(lambda: one.act(policy)["exploration"]["epsilon"] == 0.0, "the end of the lease")
        until(lambda: two.act(policy)["exploration"]["epsilon"] == 0.0, "the end of the lease")
        assert batch(one, policy, 50) == batch(two, policy, 50) == 0
        shared.start()
        assert explored <= 40 + 2


def follows(replica: Admin, policy: str) -> bool:
    """Whether a replica serves a policy, with a budget."""
    seen = replica.http.get(f"/admin/policies/{policy}")
    served = seen.status_code == 200 and seen.json()["champion"] is not None
    return served and replica.http.get(f"/admin/policies/{policy}/exploration").json() != {}


def batch(admin: Admin, policy: str, rows: int) -> int:
    """How many of a batch's decisions explored."""
    body = {"policy": policy, "states": [STATE] * rows}
    answer = admin.http.post("/v1/act/batch", json=body)
    assert answer.status_code == 200, answer.text
    return sum(map(bool, answer.json()["explored"]))
