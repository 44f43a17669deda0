"""One question in JSON, in msgpack or as raw numbers: one decision, one record, one answer, and the same refusals."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Coroutine, Sequence
from datetime import UTC, datetime
from functools import cache
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service import wire
from service.decision import DecisionEvent, decode_events
from service.plan import Plan
from tests.service.asking import (
    MAX_BATCH,
    MAX_BODY_BYTES,
    Answer,
    Request,
    desk,
    in_every_form,
    in_json,
    in_msgpack,
    in_raw,
    planned,
    tensor,
)

SHAPES = [(1,), (4,), (3, 2), (4, 5, 3)]
JSON = "application/json"


@cache
def plan_for(shape: tuple[int, ...], dtype: str, factors: bool) -> Plan:
    return planned(shape, dtype, factors)


def run(work: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(work)


def states_in(recorded: list[bytes], like: Any, dtype: str) -> Any:
    """The states that were recorded, as one array."""
    events = [event for blob in recorded for event in decode_events(blob)]
    states = [event.state for event in events if isinstance(event, DecisionEvent)]
    return np.frombuffer(b"".join(states), dtype).reshape(like.shape)


def asked(in_force: Plan, path: str, requests: Sequence[Request], **more: str) -> tuple[list[Answer], list[bytes]]:
    """Send requests at once to a desk of their own. Gives the answers and what was recorded."""

    async def work() -> tuple[list[Answer], list[bytes]]:
        with desk(in_force) as here:
            headers = {name.replace("_", "-"): value for name, value in more.items()}
            answers = await asyncio.gather(*(here.ask(path, body, {**own, **headers}) for body, own in requests))
            return answers, here.recorded()

    found: tuple[list[Answer], list[bytes]] = run(work())
    return found


@st.composite
def numbers(draw: st.DrawFn, shape: tuple[int, ...], dtype: str) -> Any:
    """An array of float64 whose numbers fit the observation: any, float32's own, or what a byte holds."""
    count = math.prod(shape)
    width = 64 if dtype == "float64" else draw(st.sampled_from([32, 64]))
    any_number = st.floats(-(2.0**100), 2.0**100, width=width, allow_subnormal=True)  # type: ignore[arg-type]
    pixel = st.integers(0, 255).map(float)
    element = draw(st.sampled_from([any_number, pixel]))
    return np.array(draw(st.lists(element, min_size=count, max_size=count))).reshape(shape)


