"""Episodes that move between workers: the same actions as on one, whole memories, and honesty where there is none."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from prometheus_client import CollectorRegistry

from policies.route import Assignment
from service.act import Decider
from service.arrivals import Arrivals, Outcome, remembers
from service.clock import ManualClock
from service.memory import Kept, Memories
from service.memory_store import MemoryStore
from service.metrics import Metrics
from service.plan import LoadedVersion, Plan, Row
from service.redis_streams import RedisStreams, connect
from service.wire import ActResponse
from tests.policies.networks import linear
from tests.service.limiting import Mode, Proxy
from tests.service.pipelines import decider, plan, version
from tests.surefoot.valkey import Valkey

METRICS = Metrics(CollectorRegistry())
RECURRENT = {"states": [{"input": "h", "output": "h_out", "shape": [8]}]}
STATES = [[float(x) for x in row] for row in np.random.default_rng(5).normal(size=(20, 2)).round(3)]


def elman(seed: int = 1) -> onnx.ModelProto:
    """A recurrent network of two features, eight units and two actions: h' = tanh(x·A + h·B), values h'·C."""
    random = np.random.default_rng(seed)
    weights = {"a": (2, 8), "b": (8, 8), "c": (8, 2)}
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [
            helper.make_node("MatMul", ["observation", "a"], ["seen"]),
            helper.make_node("MatMul", ["h", "b"], ["known"]),
            helper.make_node("Add", ["seen", "known"], ["sum"]),
            helper.make_node("Tanh", ["sum"], ["h_out"]),
            helper.make_node("MatMul", ["h_out", "c"], ["q_values"]),
        ],
        "elman",
        [value("observation", TensorProto.FLOAT, ["batch", 2]), value("h", TensorProto.FLOAT, ["batch", 8])],
        [value("q_values", TensorProto.FLOAT, ["batch", 2]), value("h_out", TensorProto.FLOAT, ["batch", 8])],
        [numpy_helper.from_array(random.normal(size=s).astype(np.float32), n) for n, s in weights.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)


def golden(seed: int = 1) -> tuple[list[list[float]], list[list[float]]]:
    """What the network answers to some first states, by numpy."""
    random = np.random.default_rng(seed)
    a, _, c = (random.normal(size=size).astype(np.float32) for size in ((2, 8), (8, 8), (8, 2)))
    states = STATES[:2]
    return states, (np.tanh(np.array(states, np.float32) @ a) @ c).tolist()


def remembering(label: str = "v1", seed: int = 1) -> LoadedVersion:
    states, outputs = golden(seed)
    return version(
        METRICS, label, elman(seed), golden_states=states, golden_outputs=outputs, recurrent=RECURRENT,
        exploration={"epsilon": 0.0},
    )  # fmt: skip


V1, V2 = remembering("v1", 1), remembering("v2", 2)
PLAIN = version(METRICS, "v3", linear([[1, 0], [0, 1]]))
ALONE = plan({"v1": V1})
ZEROS = np.zeros(8, np.float32)


@dataclass
class Worker:
    """A pipeline of its own that shares a Redis with others."""

    pipeline: Decider
    store: MemoryStore
    looked_up: list[tuple[Outcome, int]]

    async def step(self, number: int | None, episode: str = "e") -> ActResponse:
        row = Row(state=list(STATES[number or 0]), episode=episode, step=number, include=("values",))
        (answer,) = await self.pipeline.decide([row])
        assert isinstance(answer, ActResponse)
        return answer

    async def written(self) -> None:
        await self.store.flush()
        assert self.store.statistics().waiting == 0


@contextlib.asynccontextmanager
async def worker(url: str, policy: str, in_force: Plan = ALONE, max_bytes: int = 1 << 20) -> AsyncIterator[Worker]:
    streams = RedisStreams(connect(url))
    store = MemoryStore(streams, policy, 600.0, Metrics(CollectorRegistry()))
    memories = Memories(max_bytes, 600.0, store)
    looked_up: list[tuple[Outcome, int]] = []
    arrivals = Arrivals(memories, store, ManualClock(), lambda outcome, count: looked_up.append((outcome, count)))
    with decider(in_force, memories=memories, arrivals=arrivals) as (pipeline, _, _):
        yield Worker(pipeline, store, looked_up)
    await store.aclose()
    await streams.aclose()


def shown(answer: ActResponse) -> tuple[Any, ...]:
    return answer.action, answer.values, answer.version, answer.state_reset, answer.fallback


async def alone(policy: str, numbers: range = range(20)) -> list[tuple[Any, ...]]:
    with decider(ALONE) as (pipeline, _, _):
        rows = [Row(state=list(STATES[n]), episode="e", step=n, include=("values",)) for n in numbers]
        answers = [(await pipeline.decide([row]))[0] for row in rows]
    assert all(isinstance(each, ActResponse) for each in answers)
    return [shown(each) for each in answers if isinstance(each, ActResponse)]


def test_an_episode_that_alternates_between_workers_gets_the_same_answers(valkey_url: str, policy: str) -> None:
    async def work() -> None:
        expected = await alone(policy)
        assert len({str(each[1]) for each in expected}) == 20
        assert {each[0] for each in expected} == {0, 1}
        async with worker(valkey_url, policy) as one, worker(valkey_url, policy) as two:
            found = []
            for number in range(20):
                here = (one, two)[number % 2]
                found.append(shown(await here.step(number)))
                await here.written()
            assert found == expected
            assert one.looked_up == [("found", 1)] * 9
            assert two.looked_up == [("found", 1)] * 10

    asyncio.run(work())


def test_a_worker_that_comes_back_to_an_episode_does_not_go_on_from_its_own_old_step(
    valkey_url: str, policy: str
) -> None:
    async def work() -> None:
        expected = await alone(policy)
        async with worker(valkey_url, policy) as one, worker(valkey_url, policy) as two:
            found = [shown(await one.step(number)) for number in range(5)]
            await one.written()
            found += [shown(await two.step(number)) for number in range(5, 12)]
            await two.written()
            found += [shown(await one.step(number)) for number in range(12, 20)]
            assert found == expected
            assert (one.looked_up, two.looked_up) == ([("found", 1)], [("found", 1)])
            await one.written()
            again = await two.step(19)
            assert shown(again) == expected[19], "a step whose answer was lost, asked again elsewhere"
            hole = await two.step(3)
            assert (hole.state_reset, two.looked_up[-1]) == (True, ("unfit", 1))

    asyncio.run(work())


def test_a_worker_that_starts_anew_goes_on_with_memory_and_version(valkey_url: str, policy: str) -> None:
    """Weights have changed meanwhile: by the hash the episode would be on the other version."""
    before, after = plan({"v1": V1, "v2": V2}, "v2", 1.0), plan({"v1": V1, "v2": V2})

    async def work() -> None:
        async with worker(valkey_url, policy, before) as one:
            first = [await one.step(number) for number in range(3)]
            assert {each.version for each in first} == {"v2"}
            (new,) = [await one.step(0, "new")]
            assert new.version == "v2"
        async with worker(valkey_url, policy, after) as two:
            on = await two.step(3)
            assert (on.version, on.role, on.state_reset, on.switched) == ("v2", "challenger", False, False)
            pin = two.pipeline.pins.get("e")
            assert pin == Assignment("v2", "challenger", 1.0), "with the weight that it was assigned by"
            assert (await two.step(0, "begun here")).version == "v1"
            unnumbered = await two.step(None, "new")
            assert (unnumbered.version, unnumbered.state_reset) == ("v2", False)
            assert two.looked_up == [("found", 1), ("found", 1)]
            await two.written()
        gone = plan({"v1": V1, "v3": PLAIN}, "v3", 1.0)
        async with worker(valkey_url, policy, gone) as three:  # it has no v2
            switched = await three.step(4)
            assert (switched.version, switched.state_reset) == ("v3", False), "a version without memory resets none"
            assert switched.switched
            assert three.looked_up == [("unfit", 1)]
            await three.step(5)
            assert three.looked_up == [("unfit", 1)], "it is on a version without memory now"
        lone = plan({"v1": V1})
        async with worker(valkey_url, policy, lone) as four:
            cut = await four.step(4)
            assert (cut.version, cut.state_reset, cut.switched) == ("v1", True, True)
            assert not (await four.step(5)).switched

    asyncio.run(work())


def test_an_episode_that_changed_its_version_elsewhere_comes_back_on_that_one(valkey_url: str, policy: str) -> None:
    async def work() -> None:
        async with worker(valkey_url, policy, plan({"v1": V1, "v2": V2})) as one:
            assert [(await one.step(number)).version for number in range(3)] == ["v1"] * 3
            theirs = Kept(Assignment("v2", "champion", 1.0), "v2", V2.bundle.digest, 5, "id", ZEROS, ZEROS)
            await one.written()
            one.store.put_nowait("e", theirs)
            await one.written()
            on = await one.step(6)
            assert (on.version, on.state_reset, on.switched) == ("v2", False, False)
            other = await one.step(2, "stand-in")
            one.store.put_nowait("stand-in", replace(theirs, assignment=Assignment("v1", "champion", 1.0)))
            await one.written()
            back = await one.step(6, "stand-in")
            assert (other.version, back.version, back.switched) == ("v1", "v1", True), "v2 had stood in at step 5"
            await one.written()
            one.store.put_nowait("stand-in", replace(theirs, step=50))
            await one.written()
            assert (await one.step(9, "stand-in")).version == "v1", "of a step that does not fit nothing is taken"

    asyncio.run(work())


def test_nothing_is_looked_up_for_first_steps_known_episodes_or_networks_without_memory(
    valkey_url: str, policy: str
) -> None:
    plain = plan({"v1": PLAIN})

    async def work() -> None:
        assert not remembers(plain)
        async with worker(valkey_url, policy, plain) as one:
            await one.step(4)
            assert one.looked_up == []
        async with worker(valkey_url, policy) as two:
            rows = [Row(state=list(STATES[n]), episode="e", step=n) for n in (0, 1, 2)]
            rows += [Row(state=list(STATES[0]), episode="f", step=7), Row(state=list(STATES[0]))]
            rows += [Row(state=list(STATES[0]), episode="g", step=None)]
            answers = await two.pipeline.decide(rows)
            assert [each.state_reset for each in answers if isinstance(each, ActResponse)] == [
                False, False, False, True, False, False,
            ]  # fmt: skip
            assert two.looked_up == [("unknown", 1), ("unknown", 1)], "f and g, in one round trip"

    asyncio.run(work())


def kept(before: Any, after: Any, step: int = 2, digest: str = V1.bundle.digest, assigned: str = "v1") -> Kept:
    return Kept(Assignment(assigned, "champion", 1.0), "v1", digest, step, "id", before, after)


@pytest.mark.parametrize(
    "other",
    [
        kept(np.zeros(7, np.float32), np.zeros(7, np.float32)),
        kept(np.zeros(8, np.float64), np.zeros(8, np.float64)),
        kept(np.zeros(8, np.float32), np.zeros(7, np.float32)),
        kept(np.zeros(8, np.float32), np.zeros(8, np.float32), digest="another"),
        kept(np.zeros(8, np.float32), np.zeros(8, np.float32), step=1),
    ],
    ids=["size", "type", "half", "digest", "step"],
)
def test_a_memory_that_is_not_of_this_very_network_and_step_is_not_taken(
    valkey_url: str, policy: str, other: Kept
) -> None:
    async def work() -> None:
        async with worker(valkey_url, policy) as one:
            one.store.put_nowait("e", other)
            await one.written()
            answer = await one.step(3)
            assert (answer.state_reset, one.looked_up) == (True, [("unfit", 1)])
            one.store.put_nowait("f", kept(np.zeros(8, np.float32), np.zeros(8, np.float32)))
            await one.written()
            assert not (await one.step(3, "f")).state_reset

    asyncio.run(work())


@pytest.mark.parametrize("mode", ["hang", "cut"])
def test_when_redis_is_cut_off_or_hangs_in_the_middle_answers_go_on(policy: str, tmp_path: Path, mode: Mode) -> None:
    async def work() -> None:
        expected = await alone(policy)
        with Valkey(tmp_path) as server:
            proxy = Proxy(str(server.socket_path))
            await proxy.start()
            async with worker(proxy.url, policy) as one, worker(server.url, policy) as two:
                for number in range(4):
                    assert shown(await one.step(number)) == expected[number]
                proxy.switch(mode)
                for number in range(4, 8):
                    assert shown(await one.step(number)) == expected[number], "it knows this one itself"
                lost = await one.step(4, "begun elsewhere")
                assert (lost.state_reset, lost.fallback) == (True, None)
                assert (await one.step(None, "who knows")).state_reset, "it may have begun elsewhere"
                assert not (await one.step(None, "who knows")).state_reset
                assert not (await one.step(0, "begun here")).state_reset
                assert one.looked_up == [("unanswered", 1), ("unanswered", 1)]
                assert (await two.step(8)).state_reset, "step 7 has not got to Redis"
                proxy.switch("pass")
                async with asyncio.timeout(60):
                    while one.store.statistics().waiting or one.store.statistics().overdue:
                        await one.store.flush()
                        await asyncio.sleep(0.01)
                assert shown(await one.step(8)) == expected[8]
                await one.written()
                assert shown(await one.step(9)) == expected[9]
                await one.written()
                assert shown(await two.step(10)) == expected[10], "after its return Redis is told"
            await proxy.close()

    asyncio.run(work())


def test_an_end_is_an_end_for_all_workers_and_so_is_eviction_but_not_for_who_went_on(
    valkey_url: str, policy: str
) -> None:
    async def work() -> None:
        async with worker(valkey_url, policy, max_bytes=1) as one, worker(valkey_url, policy) as two:
            await one.step(0)
            last = await one.step(1)
            await one.written()
            one.pipeline.memories.ended(last.decision_id)
            await one.written()
            assert (await two.step(2)).state_reset
            await one.step(0, "moving")
            await one.written()
            await two.step(1, "moving")
            await two.written()
            await one.step(0, "staying")
            await one.step(0, "other")  # there is room for one
            await one.written()
            assert await one.store.get(["staying"]) == [None]
            async with worker(valkey_url, policy) as three:
                assert not (await three.step(2, "moving")).state_reset

    asyncio.run(work())


def test_two_workers_in_one_step_leave_the_value_of_one_of_them(valkey_url: str, policy: str) -> None:
    async def work() -> None:
        async with worker(valkey_url, policy) as one, worker(valkey_url, policy) as two:
            for _ in range(20):
                first = await asyncio.gather(one.step(0), two.step(0))
                second = await asyncio.gather(one.step(1), two.step(1))
                await asyncio.gather(one.written(), two.written())
                (value,) = await one.store.get(["e"]) or [None]
                assert value is not None
                assert value.step == 1
                assert value.decision_id in {each.decision_id for each in second}
                assert first[0].values == first[1].values

    asyncio.run(work())
