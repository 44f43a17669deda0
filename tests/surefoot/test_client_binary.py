"""Images and batches as raw numbers, over a real socket, by both clients: the service sees what JSON would say."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator
from typing import Any

import httpx
import msgspec
import numpy as np
import pytest

from surefoot import Client, NotFinite, transitions
from surefoot import _protocol as protocol
from tests.conftest import Server, new_server
from tests.policies.networks import flattened_files
from tests.surefoot.callers import KINDS

SHAPE = (84, 84, 4)
RAW = "application/octet-stream"
IMAGE = np.random.default_rng(5).integers(0, 256, SHAPE).astype(np.uint8)
OFF: dict[str, Any] = {"policy": "frames", "explore": False}


@pytest.fixture(scope="module")
def frames(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("frames")
    for policy, shape, actions in (("frames", SHAPE, 4), ("pairs", (2,), 2)):
        version = folder / "policies" / policy / "v1"
        version.mkdir(parents=True)
        for name, content in flattened_files(shape, actions, policy=policy).items():
            (version / name).write_bytes(content)
        deployed = f"schema: 1\npolicy: {policy}\nchampion: v1\nbaseline: v1\n"
        (version.parent / "deployment.yaml").write_text(deployed)
    server = new_server(folder / "server", policies=str(folder / "policies"))
    server.start()
    yield server
    server.stop()


@pytest.fixture
def http(frames: Server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=frames.url, timeout=10.0) as client:
        yield client


@pytest.mark.parametrize("kind", KINDS)
def test_an_image_is_decided_and_recorded_as_in_json(frames: Server, kind: str) -> None:
    with KINDS[kind](frames.url) as plain, KINDS[kind](frames.url, wire="json") as slow:
        for state in (IMAGE, IMAGE.astype(np.float32) / 3, np.flip(IMAGE, 0), IMAGE.astype(">f8")):
            ours = plain.act(state, **OFF, include=["values"])
            theirs = slow.act(state, **OFF, include=["values"])
            assert (ours.action, ours.values) == (theirs.action, theirs.values)
            record, expected = plain.decision(ours.decision_id), slow.decision(theirs.decision_id)
            assert record["state"] == expected["state"]
            np.testing.assert_array_equal(np.float32(record["state"]), state.astype(np.float32))


def test_an_image_arrives_at_a_trainer_as_it_was_sent(frames: Server) -> None:
    with Client(frames.url) as client:
        decision = client.act(IMAGE, **OFF)
        client.reward(decision.decision_id, 1.0)
    group = f"g-{uuid.uuid4().hex[:8]}"
    for batch in transitions("frames", group, "c", redis_url=frames.redis_url, block_s=0.05, max_wait_s=20.0):
        if decision.decision_id in batch.ids:
            (row,) = np.flatnonzero(batch.ids == decision.decision_id)
            np.testing.assert_array_equal(batch.states[row], IMAGE.astype(np.float32))
            return
    raise AssertionError("the transition did not come")


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_goes_raw_too(frames: Server, kind: str) -> None:
    states = np.random.default_rng(2).normal(size=(300, 2)).astype(np.float32)
    columns = {"keys": [f"k{row}" for row in range(300)], "policy": "pairs", "explore": False}
    with KINDS[kind](frames.url) as plain, KINDS[kind](frames.url, wire="json") as slow:
        for sent in (states, list(states)):
            ours, theirs = plain.act_batch(sent, **columns), slow.act_batch(sent, **columns)
            np.testing.assert_array_equal(ours.actions, theirs.actions)
        assert plain.decision(ours.decision_ids[7])["key"] == "k7"


@pytest.mark.parametrize("kind", KINDS)
def test_a_key_is_good_for_one_body(frames: Server, kind: str) -> None:
    key = uuid.uuid4().hex
    with KINDS[kind](frames.url) as client:
        first = client.act(IMAGE, **OFF, idempotency_key=key)
        assert client.act(IMAGE, **OFF, idempotency_key=key).decision_id == first.decision_id
        with pytest.raises(Exception, match="another body"):
            client.act(np.flip(IMAGE, 1), **OFF, idempotency_key=key)


def test_a_repeat_in_msgpack_gets_the_stored_answer_in_msgpack(http: httpx.Client) -> None:
    body = msgspec.msgpack.encode({"policy": "frames", "state": IMAGE.astype("<f4").tobytes()})
    headers = {"Content-Type": "application/msgpack", "Idempotency-Key": uuid.uuid4().hex}
    first = http.post("/act", content=body, headers=headers)
    again = http.post("/act", content=body, headers=headers | {"Accept": "application/msgpack"})
    assert (again.status_code, again.headers["content-type"]) == (200, "application/msgpack")
    assert msgspec.msgpack.decode(again.content) == json.loads(first.content)


def test_forms_that_do_not_fit_are_refused_by_name(http: httpx.Client) -> None:
    headers = {"Content-Type": RAW, "Surefoot-Dtype": "|u1", "Surefoot-Shape": "84,84,4"}
    answer = http.post("/v1/act", content=IMAGE.tobytes(), headers=headers)
    assert (answer.status_code, answer.json()["errors"][0]["field"]) == (422, "policy")
    front = b'{"policy":"frames"}'
    headers["Inference-Header-Content-Length"] = str(len(front))
    assert http.post("/v1/act", content=front + IMAGE.tobytes(), headers=headers).status_code == 200
    short = http.post("/v1/act", content=front + IMAGE.tobytes()[:-1], headers=headers)
    assert (short.status_code, short.json()["errors"][0]["field"]) == (422, "state")
    many = {**headers, "Surefoot-Shape": "40,84,84,4"}
    large = http.post("/v1/act/batch", content=front + IMAGE.tobytes() * 40, headers=many)
    assert (large.status_code, large.json()["code"]) == (413, "body_too_large")


def sent(call: protocol.Call[Any]) -> tuple[dict[str, Any], np.ndarray[Any, Any] | None]:
    """The fields of a call and its array; None: it goes as JSON."""
    if not call.headers:
        return json.loads(call.body), None
    assert call.headers["Content-Type"] == RAW
    length = int(call.headers["Inference-Header-Content-Length"])
    shape = tuple(map(int, call.headers["Surefoot-Shape"].split(",")))
    array = np.frombuffer(call.body[length:], call.headers["Surefoot-Dtype"]).reshape(shape)
    return json.loads(call.body[:length]), array


LARGE = np.arange(300)


@pytest.mark.parametrize(
    ("state", "dtype"),
    [
        (LARGE.astype(np.float32), "<f4"),
        (LARGE.astype(np.float16), "<f4"),
        (LARGE.astype(">f8"), "<f8"),
        (LARGE.astype(np.uint8), "|u1"),
        (LARGE.astype(np.int16), "<f4"),
        (LARGE.astype(np.int64), "<f8"),
        (LARGE.astype(np.float64).reshape(3, 100)[:, ::2], None),
        (LARGE.astype(np.float64).reshape(3, 100).T, "<f8"),
        (LARGE.astype(np.float32)[:256], None),
        (LARGE.astype(object), None),
        (LARGE > 0, None),
        (LARGE.tolist(), None),
        (list(LARGE.astype(np.float32).reshape(3, 100)), "<f4"),
        ([np.zeros(200), np.zeros(201)], None),
    ],
)
def test_large_arrays_go_raw_by_themselves(state: Any, dtype: str | None) -> None:
    fields, array = sent(protocol.act(state, policy="p"))
    if dtype is None:
        assert (array, list(fields)) == (None, ["state", "policy"])
        return
    assert fields == {"policy": "p"}
    assert array is not None
    assert array.dtype.str == dtype
    np.testing.assert_array_equal(array, np.asarray(state).astype(dtype))


def test_what_is_told_is_done() -> None:
    assert sent(protocol.act(LARGE.astype(np.float32), "json"))[1] is None
    for state in ([1, 2.5], np.array([1, 2.5])):
        np.testing.assert_array_equal(sent(protocol.act(state, "binary"))[1], [1, 2.5])
    assert sent(protocol.act({"cpu": 1.0}, "binary"))[0] == {"state": {"cpu": 1.0}}
    np.testing.assert_array_equal(sent(protocol.act_batch([[1], [2]], "binary"))[1], [[1], [2]])
    with pytest.raises(ValueError, match="wire"):
        Client(wire="fast")  # type: ignore[arg-type]


def test_nothing_that_is_not_finite_is_sent() -> None:
    state = np.zeros((2, 300))
    state[1, 7] = np.inf
    with pytest.raises(NotFinite) as caught:
        protocol.act_batch(state)
    assert caught.value.errors[0].field == "states[1][7]"