@pytest.mark.parametrize("factors", [False, True], ids=["choice", "factors"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_each_form_gives_the_same_answer_and_the_same_record(shape: tuple[int, ...], dtype: str, factors: bool) -> None:
    in_force = plan_for(shape, dtype, factors)
    fields = {
        "policy": "toy",
        "key": "k",
        "context": {"hour": 10, "load": [0.5, None]},
        "include": ["values", "distribution"],
    }

    @given(state=numbers(shape, dtype))
    @settings(max_examples=12, deadline=None)
    def check(state: Any) -> None:
        forms = in_every_form("state", state, in_force.observation.wire_dtype, fields)
        found = {name: asked(in_force, "/v1/act", [request]) for name, request in forms.items()}
        for name, (answers, recorded) in found.items():
            assert answers[0].status == 200, (name, answers[0].body)
            assert (answers, recorded) == found["json"], name
        kept = states_in(found["json"][1], state, in_force.observation.wire_dtype)
        np.testing.assert_array_equal(kept, state.astype(dtype))

    check()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_so_does_a_batch(shape: tuple[int, ...], dtype: str) -> None:
    in_force = plan_for(shape, dtype, False)

    @given(data=st.data(), rows=st.integers(1, 5))
    @settings(max_examples=12, deadline=None)
    def check(data: st.DataObject, rows: int) -> None:
        states = data.draw(numbers((rows, *shape), dtype))
        fields = {"keys": [f"k{row}" for row in range(rows)], "explore": False}
        forms = in_every_form("states", states, in_force.observation.wire_dtype, fields)
        found = {name: asked(in_force, "/act/batch", [request]) for name, request in forms.items()}
        for name, (answers, recorded) in found.items():
            assert answers[0].status == 200, (name, answers[0].body)
            assert (answers, recorded) == found["json"], name
        kept = states_in(found["json"][1], states, in_force.observation.wire_dtype)
        np.testing.assert_array_equal(kept, states.astype(dtype))

    check()


def test_requests_of_every_form_are_decided_together() -> None:
    in_force = plan_for((4, 5, 3), "float32", False)
    states = np.random.default_rng(1).integers(0, 256, (20, 4, 5, 3)).astype(float)
    mixed, plain = [], []
    for index, state in enumerate(states):
        forms = list(in_every_form("state", state, "<f4", {"key": f"k{index}"}).values())
        mixed.append(forms[index % len(forms)])
        plain.append(forms[0])
    answers, recorded = asked(in_force, "/act", mixed)
    assert len(recorded) == 1, "one batch"
    assert (answers, recorded) == asked(in_force, "/act", plain)


def test_bytes_in_the_wide_dtype_are_read_as_the_numbers_they_are() -> None:
    in_force = plan_for((4,), "float32", False)
    state = np.array([0.1, 1e-45, -0.0, 16_777_217.0])  # none but -0.0 is a float32
    found = [
        asked(in_force, "/act", [each])
        for each in (
            in_json({"state": state.tolist()}),
            in_raw(state, "<f8", {}),
            in_msgpack({"state": tensor(state, "<f8")}),
        )
    ]
    assert found[0][0][0].status == 200
    assert found[0] == found[1] == found[2]


NAN, INF = math.nan, math.inf
# What is refused in both encodings, with the same code and the same fields.
WRONG: list[tuple[Any, str, list[str]]] = [
    ({"state": [1, 2, 3, 4], "colour": 1}, "unknown_field", ["colour"]),
    ({"policy": "toy"}, "missing_field", ["state"]),
    ({"state": [1, 2, 3, 4], "policy": "other"}, "unknown_policy", ["policy"]),
    ({"state": [1, 2, 3, 4], "step": -1}, "invalid_field", ["step"]),
    ({"state": [1, 2, 3, 4], "step": 1.5}, "invalid_field", ["step"]),
    ({"state": [1, 2, 3, 4], "key": ""}, "invalid_field", ["key"]),
    ({"state": [1, 2, 3, 4], "include": ["x"]}, "invalid_field", ["include[0]"]),
    ({"state": [1, 2, 3, 4], "allowed_actions": [9]}, "unknown_action", ["allowed_actions[0]"]),
    ({"state": [1, 2, 3]}, "invalid_field", ["state"]),
    ({"state": [1, 2, 3, "4"]}, "invalid_field", ["state[3]"]),
    ({"state": [1, 2, 3, True]}, "invalid_field", ["state[3]"]),
    ({"state": [1, 2, 3, NAN]}, "not_finite", ["state[3]"]),
    ({"state": [1, -INF, 3, 4]}, "not_finite", ["state[1]"]),
    ({"state": [1, 2, 1e300, 4]}, "not_finite", ["state[2]"]),
    ({"state": {"a": 1}}, "invalid_field", ["state"]),
    ({"state": {"a": "1"}}, "invalid_field", ["state.a"]),
    ({"state": 1}, "invalid_field", ["state"]),
    ({"state": None}, "invalid_field", ["state"]),
    ({"state": [1, 2, 3, 4], "context": {"a": [0, {"b": NAN}], "c": INF}}, "not_finite", ["context.a[1].b"]),
    ({"state": [1, 2, 3, 4], "allowed_actions": {"low": [INF]}}, "not_finite", ["allowed_actions.low[0]"]),
    ({"state": [1, 2, 3, 4], "previous_action": [NAN]}, "not_finite", ["previous_action[0]"]),
    ([], "invalid_field", []),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "code", "named"), WRONG)
def test_msgpack_is_refused_as_json_is(fields: Any, code: str, named: list[str]) -> None:
    in_force = plan_for((4,), "float32", False)
    for request in (in_json(fields), in_msgpack(fields)):
        (answer,), recorded = asked(in_force, "/act", [request])
        assert answer.problem == (code, named)
        assert (answer.media, recorded) == ("application/problem+json", [])


ONE, FOUR = np.ones((1, 4)), np.ones(4)
PACKED_WRONG: list[tuple[str, Any, str, list[str]]] = [
    ("/act", {"state": b""}, "invalid_field", ["state"]),
    ("/act", {"state": bytes(15)}, "invalid_field", ["state"]),
    ("/act", {"state": bytes(32)}, "invalid_field", ["state"]),
    ("/act", {"state": np.array([1, NAN, 0, 0], "<f4").tobytes()}, "not_finite", ["state[1]"]),
    ("/act", {"state": tensor(np.array([1, 1e300, 0, 0]), "<f8")}, "not_finite", ["state[1]"]),
    ("/act", {"state": tensor(FOUR, ">f4")}, "invalid_field", ["state.dtype"]),
    ("/act", {"state": tensor(FOUR, "<i4")}, "invalid_field", ["state.dtype"]),
    ("/act", {"state": tensor(FOUR, "<f4") | {"shape": [2, 2]}}, "invalid_field", ["state.shape"]),
    ("/act", {"state": tensor(FOUR, "<f4") | {"shape": [-4]}}, "invalid_field", ["state.shape[0]"]),
    ("/act", {"state": tensor(FOUR, "<f4") | {"shape": [2**31] * 50_000}}, "invalid_field", ["state.shape"]),
    ("/act", {"state": tensor(FOUR, "<f4") | {"data": bytes(15)}}, "invalid_field", ["state"]),
    ("/act", {"state": tensor(FOUR, "<f4") | {"order": "C"}}, "unknown_field", ["state.order"]),
    ("/act", {"state": {"data": bytes(16), "shape": [4]}}, "missing_field", ["state.dtype"]),
    ("/act", {"state": {"data": 1.0}}, "invalid_field", ["state"]),
    ("/act", {"state": msgspec.msgpack.Ext(1, bytes(16))}, "invalid_field", ["state"]),
    ("/act", {"state": [1, 2, 3, 4], "context": {"a": b"x"}}, "invalid_field", ["context.a"]),
    ("/act", {"state": [1, 2, 3, 4], "context": {"a": {1: 2}}}, "invalid_field", ["context.a"]),
    ("/act", {"state": [1, 2, 3, 4], "context": {"a": datetime.now(UTC)}}, "invalid_field", ["context.a"]),
    ("/act", {"state": [1, 2, 3, 4], "key": b"k"}, "invalid_field", ["key"]),
    ("/act/batch", {"states": b""}, "invalid_field", ["states"]),
    ("/act/batch", {"states": bytes(24)}, "invalid_field", ["states"]),
    ("/act/batch", {"states": bytes(16 * (MAX_BATCH + 1))}, "invalid_field", ["states"]),
    ("/act/batch", {"states": []}, "invalid_field", ["states"]),
    ("/act/batch", {"states": 1}, "invalid_field", ["states"]),
    ("/act/batch", {"states": {"a": 1}}, "invalid_field", ["states"]),
    ("/act/batch", {"states": tensor(FOUR, "<f4")}, "invalid_field", ["states.shape"]),
    ("/act/batch", {"states": tensor(ONE, "<f4") | {"shape": [10**9, 4]}}, "invalid_field", ["states"]),
    ("/act/batch", {"states": tensor(ONE, "<f4") | {"shape": [2, 4]}}, "invalid_field", ["states"]),
    ("/act/batch", {"states": tensor(np.full((2, 4), INF), "<f4")}, "not_finite", ["states[0][0]"]),
    ("/act/batch", {"states": [bytes(16), bytes(15)]}, "invalid_field", ["states[1]"]),
    ("/act/batch", {"states": [bytes(16), tensor(FOUR, "<i8")]}, "invalid_field", ["states[1].dtype"]),
    ("/act/batch", {"states": bytes(32), "keys": ["a"]}, "invalid_field", ["keys"]),
    ("/act/batch", {"states": bytes(16), "contexts": [{"a": NAN}]}, "not_finite", ["contexts[0].a"]),
]


@pytest.mark.parametrize(("path", "fields", "code", "named"), PACKED_WRONG)
def test_what_only_msgpack_can_say_wrong(path: str, fields: Any, code: str, named: list[str]) -> None:
    (answer,), recorded = asked(plan_for((4,), "float32", False), path, [in_msgpack(fields)])
    assert (answer.problem, recorded) == ((code, named), [])


@pytest.mark.parametrize(
    ("body", "code", "named"),
    [
        (b"", "bad_msgpack", []),
        (b"\xc1", "bad_msgpack", []),
        (b"\x81\xa5state", "bad_msgpack", []),
        (in_msgpack({"state": [1]})[0] + b"\x01", "bad_msgpack", []),
        (b"\xdd\xff\xff\xff\xff", "invalid_field", []),
        (b"\x81\xafallowed_actions\xdd\x0f\xff\xff\xff", "bad_msgpack", []),
        (b"\x81\xa5state" + b"\x91" * 100_000, "bad_msgpack", []),
        (b"\x81\xa3key\xa1\xff", "bad_msgpack", []),
        (b"\x81\xa5state\x81\xa1\xff\x01", "bad_msgpack", ["state"]),
        (b"\x81\xa5state\x81\xa1\xff\xc4\x00", "bad_msgpack", ["state"]),
        (b"\x81\x01\x02", "invalid_field", []),
        (in_json({"state": [1, 2, 3, 4]})[0], "invalid_field", []),
    ],
)
def test_what_is_no_question_in_msgpack_is_refused(body: bytes, code: str, named: list[str]) -> None:
    (answer,), _ = asked(plan_for((4,), "float32", False), "/act", [(body, {"Content-Type": "application/msgpack"})])
    assert answer.problem == (code, named)


def test_text_that_is_not_utf_8_in_a_state_of_json_is_no_accident() -> None:
    body = b'{"state": {"\xff": 1}}'
    (answer,), _ = asked(plan_for((4,), "float32", False), "/act", [(body, {"Content-Type": JSON})])
    assert (answer.status, answer.problem) == (400, ("bad_json", ["state"]))


def raw(
    path: str = "/act", body: bytes | None = None, fields: Any = None, **headers: str | None
) -> tuple[str, Request]:
    """A right raw request, but for what is given; headers None are left out."""
    array = FOUR if path == "/act" else np.ones((2, 4))
    right, own = in_raw(array, "<f4", fields or {})
    own |= {name.replace("_", "-"): value for name, value in headers.items() if value is not None}
    sent = {name: value for name, value in own.items() if headers.get(name.replace("-", "_"), "") is not None}
    return path, (right if body is None else body, sent)


LENGTH = "Inference-Header-Content-Length"
RAW_WRONG: list[tuple[tuple[str, Request], str, list[str]]] = [
    (raw(Surefoot_Dtype=None), "missing_field", ["Surefoot-Dtype"]),
    (raw(Surefoot_Shape=None), "missing_field", ["Surefoot-Shape"]),
    (raw(Surefoot_Dtype=">f4"), "invalid_field", ["Surefoot-Dtype"]),
    (raw(Surefoot_Dtype="float32"), "invalid_field", ["Surefoot-Dtype"]),
    (raw(Surefoot_Dtype="<f8"), "invalid_field", ["state"]),
    (raw(Surefoot_Shape="4,"), "invalid_field", ["Surefoot-Shape"]),
    (raw(Surefoot_Shape="[4]"), "invalid_field", ["Surefoot-Shape"]),
    (raw(Surefoot_Shape="-4"), "invalid_field", ["Surefoot-Shape"]),
    (raw(Surefoot_Shape=""), "invalid_field", ["Surefoot-Shape"]),
    (raw(Surefoot_Shape="2,2"), "invalid_field", ["Surefoot-Shape"]),
    (raw(Surefoot_Shape="9" * 5_000), "invalid_field", ["Surefoot-Shape"]),
    (raw(Inference_Header_Content_Length="17"), "invalid_field", [LENGTH]),
    (raw(Inference_Header_Content_Length="-1"), "invalid_field", [LENGTH]),
    (raw(Inference_Header_Content_Length="9" * 5_000), "invalid_field", [LENGTH]),
    (raw(Inference_Header_Content_Length="16"), "bad_json", []),
    (raw(body=b""), "invalid_field", ["state"]),
    (raw(body=bytes(17)), "invalid_field", ["state"]),
    (raw(body=np.array([0, 0, NAN, 0], "<f4").tobytes()), "not_finite", ["state[2]"]),
    (raw(body=np.array([0, 0, 0, -1e300], "<f8").tobytes(), Surefoot_Dtype="<f8"), "not_finite", ["state[3]"]),
    (raw(fields={"state": [1, 2, 3, 4]}), "unknown_field", ["state"]),
    (raw(fields={"colour": 1}), "unknown_field", ["colour"]),
    (raw(fields={"policy": "other"}), "unknown_policy", ["policy"]),
    (raw(fields={"context": {"a": NAN}}), "not_finite", ["context.a"]),
    (raw("/act/batch", Surefoot_Shape="4"), "invalid_field", ["Surefoot-Shape"]),
    (raw("/act/batch", Surefoot_Shape="0,4"), "invalid_field", ["states"]),
    (raw("/act/batch", Surefoot_Shape="1,4"), "invalid_field", ["states"]),
    (raw("/act/batch", Surefoot_Shape="999999999,4"), "invalid_field", ["states"]),
    (raw("/act/batch", fields={"keys": ["a"]}), "invalid_field", ["keys"]),
    (raw("/act/batch", fields={"steps": ["a", "b"]}), "invalid_field", ["steps[0]"]),
    (raw("/act/batch", body=np.array([[0, 0, 0, 0], [0, NAN, 0, 0]], "<f4").tobytes()), "not_finite", ["states[1][1]"]),
]  # fmt: skip


@pytest.mark.parametrize(("sent", "code", "named"), RAW_WRONG)
def test_raw_numbers_are_refused_by_field_or_header(sent: tuple[str, Request], code: str, named: list[str]) -> None:
    path, request = sent
    (answer,), recorded = asked(plan_for((4,), "float32", False), path, [request])
    assert (answer.problem, recorded) == ((code, named), [])


@pytest.mark.parametrize("length", [None, "0"])
def test_raw_numbers_need_no_json_in_front(length: str | None) -> None:
    path, request = raw(Inference_Header_Content_Length=length)
    (answer,), _ = asked(plan_for((4,), "float32", False), path, [request])
    assert answer.status == 200


@pytest.mark.parametrize("media", ["application/msgpack", "application/octet-stream"])
def test_the_cap_on_bodies_holds_for_every_form(media: str) -> None:
    request = bytes(MAX_BODY_BYTES + 1), {"Content-Type": media}
    (answer,), _ = asked(plan_for((4,), "float32", False), "/act", [request])
    assert (answer.status, answer.problem) == (413, ("body_too_large", []))


@pytest.mark.parametrize(
    "media", ["", "text/plain", "application/x-www-form-urlencoded", "application/json; charset=utf-8"]
)
def test_what_is_announced_as_nothing_else_is_json(media: str) -> None:
    (answer,), _ = asked(
        plan_for((4,), "float32", False), "/act", [(in_json({"state": [1, 2, 3, 4]})[0], {"Content-Type": media})]
    )
    assert answer.status == 200


def test_so_is_what_is_not_announced_at_all() -> None:
    (answer,), _ = asked(plan_for((4,), "float32", False), "/act", [(in_json({"state": [1, 2, 3, 4]})[0], {})])
    assert answer.status == 200


@pytest.mark.parametrize("media", ["application/vnd.msgpack", "application/x-msgpack", "Application/MsgPack; a=b"])
def test_msgpack_goes_by_several_names(media: str) -> None:
    body, _ = in_msgpack({"state": bytes(16)})
    (answer,), _ = asked(plan_for((4,), "float32", False), "/act", [(body, {"Content-Type": media})])
    assert answer.status == 200


@pytest.mark.parametrize(
    ("accept", "packed"),
    [
        ("application/msgpack", True),
        ("application/json;q=0.5, application/vnd.msgpack", True),
        ("application/msgpack;q=0.5, application/json", False),
        ("application/msgpack;q=0", False),
        ("application/msgpack;v=1;q=0.9", True),
        ("application/msgpack;q=x", False),
        ("*/*", False),
        ("text/html", False),
    ],
)
@pytest.mark.parametrize("path", ["/act", "/v1/act/batch"])
def test_the_answer_is_in_msgpack_for_those_who_want_it(path: str, accept: str, packed: bool) -> None:
    in_force = plan_for((4,), "float32", False)
    request = in_raw(FOUR if path == "/act" else ONE, "<f4", {})
    (expected,), _ = asked(in_force, path, [request])
    (answer,), _ = asked(in_force, path, [request], Accept=accept)
    assert answer.media == ("application/msgpack" if packed else JSON)
    assert (msgspec.msgpack if packed else msgspec.json).decode(answer.body) == json.loads(expected.body)


def test_a_refusal_is_problem_json_for_everyone() -> None:
    (answer,), _ = asked(plan_for((4,), "float32", False), "/act", [in_msgpack({})], Accept="application/msgpack")
    assert (answer.media, answer.problem) == ("application/problem+json", ("missing_field", ["state"]))


anything = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 2**64 - 1) | st.floats() | st.text(max_size=8) | st.binary(max_size=40),
    lambda inner: st.lists(inner, max_size=5)
    | st.dictionaries(st.text(max_size=8) | st.integers(0, 9), inner, max_size=4)
    | st.fixed_dictionaries({"dtype": inner | st.just("<f4"), "shape": inner | st.just([4]), "data": inner}),
    max_leaves=12,
)  # fmt: skip
RIGHT = {"state": bytes(16), "states": bytes(32), "policy": "toy"}


