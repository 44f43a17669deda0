"""Breakers in the pipeline: what trips, who answers, how it is told and re-armed."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from prometheus_client import CollectorRegistry

from safety.breaker import FAULTY, IN_A_ROW
from service.metrics import Metrics
from service.plan import LoadedVersion, Plan, Row, Safeguards
from service.valkey import EmbeddedValkey
from service.wire import ActResponse
from tests.policies.networks import linear, logarithm
from tests.service.admins import Admin, serving
from tests.service.pipelines import decider, plan, version
from tests.service.valkeys import SMALL
from tests.waiting import until

METRICS = Metrics(CollectorRegistry())
GOOD, BAD = [1.0, 2.0], [-1.0, -2.0]  # a logarithm answers NaN for the second


def logs(label: str) -> LoadedVersion:
    return version(METRICS, label, logarithm(), golden_states=[[1.0, 1.0]], golden_outputs=[[0.0, 0.0]])


def versions(*labels: str) -> dict[str, LoadedVersion]:
    """v1 and v2 fail for negative states; v0 never does, and prefers the smaller feature."""
    v0 = version(METRICS, "v0", linear([[0, 1], [1, 0]]), golden_outputs=[[1.0, 0.0], [0.0, 1.0]])
    return {label: v0 if label == "v0" else logs(label) for label in labels}


async def answers(pipeline: object, state: list[float], count: int) -> list[ActResponse]:
    found = []
    for _ in range(count):
        (answer,) = await pipeline.decide([Row(state=list(state))])  # type: ignore[attr-defined]
        assert isinstance(answer, ActResponse)
        found.append(answer)
    return found


def decided(in_force: Plan, *states: tuple[list[float], int], **safeguards: frozenset[str]) -> list[ActResponse]:
    """Ask a pipeline about states, each so many times, one call each; gives the answers to the last kind."""

    async def work() -> list[ActResponse]:
        with decider(in_force) as (pipeline, _, _):
            if safeguards:
                pipeline.safeguards = Safeguards(**safeguards)  # type: ignore[arg-type]
            found: list[ActResponse] = []
            for state, count in states:
                found = await answers(pipeline, state, count)
            return found

    return asyncio.run(work())


def test_faults_in_a_row_hand_the_policy_to_its_baseline() -> None:
    (before,) = decided(plan(versions("v1", "v0"), baseline="v0"), (BAD, IN_A_ROW - 1), (GOOD, 1))
    assert (before.version, before.fallback) == ("v1", None)
    (after,) = decided(plan(versions("v1", "v0"), baseline="v0"), (BAD, IN_A_ROW), (GOOD, 1))
    assert (after.assigned_version, after.version, after.role) == ("v1", "v0", "baseline")
    assert (after.safety.stand_in, after.action, after.exploration.epsilon) == ("breaker_open", 0, 0.0)


def test_steps_that_another_version_decides_say_so() -> None:
    async def work() -> None:
        with decider(plan(versions("v1", "v0"), baseline="v0")) as (pipeline, _, _):
            found = []
            for halts in (frozenset(), frozenset({"baseline_only"}), frozenset({"baseline_only"}), frozenset()):
                pipeline.safeguards = Safeguards(halts)  # type: ignore[arg-type]
                (answer,) = await pipeline.decide([Row(state=list(GOOD), episode="e")])
                assert isinstance(answer, ActResponse)
                found.append((answer.version, answer.switched))
            assert found == [("v1", False), ("v0", True), ("v0", False), ("v1", True)]

    asyncio.run(work())


def test_calls_count_and_rows_do_not() -> None:
    async def work() -> None:
        with decider(plan(versions("v1", "v0"), baseline="v0")) as (pipeline, _, _):
            await pipeline.decide([Row(state=list(BAD)) for _ in range(5 * FAULTY)])
            assert [each.version for each in await answers(pipeline, GOOD, 1)] == ["v1"]

    asyncio.run(work())


def test_without_a_baseline_the_fallback_answers_and_an_open_baseline_is_not_asked() -> None:
    (answer,) = decided(plan(versions("v1")), (BAD, IN_A_ROW), (GOOD, 1))
    assert (answer.version, answer.fallback) == ("v1", "breaker_open")
    both = versions("v1", "v0")
    (answer,) = decided(plan(both, baseline="v0"), (GOOD, 1), tripped=frozenset({"v1", "v0"}))
    assert (answer.version, answer.fallback) == ("v0", "breaker_open")


def test_a_challengers_rows_go_to_the_champion_and_from_there_to_the_baseline() -> None:
    def challenged() -> Plan:
        return plan(versions("v1", "v2", "v0"), "v2", 1.0, baseline="v0")

    (answer,) = decided(challenged(), (GOOD, 1), tripped=frozenset({"v2"}))
    assert (answer.assigned_version, answer.version, answer.role) == ("v2", "v1", "champion")
    (answer,) = decided(challenged(), (GOOD, 1), tripped=frozenset({"v2", "v1"}))
    assert (answer.assigned_version, answer.version, answer.role) == ("v2", "v0", "baseline")


def test_states_outside_of_what_a_version_knows_do_not_trip_it() -> None:
    features = [{"name": "a", "low": 0.0}, {"name": "b", "low": 0.0}]
    known = version(
        METRICS,
        "v1",
        logarithm(),
        golden_states=[[1.0, 1.0]],
        golden_outputs=[[0.0, 0.0]],
        observation={"shape": [2], "dtype": "float32", "features": features},
    )
    (answer,) = decided(plan({"v1": known}), (BAD, 3 * FAULTY), (GOOD, 1))
    assert (answer.fallback, answer.action) == (None, 1)


def test_a_slow_version_hands_over_while_the_baseline_keeps_its_budget() -> None:
    async def work() -> None:
        slow = version(METRICS, "v1", linear([[1, 0], [0, 1]]), latency_budget_ms=50.0)
        in_force = plan({"v1": slow, "v0": versions("v0")["v0"]}, baseline="v0")
        with decider(in_force) as (pipeline, _, clock):
            real = slow.engine.step

            def step(*args: object) -> object:
                clock.advance(100)
                return real(*args)  # type: ignore[arg-type]

            slow.engine.step = step  # type: ignore[method-assign,assignment]
            # The clock of this test is moved by one thread; the baseline is really timed in the test below.
            pipeline._inference.time = lambda group, version, told: told(False)  # type: ignore[method-assign]
            assert [each.version for each in await answers(pipeline, GOOD, 20)] == ["v1"] * 20
            *_, last = await answers(pipeline, GOOD, 20)
            assert (last.version, last.safety.stand_in) == ("v0", "breaker_open")

    asyncio.run(work())


def test_a_baseline_that_was_slow_for_a_while_goes_on_answering() -> None:
    async def work() -> None:
        baseline = version(METRICS, "v0", linear([[1, 0], [0, 1]]), latency_budget_ms=50.0)
        in_force = plan(versions("v1") | {"v0": baseline}, baseline="v0")
        with decider(in_force) as (pipeline, _, clock):
            pipeline.safeguards = Safeguards(frozenset({"baseline_only"}))
            real, takes_ms = baseline.engine.step, [0]

            def step(*args: object) -> object:
                clock.advance(takes_ms[0])
                return real(*args)  # type: ignore[arg-type]

            baseline.engine.step = step  # type: ignore[method-assign,assignment]
            for each_ms, calls in ((100, 19), (0, 150), (100, 1)):
                takes_ms[0] = each_ms
                await answers(pipeline, GOOD, calls)
            (last,) = await answers(pipeline, GOOD, 1)
            assert (last.version, last.fallback) == ("v0", None)

    asyncio.run(work())


def test_the_baseline_is_timed_beside_the_answers() -> None:
    async def work() -> None:
        told: list[bool] = []
        in_force = plan(versions("v1", "v0"), baseline="v0")
        with decider(in_force) as (pipeline, _, _):
            (group,) = await pipeline.infer([Row(state=list(GOOD))])
            pipeline._inference.time(group, in_force.versions["v0"], told.append)
            while not told:
                await asyncio.sleep(0)
            pipeline._inference.time(replace(group, states=group.states[:, :1]), in_force.versions["v0"], told.append)
        assert told == [False]  # a call that fails tells nothing

    asyncio.run(work())


def test_the_control_states_word_is_followed() -> None:
    async def work() -> None:
        with decider(plan(versions("v1"))) as (pipeline, _, _):
            await answers(pipeline, BAD, IN_A_ROW)
            pipeline.safeguards = Safeguards(tripped=frozenset({"v1"}))
            assert pipeline.breakers.view()["v1"].faults == "open"
            pipeline.safeguards = Safeguards()
            assert [each.fallback for each in await answers(pipeline, GOOD, 1)] == [None]

    asyncio.run(work())


def test_new_content_under_a_label_starts_with_a_closed_breaker() -> None:
    async def work() -> None:
        in_force = plan(versions("v1"))
        with decider(in_force) as (pipeline, _, _):
            await answers(pipeline, BAD, IN_A_ROW)
            pipeline.renew(plan({"v1": version(METRICS, "v1", linear([[1, 0], [0, 1]]))}), Safeguards())
            (answer,) = await answers(pipeline, GOOD, 1)
            assert answer.fallback is None
            assert np.isfinite(answer.propensity or np.nan)

    asyncio.run(work())


# Through the service


@pytest.fixture
def shared(tmp_path: Path) -> Iterator[EmbeddedValkey]:
    mine = EmbeddedValkey(tmp_path / "shared", maxmemory_bytes=SMALL)
    yield mine
    mine.stop()


def trip(admin: Admin, policy: str) -> None:
    for _ in range(IN_A_ROW):
        assert admin.act(policy, state=BAD)["fallback"] == "not_finite"


def test_a_trip_is_told_to_all_replicas_and_stays_until_it_is_re_armed(
    tmp_path: Path, policy: str, shared: EmbeddedValkey
) -> None:
    from tests.policies.networks import bundle_files
    from tests.service.admins import files_of

    url = shared.start()
    with serving(tmp_path / "one", redis_url=url) as one, serving(tmp_path / "two", redis_url=url) as two:
        files = bundle_files(logarithm(), [[1.0, 1.0]], [[0.0, 0.0]], policy=policy, version="v1", exploration=None)
        assert one.push(files, policy).status_code == 201
        assert one.push(files_of(policy, "v0"), policy).status_code == 201
        assert one.deploy(policy, '"1"', champion="v1", baseline="v0").status_code == 200
        until(lambda: two.http.get(f"/admin/policies/{policy}").json().get("baseline") == "v0", "the other replica")
        trip(one, policy)
        assert one.act(policy)["version"] == "v0"
        until(lambda: two.act(policy)["version"] == "v0", "the trip in the other replica")
        until(lambda: two.view(policy)["versions"]["v1"]["tripped"], "the trip in its view")
        one.server.kill()
        one.server.start()
        until(lambda: one.act(policy)["version"] == "v0", "the trip after a restart")
        answer = two.http.post(f"/admin/policies/{policy}/versions/v1/rearm")
        assert (answer.status_code, answer.json()["tripped"]) == (200, False)
        assert two.act(policy)["version"] == "v1"
        one.http.close()
        with_new_port = Admin(one.server)
        until(lambda: with_new_port.act(policy)["version"] == "v1", "the re-armed version in the other replica")
        with_new_port.close()
        unknown = two.http.post(f"/admin/policies/{policy}/versions/v9/rearm")
        assert (unknown.status_code, unknown.json()["code"]) == (404, "unknown_version")
