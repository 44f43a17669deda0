"""What `/act` explores and says while replicas do not confirm: nothing is explored that is not recorded."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

from prometheus_client import CollectorRegistry

from policies.errors import LedgerBroken, Unconfirmed
from service.act import Decider
from service.clock import ManualClock
from service.decision import DecisionEvent, decode_events
from service.ledger import Ledger
from service.metrics import Metrics
from service.plan import Outcome
from service.shipcall import Confirm
from service.slots import take_slot
from service.wire import ActResponse
from tests.service.pipelines import IDENTITY, decider, plan, rows, version
from tests.service.test_ledger import blobs_on_disk

METRICS = Metrics(CollectorRegistry())


@asynccontextmanager
async def replicated(data_dir: Path) -> AsyncIterator[tuple[Decider, Ledger]]:
    """A pipeline that explores always, on a ledger whose replicas only the test speaks for."""
    slot = take_slot(data_dir)
    ledger = Ledger(slot, ManualClock(), tier="replicated", min_free_bytes=0, confirm=Confirm(1, 0.05))
    ledger.register("toy")
    loaded = version(METRICS, "v1", IDENTITY, exploration={"epsilon": 1.0})
    with decider(plan({"v1": loaded})) as (pipeline, _, _clock):
        pipeline._ledger = ledger
        try:
            yield pipeline, ledger
        finally:
            await ledger.aclose()
            slot.release()


def run(data_dir: Path, scenario: Callable[[Decider, Ledger], Awaitable[None]]) -> None:
    async def main() -> None:
        async with asyncio.timeout(20.0), replicated(data_dir) as (pipeline, ledger):
            await scenario(pipeline, ledger)

    asyncio.run(main())


async def answer(pipeline: Decider) -> ActResponse:
    (outcome,) = await pipeline.decide(rows([0.0, 1.0]))
    return told(outcome)


def told(outcome: Outcome) -> ActResponse:
    assert isinstance(outcome, ActResponse)
    return outcome


def on_disk(data_dir: Path) -> dict[str, DecisionEvent]:
    events = [event for _, blob in blobs_on_disk(data_dir, policy="toy") for event in decode_events(blob)]
    return {event.id: event for event in events if isinstance(event, DecisionEvent)}


def test_nothing_is_explored_before_replicas_have_confirmed_anything(tmp_path: Path) -> None:
    seen: list[ActResponse] = []

    async def scenario(pipeline: Decider, ledger: Ledger) -> None:
        seen.append(await answer(pipeline))
        seen.append(await answer(pipeline))

    run(tmp_path, scenario)
    assert [(each.exploration.epsilon, each.action, each.propensity, each.logged) for each in seen] == [
        (0.0, 1, 1.0, False)
    ] * 2
    assert on_disk(tmp_path).keys() == {each.decision_id for each in seen}, "kept, though not confirmed"


def test_a_drawn_decision_that_is_not_confirmed_in_time_is_answered_as_it_was_recorded(tmp_path: Path) -> None:
    seen: list[ActResponse] = []

    async def scenario(pipeline: Decider, ledger: Ledger) -> None:
        ledger.confirmed(ledger.register("toy"))
        seen.append(await answer(pipeline))  # drawn while replicas confirmed; they fall silent
        seen.append(await answer(pipeline))

    run(tmp_path, scenario)
    drawn, after = seen
    assert (drawn.explored, drawn.exploration.epsilon, drawn.logged) == (True, 1.0, False)
    assert (after.explored, after.exploration.epsilon, after.logged) == (False, 0.0, False)
    recorded = on_disk(tmp_path)[drawn.decision_id]
    assert recorded.action == str(drawn.action), "another action now would make the record a lie"


def test_confirmed_decisions_explore_and_are_logged(tmp_path: Path) -> None:
    async def scenario(pipeline: Decider, ledger: Ledger) -> None:
        lane = ledger.register("toy")
        ledger.confirmed(lane)
        deciding = asyncio.create_task(answer(pipeline))
        while lane.end == 1:
            await asyncio.sleep(0)
        lane.ack(lane.end - 1)
        ledger.confirmed(lane)
        got = await deciding
        assert (got.explored, got.logged) == (True, True)

    run(tmp_path, scenario)


def test_unconfirmed_is_a_kind_of_broken_with_a_code_of_its_own() -> None:
    assert issubclass(Unconfirmed, LedgerBroken)
    assert (Unconfirmed.code, Unconfirmed.status, Unconfirmed.retry_after_s) == ("unconfirmed", 503, 1)
