"""The pipeline: every row is answered, what is answered is what is recorded, and a replay gets the same bits."""

from __future__ import annotations

import asyncio
import dataclasses
import threading
from collections import Counter
from collections.abc import Callable, Coroutine
from typing import Any

import numpy as np
import pytest
from prometheus_client import CollectorRegistry

from policies.engine import Engine
from policies.errors import LedgerFull, NoSafeAction
from service.act import Decider
from service.clock import ManualClock
from service.coalesce import Coalescer
from service.decision import decode_record
from service.history import replay
from service.ledger import Appended, Ledger
from service.metrics import Metrics
from service.plan import Group, Outcome, Plan, Row, Safeguards
from service.wire import ActResponse
from tests.policies.networks import indexer, linear, logarithm
from tests.service.pipelines import IDENTITY, KEYS, decider, plan, recorded, rows, version

Pipeline = tuple[Decider, Ledger, ManualClock]
METRICS = Metrics(CollectorRegistry())
V1 = version(METRICS, "v1", IDENTITY)
SOFT = version(METRICS, "v1", IDENTITY, head="logits", exploration={"epsilon": 0.4})


def run(work: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(work())


def answered(outcomes: list[Outcome]) -> list[ActResponse]:
    assert all(isinstance(outcome, ActResponse) for outcome in outcomes)
    return [outcome for outcome in outcomes if isinstance(outcome, ActResponse)]


def test_an_answer_says_who_decided_what_with_which_probability() -> None:
    async def work() -> None:
        with decider(plan({"v1": V1})) as (pipeline, ledger, clock):
            (answer,) = answered(
                await pipeline.decide(rows([1.0, 3.0], explore=False, include=("values", "distribution")))
            )
            assert (answer.policy, answer.version, answer.assigned_version, answer.role) == (
                "toy",
                "v1",
                "v1",
                "champion",
            )
            assert (answer.action, answer.action_name, answer.propensity, answer.generation) == (1, "a1", 1.0, 4)
            assert (answer.values, answer.distribution) == ([1.0, 3.0], [0.0, 1.0])
            assert answer.logged
            assert answer.exploration.epsilon == 0.0
            (event,) = recorded(ledger)
            assert (event.id, event.action, event.at_ms) == (answer.decision_id, "1", clock.now_ms)
            assert event.due_ms == clock.now_ms + 60_000
            assert np.frombuffer(event.state, "<f4").tolist() == [1.0, 3.0]

    run(work)


WARM = version(METRICS, "v1", IDENTITY, temperature=3.0, exploration={"epsilon": 0.4})


@pytest.mark.parametrize("loaded", [V1, SOFT, WARM], ids=["greedy", "logits", "temperature"])
def test_replaying_every_decision_from_its_record_gives_the_same_action_and_propensity(loaded: Any) -> None:
    async def work() -> None:
        random = np.random.default_rng(5)
        with decider(plan({"v1": loaded})) as (pipeline, ledger, _):
            batch = [
                Row(state=list(map(float, random.normal(size=2))), allowed=allowed, explore=bool(i % 5))
                for i, allowed in enumerate([None, (0,), (1,), (0, 1), ()] * 60)
            ]
            answers = answered(await pipeline.decide(batch))
            events = recorded(ledger)
            assert [event.id for event in events] == [answer.decision_id for answer in answers]
            for event, answer in zip(events, answers, strict=True):
                record = decode_record(event.record)
                again = replay(event.id, event.mask, record, KEYS.draw_key(record.key_id))
                (action,) = again.action
                assert (action, again.propensity, again.explored) == (answer.action, answer.propensity, answer.explored)
                assert (event.action, record.propensity) == (str(answer.action), answer.propensity)
                assert np.frombuffer(record.behaviour)[int(action)] == answer.propensity
            assert Counter(answer.explored for answer in answers)[True] > 5

    run(work)


def test_an_answer_is_the_same_alone_and_in_a_batch() -> None:
    states = [[0.3, 0.1], [0.2, 0.9], [0.5, 0.5]]

    async def work() -> None:
        with decider(plan({"v1": SOFT})) as (pipeline, *_):
            together = answered(await pipeline.decide(rows(*states)))
        with decider(plan({"v1": SOFT})) as (pipeline, *_):
            alone = [answer for state in states for answer in answered(await pipeline.decide(rows(state)))]
        assert together == alone

    run(work)


def test_allowed_actions_are_a_mask_and_the_rule_called_request() -> None:
    async def work() -> None:
        with decider(plan({"v1": V1})) as (pipeline, ledger, _):
            (answer,) = answered(await pipeline.decide(rows([0.0, 1.0], allowed=(0,))))
            assert (answer.action, answer.propensity) == (0, 1.0)
            assert (answer.safety.overridden, answer.safety.proposed, answer.safety.rules) == (True, "a1", ("request",))
            assert decode_record(recorded(ledger)[0].record).masked_mass == 1.0
            (free,) = answered(await pipeline.decide(rows([0.0, 1.0], allowed=(1,))))
            assert (free.safety.overridden, free.safety.rules) == (False, ())

    run(work)


NAN = version(METRICS, "v1", logarithm(), golden_states=[[1.0, 1.0]], golden_outputs=[[0.0, 0.0]], fallback="a1")
RAISES = version(METRICS, "v1", indexer(), golden_outputs=[[1.0, 0.0], [0.0, 1.0]], fallback="a1")


@pytest.mark.parametrize(
    ("loaded", "row", "reason"),
    [
        (NAN, Row([-1.0, 5.0]), "not_finite"),
        (NAN, Row([0.0, 5.0]), "not_finite"),
        (RAISES, Row([9.0, 0.0]), "inference_failed"),
        (V1, Row([0.0, 1.0], allowed=()), "nothing_allowed"),
    ],
)
def test_what_cannot_be_decided_is_answered_with_the_declared_fallback(loaded: Any, row: Row, reason: str) -> None:
    async def work() -> None:
        with decider(plan({"v1": loaded})) as (pipeline, ledger, _):
            row.allowed = row.allowed if row.allowed == () else (0,)  # the mask does not bind the fallback
            (answer,) = answered(await pipeline.decide([row]))
            assert (answer.fallback, answer.action) == (reason, *(loaded.bundle.fallback or ()))
            assert (answer.propensity, answer.explored, answer.exploration.epsilon) == (1.0, False, 0.0)
            record = decode_record(recorded(ledger)[0].record)
            assert record.fallback == reason
            again = replay(answer.decision_id, recorded(ledger)[0].mask, record, KEYS.draw_key(3))
            assert (again.action, again.propensity) == ((answer.action,), 1.0)

    run(work)


def test_one_bad_row_does_not_touch_the_others() -> None:
    async def work() -> None:
        with decider(plan({"v1": NAN})) as (pipeline, *_):
            bad, good = answered(await pipeline.decide(rows([-1.0, 1.0], [5.0, 1.0], explore=False)))
            assert (bad.fallback, bad.action) == ("not_finite", 1)
            assert (good.fallback, good.action, good.propensity) == (None, 0, 1.0)

    run(work)


def test_without_a_fallback_nothing_is_answered_or_recorded() -> None:
    loaded = version(METRICS, "v1", IDENTITY, fallback="none")

    async def work() -> None:
        with decider(plan({"v1": loaded})) as (pipeline, ledger, _):
            outcomes = await pipeline.decide([Row([0.0, 1.0], allowed=()), Row([0.0, 1.0])])
            assert isinstance(outcomes[0], NoSafeAction)
            assert isinstance(outcomes[1], ActResponse)
            assert [event.id for event in recorded(ledger)] == [outcomes[1].decision_id]

    run(work)


class FullLedger(Ledger):
    """A ledger whose buffer is always full."""

    def append_nowait(self, policy: str, count: int, blob: bytes, at_ms: int) -> Appended:
        raise LedgerFull("full")


def test_when_nothing_can_be_recorded_the_answer_is_safe_and_says_so() -> None:
    async def work() -> None:
        metrics = Metrics(CollectorRegistry())
        with decider(plan({"v1": version(metrics, "v1", IDENTITY)}), metrics) as (pipeline, _, clock):
            pipeline._ledger = FullLedger(None, clock, tier="memory")
            (answer,) = answered(await pipeline.decide(rows([0.0, 1.0])))
            assert not answer.logged
            assert answer.action == 1 or answer.explored
            assert metrics.registry.get_sample_value("surefoot_unlogged_decisions_total", {"policy": "toy"}) == 1.0

    run(work)


def test_what_was_explored_and_could_not_be_recorded_is_not_answered() -> None:
    """The ledger took rows until this one, so that the draw explored; the fallback answers in its place."""
    loaded = version(METRICS, "v1", IDENTITY, exploration={"epsilon": 0.5})

    async def work() -> None:
        with decider(plan({"v1": loaded})) as (pipeline, _, clock):
            asked = rows(*[[0.0, 1.0]] * 64)
            told = answered(await pipeline.decide(asked))
            assert 0 < sum(answer.explored for answer in told) < 64
            pipeline._ledger = FullLedger(None, clock, tier="memory")
            again = answered(await pipeline.decide(asked))
            replaced = [answer for answer in again if answer.fallback == "not_recorded"]
            assert 0 < len(replaced) < 64
            assert {(answer.action, answer.propensity, answer.propensity_reason) for answer in replaced} == {
                (0, None, "not_recorded")
            }
            others = [answer for answer in again if answer.fallback is None]
            assert {answer.action for answer in others} == {1}
            assert len(replaced) + len(others) == 64
            assert not any(answer.explored or answer.logged for answer in again)
            assert len({answer.decision_id for answer in again}) == 64

    run(work)


def test_exploration_stops_while_the_ledger_does_not_accept() -> None:
    loaded = version(METRICS, "v1", IDENTITY, exploration={"epsilon": 1.0})

    async def work() -> None:
        with decider(plan({"v1": loaded})) as (pipeline, ledger, _):
            assert answered(await pipeline.decide(rows([0.0, 1.0])))[0].exploration.epsilon == 1.0
            await ledger.aclose()
            (answer,) = answered(await pipeline.decide(rows([0.0, 1.0])))
            assert (answer.action, answer.propensity, answer.exploration.epsilon, answer.logged) == (1, 1.0, 0.0, False)

    run(work)


def test_a_bug_in_the_pipeline_is_answered_with_the_fallback(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("service.judge.constrain", broken)
    unsafe = version(METRICS, "v1", IDENTITY, fallback="none")

    async def work() -> None:
        with decider(plan({"v1": V1})) as (pipeline, ledger, _):
            (answer,) = answered(await pipeline.decide(rows([0.0, 1.0])))
            assert (answer.action, answer.fallback, answer.propensity) == (0, "internal_error", None)
            assert (answer.propensity_reason, answer.logged) == ("internal_error", False)
            assert recorded(ledger) == []
        with decider(plan({"v1": unsafe})) as (pipeline, *_):
            (refused,) = await pipeline.decide(rows([0.0, 1.0]))
            assert isinstance(refused, NoSafeAction)

    run(work)


def test_an_action_that_fails_the_last_look_is_replaced_and_its_probability_not_claimed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def mistaken(allowed: Any, space: Any) -> Any:
        from safety.types import Constraint

        return Constraint(np.ones((len(allowed), space.size), dtype=np.bool_), space.nvec)  # forgets the request's mask

    monkeypatch.setattr("service.judge.constrain", mistaken)

    async def work() -> None:
        with decider(plan({"v1": V1})) as (pipeline, ledger, _):
            (answer,) = answered(await pipeline.decide(rows([0.0, 1.0], allowed=(0,), explore=False)))
            assert (answer.action, answer.fallback) == (0, "check_failed")
            assert (answer.propensity, answer.propensity_reason) == (None, "check_failed")
            assert decode_record(recorded(ledger)[0].record).propensity is None

    run(work)


def constant(label: str, action: int) -> Any:
    """A version that always prefers one action: its answers tell which version computed them."""
    bias = [1.0, 0.0] if action == 0 else [0.0, 1.0]
    network = linear([[0, 0], [0, 0]], bias)
    return version(METRICS, label, network, golden_outputs=[bias, bias], exploration={"epsilon": 0.0})


def test_one_decision_is_made_by_one_version_and_episodes_stay_on_theirs() -> None:
    versions = {"v1": constant("v1", 0), "v2": constant("v2", 1)}

    async def work() -> None:
        with decider(plan(versions, "v2", 0.5)) as (pipeline, *_):
            batch = [Row([0.0, 0.0], episode=f"e{i}", step=0) for i in range(200)]
            first = answered(await pipeline.decide(batch))
            assert {a.version: a.action for a in first} == {"v1": 0, "v2": 1}
            assert {a.role for a in first if a.version == "v2"} == {"challenger"}
            pipeline.plan = plan(versions, "v2", 0.9)  # raising a weight moves no episode that has begun
            second = answered(await pipeline.decide([Row([0.0, 0.0], episode=f"e{i}", step=1) for i in range(200)]))
            assert [a.version for a in second] == [a.version for a in first]
            assert not any(a.switched for a in second)

    run(work)


def test_an_episode_whose_version_is_gone_switches_and_says_so() -> None:
    async def work() -> None:
        with decider(plan({"v1": V1, "v2": constant("v2", 1)}, "v2", 1.0)) as (pipeline, ledger, _):
            (before,) = answered(await pipeline.decide(rows([0.0, 1.0], episode="e")))
            pipeline.plan = plan({"v1": V1})
            after = [a for _ in range(2) for a in answered(await pipeline.decide(rows([0.0, 1.0], episode="e")))]
            assert [before.version, *(a.version for a in after)] == ["v2", "v1", "v1"]
            assert [a.switched for a in (before, *after)] == [False, True, False]
            assert [decode_record(event.record).switched for event in recorded(ledger)] == [False, True, False]

    run(work)


def test_an_episode_leaves_a_version_that_was_rolled_back_at_once() -> None:
    versions = {"v1": constant("v1", 0), "v2": constant("v2", 1)}

    async def work() -> None:
        with decider(plan(versions, "v2", 1.0)) as (pipeline, *_):
            (before,) = answered(await pipeline.decide(rows([0.0, 1.0], episode="e")))
            pipeline.plan = dataclasses.replace(plan(versions), barred=frozenset({"v2"}))  # it stays loaded
            (after,) = answered(await pipeline.decide(rows([0.0, 1.0], episode="e")))
            assert (before.version, after.version, after.switched) == ("v2", "v1", True)

    run(work)


def test_records_say_in_which_control_state_an_episode_was_assigned() -> None:
    def at(generation: int, weight: float) -> Plan:
        found = plan({"v1": V1, "v2": constant("v2", 1)}, "v2", weight)
        routes = dataclasses.replace(found.routes, generation=generation)
        return dataclasses.replace(found, generation=generation, routes=routes)

    async def work() -> None:
        with decider(at(7, 1.0)) as (pipeline, ledger, _):
            for generation in (7, 9):
                pipeline.plan = at(generation, 0.5)
                await pipeline.decide([*rows([0.0, 1.0], episode="e"), *rows([0.0, 1.0], episode=f"e{generation}")])
            found = [decode_record(event.record) for event in recorded(ledger)]
            assert sorted((each.generation, each.pinned) for each in found) == [(7, 0), (7, 0), (9, 0), (9, 7)]

    run(work)


def count_calls(engine: Engine, calls: list[int]) -> None:
    """Note the number of rows of each call of the network."""
    step = engine.step

    def step_and_note(states: Any, *given: Any) -> Any:
        calls.append(len(states))
        return step(states, *given)

    engine.step = step_and_note  # type: ignore[method-assign,assignment]


def test_rows_that_arrive_together_share_one_call_and_get_their_own_answers() -> None:
    async def work() -> None:
        calls: list[int] = []
        with decider(plan({"v1": constant("v1", 1)})) as (pipeline, ledger, _):
            engine = pipeline.plan.versions["v1"].engine
            count_calls(engine, calls)
            coalescer = Coalescer(pipeline, max_batch=8)
            futures = [coalescer.submit(rows([float(i), 0.0], episode=f"e{i}")) for i in range(20)]
            outcomes = [await future for future in futures]
            assert calls == [8, 8, 4]
            assert [event.episode for event in recorded(ledger)] == [f"e{i}" for i in range(20)]
            assert [answered(list(each))[0].decision_id for each in outcomes] == [
                event.id for event in recorded(ledger)
            ]
            assert len(await coalescer.decide(rows(*([0.0, 1.0] for _ in range(20))))) == 20
            await coalescer.aclose()
            assert coalescer.statistics() == {"waiting": 0, "running": 0}

    run(work)


def test_a_slow_network_runs_off_the_loop_and_the_next_batch_fills_meanwhile() -> None:
    async def work() -> None:
        calls: list[int] = []
        with decider(plan({"v1": constant("v1", 1)})) as (pipeline, *_):
            engine = pipeline.plan.versions["v1"].engine
            count_calls(engine, calls)
            engine.predicted_s = lambda rows: 0.001  # type: ignore[method-assign]
            coalescer = Coalescer(pipeline, max_batch=64)
            first = coalescer.submit(rows([0.0, 1.0]))
            while not coalescer.statistics()["running"]:
                await asyncio.sleep(0)
            late = [coalescer.submit(rows([0.0, 1.0])) for _ in range(5)]
            await asyncio.gather(first, *late)
            assert calls == [1, 5]

    run(work)


def test_a_network_that_hangs_is_answered_with_the_fallback_and_does_not_hold_up_what_follows() -> None:
    async def work() -> None:
        loaded, release = constant("v1", 1), threading.Event()
        with decider(plan({"v1": loaded}), timeout_s=0.05) as (pipeline, ledger, _):
            step = loaded.engine.step
            loaded.engine.predicted_s = lambda rows: 1.0
            loaded.engine.step = lambda *given: (release.wait(30), step(*given))[1]
            for _ in range(2):
                (answer,) = answered(await pipeline.decide(rows([0.0, 1.0])))
                assert (answer.fallback, answer.action, answer.propensity) == ("inference_timeout", 0, 1.0)
            release.set()
            healed = answer
            while healed.fallback is not None:  # 50 ms may be too short for a busy machine
                (healed,) = answered(await pipeline.decide(rows([0.0, 1.0])))
                assert healed.fallback in (None, "inference_timeout")
            assert healed.action == 1
            assert [decode_record(event.record).fallback for event in recorded(ledger)][-1] is None

    run(work)


def test_a_caller_who_leaves_does_not_disturb_the_batch_and_its_decision_is_recorded() -> None:
    async def work() -> None:
        with decider(plan({"v1": V1})) as (pipeline, ledger, _):
            coalescer = Coalescer(pipeline, max_batch=8)
            gone, stays = coalescer.submit(rows([0.0, 1.0])), coalescer.submit(rows([0.0, 1.0]))
            gone.cancel()
            assert len(await stays) == 1
            assert len(recorded(ledger)) == 2

    run(work)


def in_halves(groups: list[Group], _: Safeguards) -> list[list[Group]]:
    """As if every other row had to wait for the one before it."""
    return [
        [group.some([i for i, index in enumerate(group.index) if index % 2 == turn]) for group in groups]
        for turn in (0, 1)
    ]


@pytest.mark.parametrize("cut", [None, in_halves])
def test_each_row_gets_its_own_answer_whichever_version_and_turn_it_was_in(
    cut: Callable[[list[Group], Safeguards], list[list[Group]]] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if cut is not None:
        monkeypatch.setattr("service.act.waves", cut)

    async def work() -> None:
        both = {"v1": constant("v1", 0), "v2": constant("v2", 1)}
        with decider(plan(both, challenger="v2", weight=0.5)) as (pipeline, ledger, _):
            asked = [Row([float(i), 0.0], key=f"k{i}") for i in range(64)]
            outcomes = answered(await pipeline.decide(asked))
            assert {outcome.version for outcome in outcomes} == {"v1", "v2"}
            keys = {event.id: decode_record(event.record).key for event in recorded(ledger)}
            assert [keys[outcome.decision_id] for outcome in outcomes] == [row.key for row in asked]

    run(work)
