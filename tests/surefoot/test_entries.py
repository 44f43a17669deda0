"""Entries as no service writes them, and numbers of every size: read exactly, or refused by name."""

from __future__ import annotations

import json
import math
from typing import Any

import msgspec
import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from service.decision import action_text
from surefoot import Batch, Unreadable
from surefoot.entries import Row
from surefoot.spaces import Space
from tests.surefoot.stream_entries import MULTI, POINT, changed, fields

KINDS: list[dict[str, Any]] = [{"record": {}}, MULTI, POINT]
FINITE = st.floats(allow_nan=False, allow_infinity=False)
NVEC = st.lists(st.integers(1, 5), min_size=1, max_size=4)


def raw_fields(entry: dict[str, Any], n: int = 0) -> dict[bytes, bytes]:
    """An entry as Redis gives it back."""
    return {
        name.encode(): value if isinstance(value, bytes) else str(value).encode()
        for name, value in fields(n, **entry).items()
    }


def batch_of(*entries: dict[str, Any]) -> Batch:
    rows = [Row.read(b"1-%d" % n, raw_fields(entry, n)) for n, entry in enumerate(entries)]
    return Batch.of("p", rows, lambda batch: None)


def point(action: list[float], low: list[float], high: list[float]) -> dict[str, Any]:
    """An entry with a point of any dimension."""
    size, zeros = len(action), np.zeros(len(action))
    record = {
        "proposed": action,
        "target": np.concatenate([zeros, zeros + 1.0]).tobytes(),
        "sigma": b"",
        "raw_action": np.array(action).tobytes(),
        "at_bound": (0,) * size,
        "bounds": b"",
    }
    return changed(POINT, a=action_text(action), m=np.array([low, high]).tobytes(), nm=b"", record=record)


@given(st.data(), st.integers(1, 5))
def test_points_and_boxes_arrive_bit_for_bit(data: st.DataObject, size: int) -> None:
    action = data.draw(st.lists(FINITE, min_size=size, max_size=size))
    ends = st.lists(st.floats(allow_nan=False), min_size=size, max_size=size)
    low, high = data.draw(ends), data.draw(ends)
    batch = batch_of(point(action, low, high))
    assert batch.actions.tobytes() == np.array(action).tobytes()
    assert batch.proposed.tobytes() == np.array(action).tobytes()
    assert batch.raw_actions.tobytes() == np.array(action).tobytes()
    assert batch.boxes.tobytes() == np.array([low, high]).tobytes()


@given(st.data(), NVEC)
def test_choices_of_any_factors_arrive(data: st.DataObject, nvec: list[int]) -> None:
    width = sum(nvec)
    action = [data.draw(st.integers(0, n - 1)) for n in nvec]
    mask = data.draw(st.binary(min_size=width, max_size=width))
    rows = np.arange(width, dtype=np.float64)
    record = {"nvec": tuple(nvec), "proposed": action, "target": rows.tobytes(), "behaviour": rows.tobytes()}
    entry = changed(MULTI, a=action_text(action), m=mask, nm=b"", record=record)
    batch = batch_of(entry, entry)
    assert batch.nvec == tuple(nvec)
    assert batch.actions.tolist() == [action] * 2
    np.testing.assert_array_equal(batch.masks, [[byte != 0 for byte in mask]] * 2)
    plain = Row.read(b"1-0", raw_fields(entry)).plain("p")
    assert [each for factor in plain["target"] for each in factor] == rows.tolist()
    assert [len(factor) for factor in plain["target"]] == nvec


@given(NVEC, st.text("0123456789,.-+einaf _", max_size=12))
def test_an_action_is_in_its_space_or_refused(nvec: list[int], text: str) -> None:
    for space in (Space("discrete", (sum(nvec),)), Space("multi_discrete", tuple(nvec)), Space("continuous", (2,))):
        try:
            action = np.array(space.read(text))
        except ValueError:
            continue
        assert action.shape == space.action_shape
        assert np.isfinite(action).all()
        if not space.continuous:
            assert ((action >= 0) & (action < np.array(space.sizes).reshape(action.shape))).all()


@given(
    st.sampled_from(KINDS),
    st.sampled_from(sorted(raw_fields({}))),
    st.one_of(st.binary(max_size=48), st.from_regex(rb"-?[0-9]{0,25}", fullmatch=True)),
)
def test_a_torn_field_is_refused_or_makes_no_harm(entry: dict[str, Any], name: bytes, value: bytes) -> None:
    refused_or_usable(raw_fields(entry) | {name: value})


@given(
    st.sampled_from(KINDS),
    st.sampled_from(sorted(msgspec.msgpack.decode(raw_fields(POINT)[b"d"]))),
    st.one_of(
        st.none(),
        st.integers(-3, 2**63),
        st.floats(),
        st.binary(max_size=48),
        st.text(max_size=8),
        st.lists(st.integers(-2, 4), max_size=4),
    ),
)
def test_a_strange_record_is_refused_or_makes_no_harm(entry: dict[str, Any], name: str, value: object) -> None:
    raw = raw_fields(entry)
    record = msgspec.msgpack.decode(raw[b"d"]) | {name: value}
    refused_or_usable(raw | {b"d": msgspec.msgpack.encode(record)})


def refused_or_usable(raw: dict[bytes, bytes]) -> None:
    """What is read makes a batch and a line of JSON; all else is Unreadable."""
    try:
        row = Row.read(b"1-0", raw)
    except Unreadable:
        return
    batch = Batch.of("p", [row], lambda batch: None)
    assert len(batch) == 1
    json.dumps(row.plain("p"), allow_nan=False)


def test_an_older_record_is_an_index() -> None:
    """As written before there were other kinds: none of the later fields."""
    raw = raw_fields({})
    record = msgspec.msgpack.decode(raw[b"d"])
    later = {"action_kind", "nvec", "propensity_kind", "log_propensity", "state_reset", "raw_action", "at_bound"}
    assert not later & set(record)
    batch = Batch.of("p", [Row.read(b"1-0", raw)], lambda batch: None)
    assert (batch.action_kind, batch.actions.tolist(), batch.propensity_kinds.tolist()) == ("discrete", [0], ["mass"])
    assert batch.log_propensities.tolist() == [math.log(0.99)]