@st.composite
def odd_requests(draw: st.DrawFn) -> tuple[str, Request]:
    """A question with some of the right fields, bent, cut or flipped; or with any headers around any bytes."""
    path = draw(st.sampled_from(["/act", "/v1/act/batch"]))
    kind = wire.ActRequest if path == "/act" else wire.ActBatchRequest
    fields = {name: RIGHT[name] for name in kind.__struct_fields__ if name in RIGHT}
    fields |= draw(st.dictionaries(st.sampled_from(kind.__struct_fields__), anything, max_size=3))
    body, headers = in_msgpack(fields)
    if draw(st.booleans()):
        front = {name: value for name, value in fields.items() if name not in ("state", "states")}
        try:
            body, headers = in_raw(FOUR if path == "/act" else ONE, "<f4", front)
        except TypeError:  # not for JSON
            body, headers = in_raw(ONE, "|u1", {})
        names = st.sampled_from(["Surefoot-Dtype", "Surefoot-Shape", LENGTH])
        text = st.text(st.characters(min_codepoint=33, max_codepoint=126), max_size=12)
        some = st.sampled_from(["<f4", "<f8", "|u1", "4", "2,4", "0", "1,2,3", "16", "2"])
        headers |= draw(st.dictionaries(names, text | some, max_size=2))
    flipped = bytearray(body)
    for at in draw(st.lists(st.integers(0, max(len(body) - 1, 0)), max_size=3)):
        flipped[at : at + 1] = draw(st.binary(min_size=1, max_size=1))
    cut = draw(st.integers(0, len(body)))
    return path, (draw(st.sampled_from([body, bytes(flipped), body[:cut], draw(st.binary(max_size=30))])), headers)


@given(sent=odd_requests())
@settings(max_examples=600, deadline=None)
def test_whatever_is_sent_the_answer_is_an_answer_or_a_problem(sent: tuple[str, Request]) -> None:
    path, request = sent
    (answer,), _ = asked(plan_for((4,), "float32", False), path, [request])
    assert answer.status < 500, answer.body
    assert answer.media == (JSON if answer.status == 200 else "application/problem+json")
