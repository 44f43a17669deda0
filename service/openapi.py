"""The hot routes in the OpenAPI document: schemas from the wire structs, with examples. Pure."""

from __future__ import annotations

from typing import Any

import msgspec

import service.wire as wire

STRUCTS = (
    wire.ActRequest,
    wire.ActResponse,
    wire.ActBatchRequest,
    wire.ActBatchResponse,
    wire.RewardRequest,
    wire.RewardResponse,
    wire.RewardBatchRequest,
    wire.RewardBatchResponse,
    wire.Problem,
)
_STATE = {
    "description": "The observation: a list in the order of the policy's features, or an object by feature name.",
    "oneOf": [{"type": "array", "items": {}}, {"type": "object", "additionalProperties": {"type": "number"}}],
}
_ID = "019aa3f0c1d2" + "0" * 48
_ACT = {"policy": "cartpole", "state": [0.01, -0.02, 0.03, 0.04], "episode": "e-1", "step": 0}
_ACTED = {
    "decision_id": _ID, "policy": "cartpole", "assigned_version": "v2", "version": "v2", "role": "champion",
    "generation": 1, "action": 1, "action_name": "right", "propensity": 0.99, "propensity_reason": None,
    "explored": False, "exploration": {"epsilon": 0.02, "left": None},
    "safety": {"overridden": False, "proposed": "right", "rules": []}, "fallback": None, "logged": True,
}  # fmt: skip
_REWARD = {"decision_id": _ID, "reward": 1.0, "terminated": False}
_ROUTES: dict[str, tuple[str, str, str, str, dict[str, Any], dict[str, Any]]] = {
    "/v1/act": ("Ask for one action", "ActRequest", "ActResponse", "200", _ACT, _ACTED),
    "/v1/act/batch": (
        "Ask for an action for each of several states", "ActBatchRequest", "ActBatchResponse", "200",
        {"policy": "cartpole", "states": [[0.01, -0.02, 0.03, 0.04], [0.0, 0.0, 0.0, 0.0]]}, {},
    ),
    "/v1/reward": (
        "Reward a decision", "RewardRequest", "RewardResponse", "202", _REWARD,
        {
            "decision_id": _ID, "reward_id": None, "status": "joined", "duplicate": False, "episode": None,
            "reward": 1.0,
        },
    ),
    "/v1/reward/batch": (
        "Reward several decisions", "RewardBatchRequest", "RewardBatchResponse", "202", {"rewards": [_REWARD]}, {},
    ),
}  # fmt: skip
_HEADERS: dict[str, tuple[str, dict[str, Any]]] = {
    "X-Request-Timeout-Ms": (
        "Milliseconds that the request may take; what is not decided by then is refused.",
        {"pattern": "^[1-9][0-9]{0,8}$"},
    ),
    "Surefoot-Dtype": ("Raw bodies: what the numbers are, little-endian.", {"enum": ["<f4", "<f8", "|u1"]}),
    "Surefoot-Shape": ("Raw bodies: of the state, as 84,84,4; of a batch with the number of states in front.", {}),
    "Inference-Header-Content-Length": ("Raw bodies: bytes of JSON before the numbers.", {"pattern": "^[0-9]+$"}),
}
_RAW = {
    "type": "string",
    "format": "binary",
    "description": "The other fields as JSON, unless there are none, and the numbers as they lie in memory behind it.",
}
_PROBLEMS = {
    "400": "Not read", "401": "No valid token", "404": "Unknown policy or decision", "408": "The body came too slowly",
    "409": "Conflict", "413": "The body is too large", "422": "A field is wrong", "503": "Not kept; try again later",
}  # fmt: skip


def schemas() -> dict[str, Any]:
    """JSON schemas of all wire structs, by name."""
    _, components = msgspec.json.schema_components(STRUCTS, ref_template="#/components/schemas/{name}")
    for name, field in (("ActRequest", "state"), ("RewardRequest", "next_state")):
        components[name]["properties"][field] = _STATE
    components["ActBatchRequest"]["properties"]["states"] = {"type": "array", "items": _STATE, "minItems": 1}
    return dict(components)


def paths() -> dict[str, Any]:
    """Path items of the hot routes."""
    return {path: {"post": _operation(path)} for path in _ROUTES}


def _operation(path: str) -> dict[str, Any]:
    summary, request, response, status, sent, received = _ROUTES[path]
    answers = {
        code: _content(text, "Problem", {}, "application/problem+json") for code, text in sorted(_PROBLEMS.items())
    }
    sends = _content("", request, sent)
    parameters = []
    if path == "/v1/act":
        parameters.append(_header("Idempotency-Key", "A repeat returns the stored answer.", {"maxLength": 257}))
    if path.startswith("/v1/act"):
        parameters += [_header(name, *about) for name, about in _HEADERS.items()]
        sends["content"] |= _content("", request, {}, "application/msgpack")["content"]
        sends["content"]["application/octet-stream"] = {"schema": _RAW}
    receives = _content(summary, response, received)
    receives["content"] |= _content("", response, {}, "application/msgpack")["content"]
    return {
        "operationId": path.removeprefix("/v1/").replace("/", "_"),
        "summary": summary,
        "tags": ["decisions"],
        "parameters": parameters,
        "requestBody": {"required": True, **sends},
        "responses": {status: receives, **answers},
    }


def _header(name: str, text: str, schema: dict[str, Any]) -> dict[str, Any]:
    return {"name": name, "in": "header", "schema": {"type": "string", **schema}, "description": text}


def _content(text: str, schema: str, example: dict[str, Any], media: str = "application/json") -> dict[str, Any]:
    body: dict[str, Any] = {"schema": {"$ref": f"#/components/schemas/{schema}"}}
    if example:
        body["example"] = example
    return {"description": text, "content": {media: body}} if text else {"content": {media: body}}
