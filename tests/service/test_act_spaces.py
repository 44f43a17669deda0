"""The pipeline with points, several factors, mask inputs and networks that remember; the ledger is in memory."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from prometheus_client import CollectorRegistry

from policies.errors import SurefootError
from service.allowed import read_allowed
from service.decision import decode_record, read_action
from service.history import describe, replay
from service.metrics import Metrics
from service.plan import Outcome, Row
from service.wire import ActResponse, AllowedBox
from tests.policies.networks import linear
from tests.service.pipelines import KEYS, decider, plan, recorded, version

METRICS = Metrics(CollectorRegistry())
BOX = {"kind": "continuous", "low": [-1.0, -1.0], "high": [1.0, 2.0]}
FACTORS = {"kind": "multi_discrete", "nvec": [2, 2], "factors": [{"name": "x", "names": ["l", "r"]}, {"name": "y"}]}
WIDE = [[1.0, 0.0, 1.0, 0.0], [0.0, 1.0, 0.0, 1.0]]
STATES = [[0.0, 1.0], [1.0, 0.0]]
GOLDEN = [[0.0, 1.0, 0.0, 1.0], [1.0, 0.0, 1.0, 0.0]]


def points(head: str, fallback: Any = (0.0, 0.5), **changes: Any) -> Any:
    proto = linear(WIDE) if head != "action" else linear([[1, 0], [0, 1]])
    golden = GOLDEN if head != "action" else STATES
    exploration = {"epsilon": 0.4, "sigma": 0.3}
    fallback = list(fallback) if fallback != "none" else fallback
    changes = {"head": head, "action": BOX, "exploration": exploration, "fallback": fallback, **changes}
    return version(METRICS, "v1", proto, golden_outputs=golden, **changes)


def factors(head: str = "logits", **changes: Any) -> Any:
    return version(
        METRICS, "v1", linear(WIDE), golden_outputs=GOLDEN, head=head, action=FACTORS, fallback=["l", 1], **changes
    )


def run(work: Any) -> Any:
    made: Coroutine[Any, Any, Any] = work()
    return asyncio.run(made)


def answered(outcomes: list[Outcome]) -> list[ActResponse]:
    assert all(isinstance(outcome, ActResponse) for outcome in outcomes)
    return outcomes  # type: ignore[return-value]


LOADED = {
    "gaussian": points("gaussian"),
    "squashed": points("squashed_gaussian"),
    "deterministic": points("action"),
    "unscaled": points("action", action_transform="unscale"),
    "still": points("gaussian", exploration={"epsilon": 0.0}),
    "logits": factors(),
    "greedy": factors("q_values"),
}


@pytest.mark.parametrize("kind", LOADED)
def test_every_decision_replays_from_its_record_bit_for_bit(kind: str) -> None:
    loaded = LOADED[kind]
    space = loaded.bundle.action
    some: list[Any] = [None, AllowedBox([-0.5, None], [0.5, 0.5]), AllowedBox(low=[2.0, 0.0])]
    if kind in ("logits", "greedy"):
        some = [None, [["l"], None], [None, []]]

    async def work() -> None:
        random = np.random.default_rng(3)
        with decider(plan({"v1": loaded})) as (pipeline, ledger, _):
            batch = [
                Row(
                    state=random.normal(size=2).tolist() if i % 7 else [np.nan, 0.0],
                    allowed=read_allowed(some[i % 3], space, "allowed_actions"),
                    explore=bool(i % 4),
                    include=("values", "distribution"),
                )
                for i in range(200)
            ]
            answers = answered(await pipeline.decide(batch))
            for event, answer in zip(recorded(ledger), answers, strict=True):
                record = decode_record(event.record)
                again = replay(event.id, event.mask, record, KEYS.draw_key(record.key_id))
                assert space.wire(again.action) == answer.action == space.wire(read_action(event.action))
                assert (again.propensity, again.log_propensity) == (answer.propensity, answer.log_propensity)
                assert again.explored == answer.explored
                assert (answer.propensity is None) == (answer.propensity_kind != "mass")
                assert space.validate(again.action)
            assert {answer.fallback for answer in answers} >= {None, "nothing_allowed", "not_finite"}
            assert any(answer.explored for answer in answers) == (kind != "still")

    run(work)


def test_a_point_outside_the_callers_box_is_overridden_and_stays_within_it() -> None:
    async def work() -> None:
        with decider(plan({"v1": points("action", exploration={"epsilon": 0.0})})) as (pipeline, ledger, _):
            allowed = read_allowed(AllowedBox(high=[0.25, None]), pipeline.plan.action, "allowed_actions")
            (answer,) = answered(
                await pipeline.decide([Row(state=[0.9, 0.3], allowed=allowed, include=("distribution",))])
            )
            assert answer.action == pytest.approx([0.25, 0.3])
            assert (answer.safety.overridden, answer.safety.rules) == (True, ("request",))
            assert answer.safety.proposed == pytest.approx([0.9, 0.3])
            assert (answer.propensity, answer.propensity_kind, answer.log_propensity) == (1.0, "mass", 0.0)
            assert decode_record(recorded(ledger)[0].record).masked_mass == pytest.approx(1.0)

    run(work)


def test_without_a_fallback_a_point_that_cannot_be_had_is_refused() -> None:
    async def work() -> None:
        with decider(plan({"v1": points("gaussian", fallback="none")})) as (pipeline, ledger, _):
            (outcome,) = await pipeline.decide([Row(state=[np.nan, 0.0])])
            assert isinstance(outcome, SurefootError)
            assert outcome.code == "no_safe_action"
            assert recorded(ledger) == []

    run(work)


def test_a_point_that_fails_the_last_look_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    def mistaken(allowed: Any, space: Any) -> Any:
        from safety.types import BoxConstraint

        low, high = (np.broadcast_to(end, (len(allowed), space.size)) for end in space.bounds)
        return BoxConstraint(low, high)

    monkeypatch.setattr("service.judge.constrain_box", mistaken)

    async def work() -> None:
        with decider(plan({"v1": points("action", exploration={"epsilon": 0.0})})) as (pipeline, _, _):
            row = Row(state=[0.9, 0.3], allowed=((-1.0, -1.0), (0.0, 2.0)))
            (answer,) = answered(await pipeline.decide([row]))
            assert (answer.action, answer.fallback, answer.propensity) == ([0.0, 0.5], "check_failed", None)
            assert (answer.propensity_reason, answer.log_propensity) == ("check_failed", None)

    run(work)


def test_last_resort_names_a_point_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.settle.check_box", None)

    async def work() -> None:
        with decider(plan({"v1": points("gaussian")})) as (pipeline, _, _):
            (answer,) = answered(await pipeline.decide([Row(state=[0.9, 0.3])]))
            assert (answer.action, answer.safety.proposed, answer.logged) == ([0.0, 0.5], [0.0, 0.5], False)

    run(work)


@pytest.mark.parametrize("kind", ["gaussian", "still", "logits"])
def test_a_record_is_described_for_people(kind: str) -> None:
    async def work() -> None:
        with decider(plan({"v1": LOADED[kind]})) as (pipeline, ledger, _):
            (answer,) = answered(await pipeline.decide([Row(state=[0.1, 0.2])]))
            (event,) = recorded(ledger)

            class Stored:
                id, at_ms, episode, step, state, mask, action = (
                    event.id, event.at_ms, event.episode, event.step, event.state, event.mask, event.action
                )  # fmt: skip
                producer, epoch, seq = "p", 1, 1

            shown = describe(Stored, decode_record(event.record))
            assert shown["action"] == answer.action
            why = shown["why"]
            if kind == "logits":
                assert [len(part) for part in why["behaviour"]] == [2, 2]
            else:
                assert (why["low"], why["high"]) == (BOX["low"], BOX["high"])
                assert why["sigma"] == (None if kind == "still" else [0.3, 0.3])

    run(work)


def counter() -> onnx.ModelProto:
    """A network that remembers how many steps it took (h), and answers with values (h, 1 - h)."""
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [
            helper.make_node("Slice", ["observation", "zero", "one", "one"], ["first"]),
            helper.make_node("Mul", ["first", "nothing"], ["none"]),
            helper.make_node("Add", ["h", "none"], ["before"]),
            helper.make_node("Add", ["before", "unit"], ["h_out"]),
            helper.make_node("Sub", ["unit", "h"], ["other"]),
            helper.make_node("Concat", ["before", "other"], ["q_values"], axis=1),
        ],
        "counter",
        [value("observation", TensorProto.FLOAT, ["batch", 2]), value("h", TensorProto.FLOAT, ["batch", 1])],
        [value("q_values", TensorProto.FLOAT, ["batch", 2]), value("h_out", TensorProto.FLOAT, ["batch", 1])],
        [
            numpy_helper.from_array(np.array([0], np.int64), "zero"),
            numpy_helper.from_array(np.array([1], np.int64), "one"),
            numpy_helper.from_array(np.array([[0.0]], np.float32), "nothing"),
            numpy_helper.from_array(np.array([[1.0]], np.float32), "unit"),
        ],
    )
    nodes = graph.node
    nodes[0].input.insert(3, "one")  # starts, ends, axes, steps
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)


def remembering(label: str = "v1") -> Any:
    recurrent = {"states": [{"input": "h", "output": "h_out", "shape": [1]}]}
    return version(
        METRICS, label, counter(), golden_outputs=[[0.0, 1.0], [0.0, 1.0]], recurrent=recurrent,
        exploration={"epsilon": 0.0},
    )  # fmt: skip


def step(episode: str, number: int | None) -> Row:
    return Row(state=[0.0, 0.0], episode=episode, step=number, include=("values",))


def values(answers: list[ActResponse]) -> list[float]:
    return [(answer.values or [np.nan])[0] for answer in answers]


def test_a_recurrent_version_remembers_each_episode_even_within_one_batch() -> None:
    async def work() -> None:
        with decider(plan({"v1": remembering()})) as (pipeline, _, _):
            batch = [step("a", 0), step("b", 0), step("a", 1), step("a", 2), step("b", 1)]
            answers = answered(await pipeline.decide(batch))
            assert values(answers) == [0.0, 0.0, 1.0, 2.0, 1.0]
            again = answered(await pipeline.decide([step("a", 3), step("a", 3), step("b", None)]))
            assert values(again) == [3.0, 3.0, 2.0], "the same step twice is one step"
            assert not any(answer.state_reset for answer in again)
            assert pipeline.plan.recurrent

    run(work)


def test_a_step_that_does_not_follow_starts_anew_and_says_so_and_an_end_forgets() -> None:
    async def work() -> None:
        with decider(plan({"v1": remembering()})) as (pipeline, ledger, _):
            await pipeline.decide([step("a", 0)])
            (hole,) = answered(await pipeline.decide([step("a", 5)]))
            assert (hole.state_reset, values([hole])) == (True, [0.0])
            assert decode_record(recorded(ledger)[-1].record).state_reset
            (on,) = answered(await pipeline.decide([step("a", 6)]))
            assert (on.state_reset, values([on])) == (False, [1.0])
            pipeline.memories.ended(on.decision_id)
            (after,) = answered(await pipeline.decide([step("a", 7)]))
            assert (after.state_reset, values([after])) == (True, [0.0])

    run(work)


def test_a_step_that_fails_is_answered_with_the_fallback_and_its_episode_starts_anew() -> None:
    async def work() -> None:
        loaded = remembering()
        with decider(plan({"v1": loaded})) as (pipeline, _, _):
            await pipeline.decide([step("a", 0)])
            kept, loaded.engine.step = loaded.engine.step, None
            (failed,) = answered(await pipeline.decide([step("a", 1)]))
            assert failed.fallback == "inference_failed"
            loaded.engine.step = kept
            (after,) = answered(await pipeline.decide([step("a", 2)]))
            assert (after.fallback, after.state_reset, values([after])) == (None, True, [0.0])

    run(work)


def test_a_network_with_a_mask_input_is_told_what_the_caller_allows() -> None:
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [helper.make_node("Add", ["observation", "mask"], ["q_values"])],
        "masked",
        [value("observation", TensorProto.FLOAT, ["batch", 2]), value("mask", TensorProto.FLOAT, ["batch", 2])],
        [value("q_values", TensorProto.FLOAT, ["batch", 2])],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)
    from hashlib import sha256

    model = {"sha256": sha256(proto.SerializeToString()).hexdigest(), "input": "observation", "output": "q_values"}
    loaded = version(METRICS, "v1", proto, golden_outputs=[[1.0, 2.0], [2.0, 1.0]], model=model | {"mask": "mask"})

    async def work() -> None:
        with decider(plan({"v1": loaded})) as (pipeline, _, _):
            batch = [
                Row(state=[5.0, 7.0], allowed=(0,), include=("values",)),
                Row(state=[5.0, 7.0], include=("values",)),
            ]
            told, free = answered(await pipeline.decide(batch))
            assert (told.values, free.values) == ([6.0, 7.0], [6.0, 8.0])
            assert (told.action, free.safety.proposed) == (0, "a1")

    run(work)
