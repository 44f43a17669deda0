"""When a batch is cut: with what came in two turns, and once the one before is far enough."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from policies.errors import Overloaded
from service import coalesce
from service.coalesce import Coalescer
from service.metrics import Metrics
from service.plan import Group, Outcome, Row
from service.wire import ActResponse
from tests.policies.networks import linear
from tests.service.disks import Disk
from tests.service.pipelines import decider, plan, recorded, rows, version

V1 = version(Metrics(CollectorRegistry()), "v1", linear([[1, 0], [0, 1]]))


async def turns() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


def test_rows_wait_for_a_quick_commit_and_share_the_next_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    async def work() -> None:
        disk = Disk(monkeypatch)
        with decider(plan({"v1": V1})) as (pipeline, ledger, _):
            coalescer = Coalescer(pipeline, max_batch=8)
            told: list[Sequence[Outcome] | BaseException] = []
            coalescer.put(rows([0.0, 1.0]), told.append)
            await disk.until(1)
            for _ in range(10):
                coalescer.put(rows([0.0, 1.0]), told.append)
                await turns()
            assert disk.sizes == [1]
            disk.commits[0][1].set_result(None)
            await disk.until(2)
            assert disk.sizes == [1, 8]
            disk.commits[1][1].set_result(None)
            await disk.until(3)
            assert disk.sizes == [1, 8, 2]
            disk.commits[2][1].set_result(None)
            await coalescer.aclose()
            answers = [each for outcomes in told if not isinstance(outcomes, BaseException) for each in outcomes]
            assert [each.decision_id for each in answers if isinstance(each, ActResponse)] == [
                event.id for event in recorded(ledger)
            ]
            assert len(answers) == 11

    asyncio.run(work())


def test_what_takes_long_overlaps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coalesce, "QUICK_S", 0.0)

    async def work() -> None:
        disk = Disk(monkeypatch)
        with decider(plan({"v1": V1})) as (pipeline, *_):
            coalescer = Coalescer(pipeline, max_batch=8)
            first = coalescer.submit(rows([0.0, 1.0]))
            await disk.until(1)
            disk.commits[0][1].set_result(None)
            await first
            for batch in (2, 3, 4):
                coalescer.submit(rows([0.0, 1.0]))
                await disk.until(batch)
            assert coalescer.statistics() == {"waiting": 0, "running": 3}
            for _, committed in disk.commits[1:]:
                committed.set_result(None)
            await coalescer.aclose()
            assert coalescer.statistics() == {"waiting": 0, "running": 0}

    asyncio.run(work())


def test_rows_that_come_too_late_are_not_even_inferred() -> None:
    async def work() -> None:
        with decider(plan({"v1": V1})) as (pipeline, ledger, clock):
            engine, asked = pipeline.plan.versions["v1"].engine, list[int]()
            step = engine.step

            def note(states: Any, *given: Any) -> Any:
                asked.append(len(states))
                return step(states, *given)

            engine.step = note  # type: ignore[method-assign,assignment]
            coalescer = Coalescer(pipeline, 8, clock.monotonic_s)
            late = coalescer.submit(rows([0.0, 1.0]), clock.monotonic_s())
            good = coalescer.submit(rows([0.0, 1.0]), clock.monotonic_s() + 0.001)
            with pytest.raises(Overloaded):
                await late
            assert len(await good) == 1
            with pytest.raises(Overloaded):
                await coalescer.decide(rows([0.0, 1.0]), clock.monotonic_s())
            assert (asked, len(recorded(ledger))) == ([1], 1)
            await coalescer.aclose()

    asyncio.run(work())


def test_whoever_has_less_time_than_the_network_takes_is_not_let_in_and_one_bad_call_is_forgotten() -> None:
    async def work() -> None:
        with decider(plan({"v1": V1})) as (pipeline, ledger, clock):
            coalescer, infer, takes_ms = Coalescer(pipeline, 8, clock.monotonic_s), pipeline.infer, 0

            async def slow(given: Sequence[Row]) -> list[Group]:
                groups = await infer(given)
                clock.advance(takes_ms)
                return groups

            pipeline.infer = slow  # type: ignore[method-assign,assignment]

            async def within(ms: int) -> bool:
                try:
                    await coalescer.submit(rows([0.0, 1.0]), clock.monotonic_s() + ms / 1000)
                except Overloaded:
                    return False
                return True

            takes_ms = 100
            assert await within(101)
            before = clock.now_ms
            assert [await within(99), clock.now_ms == before] == [False, True], "the network is not asked"
            takes_ms = 10
            assert [await within(30), await within(30)] == [False, True], "half of it, and then what it takes now"
            takes_ms = 1000
            assert not await within(500)
            takes_ms = 10
            assert [await within(200) for _ in range(5)] == [False, False, False, True, True]
            assert len(recorded(ledger)) == 4

    asyncio.run(work())


def test_who_cannot_be_told_does_not_keep_others_from_being_told() -> None:
    def gone(_: object) -> None:
        raise RuntimeError("gone")

    async def work() -> None:
        with decider(plan({"v1": V1})) as (pipeline, *_):
            coalescer = Coalescer(pipeline, max_batch=8)
            coalescer.put(rows([0.0, 1.0]), gone)
            assert len(await coalescer.submit(rows([0.0, 1.0], [1.0, 0.0]))) == 2

    asyncio.run(work())
