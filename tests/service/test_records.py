"""What is recorded can be read back, by Lua and by people."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry

from policies.route import Assignment
from service import settled_rows
from service.decision import (
    DecisionEvent,
    Event,
    Record,
    RewardEvent,
    RewardFlags,
    RewardRecord,
    decode_events,
    decode_record,
    decode_reward_record,
    encode_columns,
    encode_events,
    encode_record,
    raws,
    record_of,
    shared,
)
from service.history import describe
from service.metrics import Metrics
from service.pins import Pins
from service.plan import Row
from service.wire import ActResponse
from tests.policies.networks import indexer, linear, logarithm
from tests.service.pipelines import decider, plan, recorded, version

METRICS = Metrics(CollectorRegistry())
raw = st.one_of(st.binary(max_size=40), st.sampled_from([31, 32, 255, 256, 65_535, 65_536]).map(lambda n: b"\xff" * n))
whole = st.integers(0, 2**53)


@given(
    st.builds(DecisionEvent, st.text(), st.text(), st.integers(-1, 2**53), whole, whole, whole, raw, raw, raw),
    st.builds(
        RewardEvent, st.text(), st.text(), st.text(), whole, whole, whole, st.integers(-1, 9), raw, st.text(), raw
    ),
)
def test_events_come_back_as_they_were(decision: DecisionEvent, reward: RewardEvent) -> None:
    events: list[Event] = [decision, reward]
    assert decode_events(encode_events(events)) == events


def test_reward_records_come_back() -> None:
    record = RewardRecord(metrics={"a": 1.0})
    assert decode_reward_record(encode_record(record)) == record
    assert RewardFlags.TERMINATED | RewardFlags.NOT_EXECUTED == 9


SOME: dict[str, object] = {
    "policy": "p", "assigned_version": "v1", "version": "v1", "digest": "d", "role": "champion", "generation": 3,
    "dtype": "<f4", "shape": (2,), "head": "q_values", "outputs_dtype": "<f4", "outputs": b"1", "target": b"2",
    "behaviour": b"3", "epsilon": 0.5, "explored": False, "proposed": 1, "action_name": "a", "propensity": 0.25,
    "key_id": 1,
}  # fmt: skip
RARE = st.fixed_dictionaries(
    {},
    optional={
        "rules": st.lists(st.text(max_size=3), max_size=3).map(tuple), "weight": st.sampled_from([0.5, 1.0]),
        "key": st.none() | st.text(max_size=40), "context": st.none() | st.dictionaries(st.text(), whole),
        "switched": st.booleans(), "price": st.floats(0.0, 1.0), "window": st.text(max_size=3), "slow": st.booleans(),
        "stand_in": st.none() | st.text(max_size=3), "masked_mass": st.floats(0.0, 1.0), "frozen": st.booleans(),
    },
)  # fmt: skip


@given(RARE, st.data())
def test_a_record_in_two_parts_is_the_record(rare: dict[str, object], data: st.DataObject) -> None:
    fields = SOME | rare
    common = data.draw(st.sets(st.sampled_from(sorted(fields))), label="in common")
    parts = [{k: v for k, v in fields.items() if (k in common) == wanted} for wanted in (True, False)]
    raw = raws(np.zeros((1, 1), dtype=np.uint8))[0]
    event = ("i", "", -1, 9, 1, "0", raw, raw, record_of(shared(parts[0]), parts[1]), "", 0, "D")
    (read,) = decode_events(encode_columns([event]))
    assert isinstance(read, DecisionEvent)
    assert decode_record(read.record) == Record(**fields)  # type: ignore[arg-type]


@pytest.mark.parametrize("shape", [(1, 1), (3, 2), (2, 8, 8), (2, 40_000)])
@pytest.mark.parametrize("dtype", ["<f4", "<f8", "|b1"])
def test_rows_of_an_array_stand_in_an_event_as_their_bytes(shape: tuple[int, ...], dtype: str) -> None:
    array = np.arange(np.prod(shape)).reshape(shape).astype(dtype)
    record = record_of(shared({}), {})
    columns: list[tuple[object, ...]] = [
        ("i", "", -1, 9, 1, "0", state, mask, record, "", 0, "D")
        for state, mask in zip(raws(array), raws(array[::-1]), strict=True)
    ]
    expected = [
        DecisionEvent("i", "", -1, 9, 1, "0", one.tobytes(), other.tobytes(), b"\xde\0\0")
        for one, other in zip(array, array[::-1], strict=True)
    ]
    assert decode_events(encode_columns(columns)) == expected
    assert encode_columns(columns) == encode_events(list(expected))


NAN = version(METRICS, "v1", logarithm(), golden_states=[[1.0, 1.0]], golden_outputs=[[0.0, 0.0]])
RAISES = version(METRICS, "v1", indexer(), golden_outputs=[[1.0, 0.0], [0.0, 1.0]])


def described(loaded: object, row: Row) -> tuple[ActResponse, dict[str, object]]:
    async def work() -> tuple[ActResponse, dict[str, object]]:
        with decider(plan({"v1": loaded})) as (pipeline, ledger, _):  # type: ignore[dict-item]
            (answer,) = await pipeline.decide([row])
            (event,) = recorded(ledger)
            assert isinstance(answer, ActResponse)
            stored = SimpleNamespace(
                **{name: getattr(event, name) for name in event.__struct_fields__}, producer="p", epoch=1, seq=1
            )
            return answer, describe(stored, decode_record(event.record))

    return asyncio.run(work())


def test_a_recorded_decision_reads_as_it_was_answered() -> None:
    row = Row([5.0, 1.0], key="k", episode="e", step=3, context={"hour": 10}, explore=False, include=("values",))
    answer, shown = described(NAN, row)
    same = ("decision_id", "policy", "version", "assigned_version", "role", "generation", "action", "propensity")
    assert {name: shown[name] for name in same} == {name: getattr(answer, name) for name in same}
    assert (shown["key"], shown["episode"], shown["step"], shown["context"]) == ("k", "e", 3, {"hour": 10})
    assert shown["state"] == [5.0, 1.0]
    why = shown["why"]
    assert isinstance(why, dict)
    assert why["outputs"] == answer.values
    assert (why["target"], why["behaviour"], why["mask"]) == ([1.0, 0.0], [1.0, 0.0], [True, True])


@pytest.mark.parametrize(("loaded", "state"), [(NAN, [-1.0, 1.0]), (RAISES, [9.0, 0.0])])
def test_what_is_not_a_number_is_shown_as_null(loaded: object, state: list[float]) -> None:
    answer, shown = described(loaded, Row(list(state), include=("values",)))
    assert answer.values is None
    assert (shown["step"], shown["episode"]) == (None, None)
    why = shown["why"]
    assert isinstance(why, dict)
    assert why["outputs"] == ([None, 0.0] if loaded is NAN else [])
    assert why["behaviour"] == [1.0, 0.0]


def test_pins_forget_the_least_recently_used_episode_first() -> None:
    pins = Pins(capacity=2)
    one, two = Assignment("v1", "champion", 1.0), Assignment("v2", "challenger", 0.5)
    pins.put("a", one)
    pins.put("b", two)
    assert pins.get("a") == one
    pins.put("a", two)
    pins.put("c", one)
    assert (pins.get("a"), pins.get("b"), pins.get("c"), len(pins)) == (two, None, one, 2)


def test_pins_know_which_version_decided_the_step_before() -> None:
    pins = Pins(capacity=2)
    pins.put("a", Assignment("v1", "champion", 1.0))
    assert [pins.decided("a", version) for version in ("v1", "v1", "v0", "v1")] == [False, False, True, True]
    assert pins.decided("unknown", "v1") is False


def test_states_are_recorded_little_endian_in_the_specs_dtype() -> None:
    async def work() -> None:
        with decider(plan({"v1": NAN})) as (pipeline, ledger, _):
            await pipeline.decide([Row([1.5, 2.5])])
            (event,) = recorded(ledger)
            record = decode_record(event.record)
            state = np.frombuffer(event.state, record.dtype).reshape(record.shape)
            assert (record.dtype, state.tolist()) == ("<f4", [1.5, 2.5])

    asyncio.run(work())


def test_a_trace_stands_in_the_record() -> None:
    async def work() -> str | None:
        with decider(plan({"v1": NAN})) as (pipeline, ledger, _):
            await pipeline.decide([Row([1.0, 1.0], traceparent="00-ab-cd-01")])
            (event,) = recorded(ledger)
            return decode_record(event.record).traceparent

    assert asyncio.run(work()) == "00-ab-cd-01"


def test_what_records_have_in_common_is_kept_within_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settled_rows, "MOST_KINDS", 1)

    async def work() -> None:
        both = {label: version(METRICS, label, linear([[1, 0], [0, 1]])) for label in ("v1", "v2")}
        with decider(plan(both, challenger="v2", weight=0.5)) as (pipeline, ledger, _):
            await pipeline.decide([Row([1.0, 0.0]) for _ in range(64)])
            assert len(pipeline.plan.records) == 1
            records = [decode_record(event.record) for event in recorded(ledger)]
            kinds = {(each.version, each.role, each.weight) for each in records}
            assert kinds == {("v1", "champion", 0.5), ("v2", "challenger", 0.5)}

    asyncio.run(work())
