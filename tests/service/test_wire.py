"""What callers send wrong is named by field; what they send right is read once."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from policies.deployment import Deployment
from policies.errors import (
    BadJson,
    InvalidField,
    MissingField,
    NoSafeAction,
    NotFinite,
    SafetyError,
    SafetyFault,
    SurefootError,
    Unavailable,
    UnknownField,
)
from policies.types import Feature, ObservationSpec
from service import forms, openapi, overload, wire
from service.problems import problem
from service.states import StateReader

NAMED = StateReader(ObservationSpec((2,), features=(Feature("cpu"), Feature("rps"))))
IMAGE = StateReader(ObservationSpec((2, 2)))


@pytest.mark.parametrize(
    ("body", "error", "field"),
    [
        (b'{"state": [1], "colour": 1}', UnknownField, "colour"),
        (b'{"policy": "a"}', MissingField, "state"),
        (b'{"state": [1], "step": -1}', InvalidField, "step"),
        (b'{"state": [1], "step": 1.5}', InvalidField, "step"),
        (b'{"state": [1], "key": ""}', InvalidField, "key"),
        (b'{"state": [1], "include": ["x"]}', InvalidField, "include[0]"),
        (b'{"state": [1], "allowed_actions": [1.5]}', InvalidField, "allowed_actions[0]"),
        (b"[]", InvalidField, None),
        (b'{"state": [1', BadJson, None),
        (b"", BadJson, None),
        (b"\xff", BadJson, None),
        (b'{"state": [1], "key": "\xff"}', BadJson, None),
        (b'{"state": [1, NaN]}', NotFinite, "state[1]"),
        (b'{"context": {"a": [1]}, "state": [NaN]}', NotFinite, "state[0]"),
        (b'{"state": [1], "key": "\\ud800"}', BadJson, None),
        (b'{"key": "NaN", "state": [1,, 2]}', BadJson, None),
        (b'{"state": {"cpu": -Infinity}}', NotFinite, "state.cpu"),
        (b'{"state": ' + b"[" * 100_000, BadJson, None),
    ],
)
def test_a_wrong_act_is_refused_by_field(body: bytes, error: type[SurefootError], field: str | None) -> None:
    with pytest.raises(error) as caught:
        wire.decode_act(body)
    assert caught.value.field == field


def test_the_other_routes_name_fields_too() -> None:
    with pytest.raises(InvalidField) as reward:
        wire.decode_reward(b'{"decision_id": "a", "reward": "1"}')
    assert reward.value.field == "reward"
    with pytest.raises(InvalidField) as batch:
        wire.decode_reward_batch(b'{"rewards": [{"decision_id": "a", "reward": 1}, {"reward": "1"}]}')
    assert batch.value.field == "rewards[1].reward"
    with pytest.raises(InvalidField) as act:
        wire.decode_act_batch(b'{"states": [[1]], "steps": ["a"]}')
    assert act.value.field == "steps[0]"


@pytest.mark.parametrize(
    ("reader", "state", "field"),
    [
        (NAMED, b"[1, 2, 3]", "state"),
        (NAMED, b'[1, "a"]', "state[1]"),
        (NAMED, b"[1, true]", "state[1]"),
        (NAMED, b"[1, 1e999]", "state[1]"),
        (NAMED, b"3", "state"),
        (NAMED, b'{"cpu": 1}', "state.rps"),
        (NAMED, b'{"cpu": 1, "rps": 2, "ram": 3}', "state.ram"),
        (NAMED, b'{"cpu": 1, "rps": null}', "state.rps"),
        (NAMED, b'{"cpu": 1, "rps": true}', "state.rps"),
        (NAMED, b'{"cpu": 1, "rps": 1e999}', "state.rps"),
        (NAMED, b'{"cpu": "x", "cpu": 1, "rps": 2}', "state[...]"),
        (IMAGE, b"[[1, 2], [3]]", "state"),
        (IMAGE, b"[[1, 2, 3], [4, 5, 6]]", "state"),
        (IMAGE, b"[1, 2]", "state[0]"),
        (IMAGE, b'{"a": 1}', "state"),
    ],
)
def test_a_wrong_state_is_refused_by_element(reader: StateReader, state: bytes, field: str) -> None:
    with pytest.raises(SurefootError) as caught:
        reader.read(msgspec.Raw(state))
    assert caught.value.field == field
    with pytest.raises(SurefootError) as moved:
        reader.read(msgspec.Raw(state), "states[4]")
    assert moved.value.field == "states[4]" + field.removeprefix("state")


def test_a_right_state_is_read_in_the_specs_order() -> None:
    assert NAMED.read(msgspec.Raw(b"[1, 2.5]")) == [1.0, 2.5]
    assert NAMED.read(msgspec.Raw(b'{"rps": 2, "cpu": 1}')) == [1.0, 2.0]
    assert IMAGE.read(msgspec.Raw(b"[[1, 2], [3, 4]]")) == [[1.0, 2.0], [3.0, 4.0]]


def test_a_problem_has_a_stable_code_and_names_the_field() -> None:
    body = msgspec.to_builtins(problem(InvalidField("no", "state[1]"), instance="/v1/act", row=3))
    assert body["type"] == "urn:surefoot:problem:invalid_field"
    assert (body["status"], body["code"], body["row"]) == (422, "invalid_field", 3)
    assert body["errors"] == [{"field": "state[1]", "detail": "no"}]
    assert "errors" not in msgspec.to_builtins(problem(NoSafeAction("nothing left")))


def test_what_is_left_at_its_default_is_not_sent_but_null_is() -> None:
    sent = wire.encode(wire.RewardResponse("id", None, "joined"))
    assert (
        sent
        == b'{"decision_id":"id","reward_id":null,"status":"joined","duplicate":false,"episode":null,"reward":null}'
    )
    assert b"errors" not in wire.encode(problem(NoSafeAction("nothing left")))


def test_every_error_of_the_tree_has_its_own_code() -> None:
    def tree(kind: type[SurefootError]) -> list[type[SurefootError]]:
        return [kind, *(sub for child in kind.__subclasses__() for sub in tree(child))]

    kinds = tree(SurefootError)
    kinds = [kind for kind in kinds if kind.__module__ == SurefootError.__module__]
    assert len({kind.code for kind in kinds}) == len(kinds)
    assert all(kind.retry_after_s for kind in tree(Unavailable))


def references(node: Any) -> set[str]:
    if isinstance(node, dict):
        own = {node["$ref"].rsplit("/", 1)[1]} if "$ref" in node else set()
        return own.union(*(references(value) for value in node.values()))
    return set().union(*(references(value) for value in node)) if isinstance(node, list) else set()


def test_the_openapi_part_refers_only_to_schemas_that_exist_and_its_examples_are_readable() -> None:
    schemas, paths = openapi.schemas(), openapi.paths()
    assert references(paths) | references(schemas) <= schemas.keys()
    readers = {
        "/v1/act": wire.decode_act,
        "/v1/act/batch": wire.decode_act_batch,
        "/v1/reward": wire.decode_reward,
        "/v1/reward/batch": wire.decode_reward_batch,
    }
    assert paths.keys() == readers.keys()
    for path, read in readers.items():
        example = paths[path]["post"]["requestBody"]["content"]["application/json"]["example"]
        read(msgspec.json.encode(example))
    answer = paths["/v1/act"]["post"]["responses"]["200"]["content"]["application/json"]["example"]
    msgspec.convert(answer, wire.ActResponse)


def test_the_openapi_part_lists_what_bodies_may_be() -> None:
    for path, item in openapi.paths().items():
        operation = item["post"]
        media = {"application/json"}
        if path.startswith("/v1/act"):
            media |= {"application/msgpack", "application/octet-stream"}
            named = {each["name"] for each in operation["parameters"]}
            assert named - {"Idempotency-Key"} == {overload.TIMEOUT, forms.DTYPE, forms.SHAPE, forms.JSON_LENGTH}
        assert operation["requestBody"]["content"].keys() == media
        status = "202" if "reward" in path else "200"
        assert operation["responses"][status]["content"].keys() == {"application/json", "application/msgpack"}


def test_a_deployment_is_decoded_with_the_same_complaints() -> None:
    found = wire.decode(b'{"schema": 1, "policy": "toy", "champion": "v1"}', Deployment)
    assert found.champion == "v1"
    with pytest.raises(UnknownField) as caught:
        wire.decode(b'{"schema": 1, "policy": "toy", "champion": "v1", "reward": {"x": 1}}', Deployment)
    assert caught.value.field == "reward.x"


def test_every_fault_of_a_safety_file_is_told_with_its_place() -> None:
    faults = [SafetyFault("rules[0].limit", "too small", 4, 9), SafetyFault("rules[1].name", "missing", 5, 3)]
    told = problem(SafetyError("two faults", "rules[0].limit", faults))
    assert [(each.field, each.line, each.column) for each in told.errors] == [
        ("rules[0].limit", 4, 9),
        ("rules[1].name", 5, 3),
    ]
    assert [each.line for each in problem(SafetyError("one", "name")).errors] == [None]
    assert problem(SafetyError("none")).errors == []


@pytest.mark.parametrize("number", [-(2**63) - 1, 2**64, 10**400])
def test_an_integer_that_no_record_can_hold_is_refused_by_its_field(number: int) -> None:
    with pytest.raises(InvalidField, match="64") as caught:
        wire.decode_act(b'{"state": [0.0], "context": {"deep": [{"n": %d}]}}' % number)
    assert caught.value.field == "context"
    with pytest.raises(InvalidField) as caught:
        wire.decode_act_batch(b'{"states": [[0.0], [1.0]], "contexts": [null, {"n": %d}]}' % number)
    assert caught.value.field == "contexts[1]"


def test_integers_of_64_bits_come_through() -> None:
    found = wire.decode_act(b'{"state": [0.0], "context": {"low": %d, "high": %d}}' % (-(2**63), 2**64 - 1))
    assert found.context == {"low": -(2**63), "high": 2**64 - 1}
