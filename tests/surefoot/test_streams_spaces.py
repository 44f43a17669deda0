"""What a trainer gets of choices in several factors, and of points, from a real Valkey."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
import redis

from surefoot import Unreadable, streams
from tests.surefoot.stream_entries import MULTI, POINT, add, changed, fields
from tests.surefoot.test_streams import pending, reader
from tests.surefoot.valkey import Valkey

INF = math.inf
OPEN_END: dict[str, Any] = {"x": "lost", "b": 0, "n": b"", "nm": b"", "ni": ""}


def test_choices_in_factors_come_side_by_side(valkey: Valkey, store: redis.Redis, policy: str) -> None:
    add(store, policy, [0], **MULTI)
    add(store, policy, [1], **changed(MULTI, a="0,1", **OPEN_END))
    with reader(valkey, policy) as stream:
        batch = next(stream)
    assert (batch.action_kind, batch.nvec) == ("multi_discrete", (3, 2))
    assert batch.actions.dtype == np.int64
    np.testing.assert_array_equal(batch.actions, [[2, 0], [0, 1]])
    np.testing.assert_array_equal(batch.proposed, [[1, 0], [1, 0]])
    np.testing.assert_array_equal(batch.masks, [[True, False, True, True, True]] * 2)
    np.testing.assert_array_equal(batch.next_masks, [[True, True, True, False, True], [True] * 5])
    np.testing.assert_array_equal(batch.behaviour, [[0.01, 0.0, 0.99, 0.99, 0.01]] * 2)
    np.testing.assert_array_equal(batch.target, [[0.0, 1.0, 0.0, 1.0, 0.0]] * 2)
    np.testing.assert_array_equal(batch.log_propensities, [math.log(0.9802)] * 2)
    assert batch.propensity_kinds.tolist() == ["mass", "mass"]
    assert (batch.boxes.shape, batch.raw_actions.shape, batch.at_bound.shape) == ((2, 2, 0), (2, 0), (2, 0))


def test_points_come_with_their_box_and_their_draw(valkey: Valkey, store: redis.Redis, policy: str) -> None:
    add(store, policy, [0], **POINT)
    plain = {"sigma": b"", "propensity_kind": "mass", "propensity": 0.5, "log_propensity": math.log(0.5)}
    add(store, policy, [1], **changed(POINT, **OPEN_END, record={**plain, "raw_log_prob": None, "state_reset": True}))
    with reader(valkey, policy) as stream:
        batch = next(stream)
    assert (batch.action_kind, batch.nvec) == ("continuous", ())
    assert batch.actions.dtype == np.float64
    np.testing.assert_array_equal(batch.actions, [[0.5, -0.25]] * 2)
    np.testing.assert_array_equal(batch.proposed, [[0.5, -2.0]] * 2)
    np.testing.assert_array_equal(batch.boxes, [[[-1.0, -0.25], [1.0, INF]]] * 2)
    bounds = [[-1.0, -INF], [1.0, INF]]
    np.testing.assert_array_equal(batch.bounds, [bounds] * 2)
    np.testing.assert_array_equal(batch.next_boxes, [[[-INF, 0.0], [0.5, 1.0]], bounds])
    np.testing.assert_array_equal(batch.propensities, [math.nan, 0.5])
    np.testing.assert_array_equal(batch.log_propensities, [-1.75, math.log(0.5)])
    assert batch.propensity_kinds.tolist() == ["mixed", "mass"]
    np.testing.assert_array_equal(batch.raw_actions, [[0.5, -3.0]] * 2)
    np.testing.assert_array_equal(batch.raw_log_probs, [-2.5, math.nan])
    np.testing.assert_array_equal(batch.sigmas, [[0.1, 0.2], [0.0, 0.0]])
    np.testing.assert_array_equal(batch.at_bound, [[0, -1]] * 2)
    np.testing.assert_array_equal(batch.target, [[0.25, -1.0, 0.5, 2.0]] * 2)
    assert batch.transforms.tolist() == ["none", "none"]
    assert batch.state_resets.tolist() == [False, True]
    assert (batch.masks.shape, batch.next_masks.shape, batch.behaviour.shape) == ((2, 0), (2, 0), (2, 0))
    assert batch.actions.flags.writeable
    assert batch.boxes.flags.writeable


def test_an_index_has_a_log_and_nothing_of_a_point(valkey: Valkey, store: redis.Redis, policy: str) -> None:
    add(store, policy, [0])
    add(store, policy, [1], record={"propensity": None})
    with reader(valkey, policy) as stream:
        batch = next(stream)
    assert (batch.action_kind, batch.nvec) == ("discrete", (2,))
    np.testing.assert_array_equal(batch.log_propensities, [math.log(0.99), math.nan])
    assert batch.propensity_kinds.tolist() == ["mass", "mass"]
    assert (batch.boxes.shape, batch.next_boxes.shape, batch.sigmas.shape) == ((2, 2, 0), (2, 2, 0), (2, 0))
    assert np.isnan(batch.raw_log_probs).all()
    assert not batch.state_resets.any()


def test_batches_never_mix_action_spaces(valkey: Valkey, store: redis.Redis, policy: str) -> None:
    other = np.array([0.5, 0.5, 1.0, 0.0, 0.0]).tobytes()
    swapped = changed(MULTI, a="1,2", record={"nvec": (2, 3), "target": other, "behaviour": other})
    five = {"m": bytes(4) + b"\1", "a": "4", "nm": b"", "record": {"target": other, "behaviour": other}}
    # One coordinate has a box of 16 bytes, as 16 choices have a mask.
    sixteen = {"m": b"\1" * 16, "record": {"target": bytes(128), "behaviour": bytes(128)}}
    line = np.array([0.0, 1.0]).tobytes()
    single = {"proposed": [0.5], "target": line, "sigma": b"", "raw_action": line[:8], "at_bound": (0,), "bounds": b""}
    kinds = [{}, MULTI, swapped, POINT, five, sixteen, changed(POINT, a="0.5", m=line, nm=line, record=single)]
    for n in range(14):
        add(store, policy, [n], **kinds[n % 7])
    with reader(valkey, policy) as stream:
        batches = list(stream)
    assert [batch.steps.tolist() for batch in batches] == [[n, n + 7] for n in range(7)]
    assert [batch.nvec for batch in batches] == [(2,), (3, 2), (2, 3), (), (5,), (16,), ()]
    np.testing.assert_array_equal(batches[6].boxes[0], [[0.0], [1.0]])
    np.testing.assert_array_equal(batches[6].bounds[0], [[-INF], [INF]])
    assert pending(store, policy) == 0


def test_a_next_mask_of_another_space_is_not_known(valkey: Valkey, store: redis.Redis, policy: str) -> None:
    add(store, policy, [0], **changed(MULTI, nm=b"\0\0"))
    add(store, policy, [1], **changed(POINT, nm=b"\0\0"))
    with reader(valkey, policy) as stream:
        multi, point = stream
    assert multi.next_masks.all()
    np.testing.assert_array_equal(point.next_boxes, point.bounds)


@pytest.mark.parametrize(
    ("entry", "changes"),
    [
        (MULTI, {"a": "2"}),
        (MULTI, {"a": "2,0,0"}),
        (MULTI, {"a": "3,0"}),
        (MULTI, {"a": "2,-1"}),
        (MULTI, {"a": "2.0,0.0"}),
        (MULTI, {"m": b"\1\1\1\1"}),
        (MULTI, {"record": {"nvec": ()}}),
        (MULTI, {"record": {"behaviour": b""}}),
        (MULTI, {"record": {"proposed": 1}}),
        (MULTI, {"record": {"action_kind": "graph"}}),
        (POINT, {"a": "0.5"}),
        (POINT, {"a": "0.5,nan"}),
        (POINT, {"a": "0.5,inf"}),
        (POINT, {"a": ""}),
        (POINT, {"m": bytes(24)}),
        (POINT, {"m": b""}),
        (POINT, {"record": {"target": bytes(16)}}),
        (POINT, {"record": {"behaviour": bytes(16)}}),
        (POINT, {"record": {"raw_action": b""}}),
        (POINT, {"record": {"sigma": bytes(8)}}),
        (POINT, {"record": {"bounds": bytes(16)}}),
        (POINT, {"record": {"at_bound": (0,)}}),
        (POINT, {"record": {"proposed": [0.5]}}),
        ({"record": {}}, {"a": "2"}),
        ({"record": {}}, {"a": "0.5"}),
        ({"record": {}}, {"record": {"proposed": [0]}}),
    ],
    ids=lambda value: repr(value)[:40] if "m" not in value else "",
)
def test_what_does_not_fit_its_space_is_named(
    valkey: Valkey, store: redis.Redis, policy: str, entry: dict[str, Any], changes: dict[str, Any]
) -> None:
    (stream_id,) = add(store, policy, [0], **changed(entry, **changes))
    with reader(valkey, policy) as stream, pytest.raises(Unreadable, match=stream_id.decode()):
        next(stream)


def test_tail_gives_factors_apart(valkey: Valkey, store: redis.Redis, policy: str) -> None:
    add(store, policy, [0], **MULTI)
    (row,) = streams.tail(policy, valkey.url)
    assert json.loads(json.dumps(row, allow_nan=False)) == row
    assert (row["action_kind"], row["action"], row["action_name"]) == ("multi_discrete", [2, 0], ["far", "off"])
    assert row["proposed"] == [1, 0]
    assert row["mask"] == [[1, 0, 1], [1, 1]]
    assert row["next_mask"] == [[1, 1, 1], [0, 1]]
    assert row["behaviour"] == [[0.01, 0.0, 0.99], [0.99, 0.01]]
    assert row["target"] == [[0.0, 1.0, 0.0], [1.0, 0.0]]
    assert (row["propensity_kind"], row["log_propensity"]) == ("mass", math.log(0.9802))


def test_tail_gives_points_with_null_where_the_box_is_open(valkey: Valkey, store: redis.Redis, policy: str) -> None:
    add(store, policy, [0], **POINT)
    add(store, policy, [1], **changed(POINT, nm=b"", record={"proposed": [INF, -INF], "sigma": b"", "bounds": b""}))
    first, second = streams.tail(policy, valkey.url)
    assert json.loads(json.dumps([first, second], allow_nan=False)) == [first, second]
    assert (first["action"], first["action_name"], first["proposed"]) == ([0.5, -0.25], None, [0.5, -2.0])
    assert first["box"] == {"low": [-1.0, -0.25], "high": [1.0, None]}
    assert first["next_box"] == {"low": [None, 0.0], "high": [0.5, 1.0]}
    assert first["bounds"] == {"low": [-1.0, None], "high": [1.0, None]}
    assert first["target"] == {"mean": [0.25, -1.0], "std": [0.5, 2.0]}
    assert (first["propensity"], first["propensity_kind"], first["log_propensity"]) == (None, "mixed", -1.75)
    assert (first["raw_action"], first["raw_log_prob"], first["at_bound"]) == ([0.5, -3.0], -2.5, [0, -1])
    assert (first["sigma"], first["transform"], first["state_reset"]) == ([0.1, 0.2], "none", False)
    assert (second["next_box"], second["proposed"], second["sigma"]) == (None, [None, None], None)
    assert second["bounds"] is None


def test_all_kinds_have_the_same_fields() -> None:
    assert set(fields(0, **MULTI)) == set(fields(0, **POINT)) == set(fields(0))
