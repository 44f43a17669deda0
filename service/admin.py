"""The admin routes: policies, their versions, how they are deployed and halted. On FastAPI, below `/admin`.

Duty: HTTP to calls of `changes.py`, and what a worker knows to JSON. An ETag is a deployment's generation; a change
names the generation that it replaces as If-Match.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, get_args

import msgspec
from fastapi import APIRouter, Header, Query, Request, Response
from fastapi.responses import JSONResponse

from policies.deployment import Deployment
from policies.errors import InvalidField, UnknownPolicy, UnknownVersion
from safety.exploration import Exploration
from safety.halt import KillSwitch
from safety.marks import MAX_BYTES
from service.access import BEARER, By, Guarded, Whoever, Worker
from service.changes import Claim
from service.runtime import Runtime
from service.standing import PolicyState
from service.tokens import NAME
from service.upload import read_text, read_upload
from service.views import deployment_view, exploration_view, halts_view, policy_view, version_line, version_view
from service.wire import decode


class Halts(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """The kill switches that are on; those that are not named are off."""

    on: list[KillSwitch]


router = APIRouter(prefix="/admin", tags=["admin"], route_class=Guarded, dependencies=[BEARER])
IfMatch = Annotated[str | None, Header(alias="If-Match")]
Owner = Annotated[str | None, Query(pattern=NAME, description="Whose the rules are from now on; for admins alone")]
Last = Annotated[int, Query(ge=1, le=100_000, description="How many of the newest decisions to look at")]
_BUNDLE = {
    "requestBody": {
        "required": True,
        "content": {
            "application/x-tar": {"schema": {"type": "string", "format": "binary"}},
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["policy.yaml", "model.onnx", "golden.json"],
                    "properties": {
                        name: {"type": "string", "format": "binary"}
                        for name in ("policy.yaml", "model.onnx", "golden.json", "model.sig")
                    },
                }
            },
        },
    }
}
_HALTS = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {
                "schema": {
                    "type": "object",
                    "required": ["on"],
                    "properties": {"on": {"type": "array", "items": {"enum": list(get_args(KillSwitch))}}},
                }
            }
        },
    }
}
_SAFETY = {"requestBody": {"required": True, "content": {"application/yaml": {"schema": {"type": "string"}}}}}
_EXPLORATION = {"requestBody": {"required": True, "content": {"application/json": {"schema": {"type": "object"}}}}}
_DEPLOYMENT = {"requestBody": {"required": True, "content": {"application/json": {"schema": {"type": "object"}}}}}


@router.get("/policies", summary="What there is: policies, their versions, who decides")
async def policies(worker: Worker, caller: Whoever) -> list[dict[str, Any]]:
    states = [state for name, state in sorted(worker.catalog.states.items()) if caller.reaches(name)]
    return [policy_view(state) for state in states if state.labels]


@router.get("/policies/{policy}", summary="One policy: its deployment, its versions")
async def policy(policy: str, worker: Worker) -> JSONResponse:
    state = find(worker, policy)
    return JSONResponse(policy_view(state), headers=tag(state))


@router.get("/policies/{policy}/deployment", summary="How a policy is deployed; its ETag is what a change must name")
async def deployment(policy: str, worker: Worker) -> JSONResponse:
    state = find(worker, policy)
    if state.document is None:
        raise UnknownPolicy(f"{policy!r} has versions but is not deployed", "policy")
    return JSONResponse(deployment_view(state.document), headers=tag(state))


@router.put("/policies/{policy}/deployment", summary="Say which version decides, and how", openapi_extra=_DEPLOYMENT)
async def deploy(policy: str, request: Request, worker: Worker, by: By, if_match: IfMatch = None) -> Response:
    body = await request.body()
    state = await worker.changes.deploy(policy, decode(body, Deployment), generation_of(if_match), by)
    return await changed(worker, state, policy_view(state))


@router.get("/policies/{policy}/halts", summary="Which kill switches are on")
async def halts(policy: str, worker: Worker) -> JSONResponse:
    state = find(worker, policy)
    return JSONResponse(halts_view(state), headers=tag(state))


@router.put("/policies/{policy}/halts", summary="Say which kill switches are on", openapi_extra=_HALTS)
async def halt(policy: str, request: Request, worker: Worker, by: By) -> Response:
    wanted = decode(await request.body(), Halts)
    state = await worker.changes.halt(policy, wanted.on, by)
    return await changed(worker, state, halts_view(state))


@router.get("/policies/{policy}/exploration", summary="How a policy explores, and its budgets")
async def exploration(policy: str, worker: Worker) -> Response:
    state = find(worker, policy)
    return Response(msgspec.json.encode(exploration_view(state)), media_type="application/json", headers=tag(state))


@router.put("/policies/{policy}/exploration", summary="Say how a policy explores", openapi_extra=_EXPLORATION)
async def explore(policy: str, request: Request, worker: Worker, by: By, if_match: IfMatch = None) -> Response:
    wanted = decode(await request.body(), Exploration)
    state = await worker.changes.explore(policy, wanted, generation_of(if_match), by)
    return await changed(worker, state, exploration_view(state))


@router.get("/policies/{policy}/calibration", summary="Whether recorded probabilities are the true ones")
async def calibration(policy: str, worker: Worker) -> Response:
    found = await worker.calibrations.view(find(worker, policy).name)
    return Response(msgspec.json.encode(found), media_type="application/json")


@router.delete(
    "/policies/{policy}/calibration", status_code=204, summary="Forget its alarms and sums: the fault is mended"
)
async def recalibrate(policy: str, worker: Worker) -> Response:
    await worker.calibrations.anew(find(worker, policy).name)
    return Response(status_code=204)


@router.get("/policies/{policy}/estimates", summary="What versions would be worth, and whether a shadow may be tried")
async def estimates(policy: str, worker: Worker) -> Response:
    found = worker.estimating.view(find(worker, policy).name)
    return Response(msgspec.json.encode(found), media_type="application/json")


@router.get("/policies/{policy}/shadows", summary="What this replica's shadows have come to")
async def shadows(policy: str, worker: Worker) -> Response:
    state = find(worker, policy)
    found = {"policy": policy, "shadows": state.shadows, "here": worker.shadows.view(policy)}
    return Response(msgspec.json.encode(found), media_type="application/json", headers=tag(state))


@router.put("/policies/{policy}/shadows/{label}", summary="Let a version watch: it is shown decisions, and makes none")
async def watch(policy: str, label: str, worker: Worker, by: By) -> Response:
    state = await worker.changes.watch(policy, label, by, watches=True)
    return await changed(worker, state, policy_view(state))


@router.delete("/policies/{policy}/shadows/{label}", summary="Let a version watch no more")
async def unwatch(policy: str, label: str, worker: Worker, by: By) -> Response:
    state = await worker.changes.watch(policy, label, by, watches=False)
    return await changed(worker, state, policy_view(state))


@router.get("/policies/{policy}/safety", summary="The policy's safety.yaml; empty: it has no rules")
async def safety(policy: str, worker: Worker) -> Response:
    state = find(worker, policy)
    source = "" if state.document is None else state.document.safety
    return Response(source, media_type="application/yaml", headers=tag(state))


@router.put("/policies/{policy}/safety", summary="Replace the policy's safety.yaml", openapi_extra=_SAFETY)
async def rule(
    policy: str, request: Request, worker: Worker, caller: Whoever, if_match: IfMatch = None, owner: Owner = None
) -> Response:
    """Rules belong to whose token set them first. Only an admin replaces another's, or gives them away."""
    source = await read_text(request.stream(), MAX_BYTES, worker.settings.body_timeout_s)
    claim = Claim(caller.owner, caller.role == "admin", owner)
    state = await worker.changes.rule(policy, source, generation_of(if_match), caller.name, claim)
    return await changed(worker, state, policy_view(state))


@router.post(
    "/policies/{policy}/safety/test",
    summary="Try a safety.yaml on recent decisions: what it would have changed. Nothing is changed by it",
    openapi_extra=_SAFETY,
)
async def rehearse(policy: str, request: Request, worker: Worker, last: Last = 1_000) -> Response:
    source = await read_text(request.stream(), MAX_BYTES, worker.settings.body_timeout_s)
    state, served = find(worker, policy), worker.policies.get(policy)
    if state.document is None or served is None:
        raise UnknownPolicy(f"{policy!r} has versions but is not deployed", "policy")
    plan = served.coalescer.decider.plan
    report = await worker.rehearsal.run(plan, state.document.safety, source, last)
    return Response(msgspec.json.encode(report), media_type="application/json")


@router.post("/policies/{policy}/versions/{label}/rearm", summary="Close a version's breaker again, everywhere")
async def rearm(policy: str, label: str, worker: Worker, by: By) -> Response:
    state = await worker.changes.rearm(policy, label, by)
    return await changed(worker, state, await version_view(state, label, worker.catalog.loading))


@router.post(
    "/policies/{policy}/versions",
    status_code=201,
    summary="Push a version: a tar of its bundle, or a form with its files",
    openapi_extra=_BUNDLE,
)
async def push(policy: str, request: Request, worker: Worker, by: By) -> JSONResponse:
    kind = request.headers.get("content-type", "")
    files = await read_upload(kind, request.stream(), worker.settings.body_timeout_s)
    pushed = await worker.changes.push(policy, files, by)
    body = version_line(pushed.state, pushed.version) | {"policy": policy, "warnings": pushed.warnings}
    body |= await worker.roll.told(pushed.state)
    where = f"/admin/policies/{policy}/versions/{pushed.version}"
    return JSONResponse(body, 201 if pushed.new else 200, {"Location": where})


@router.get("/policies/{policy}/versions", summary="All versions of a policy")
async def versions(policy: str, worker: Worker) -> list[dict[str, Any]]:
    state = find(worker, policy)
    return [version_line(state, label) for label in sorted(state.labels)]


@router.get("/policies/{policy}/versions/{label}", summary="One version: manifest, spaces, where it runs, its role")
async def version(policy: str, label: str, worker: Worker) -> Response:
    state = find(worker, policy)
    if label not in state.labels:
        raise UnknownVersion(f"there is no version {policy}/{label}", "version")
    view = await version_view(state, label, worker.catalog.loading)
    return Response(msgspec.json.encode(view), media_type="application/json")


@router.delete("/policies/{policy}/versions/{label}", status_code=204, summary="Delete a version that is not live")
async def delete(policy: str, label: str, worker: Worker) -> Response:
    await worker.changes.delete(policy, label)
    return Response(status_code=204)


def find(worker: Runtime, policy: str) -> PolicyState:
    """A policy that has versions. Raises UnknownPolicy."""
    state = worker.catalog.states.get(policy)
    if state is None or not state.labels:
        raise UnknownPolicy(f"there is no policy {policy!r}", "policy")
    return state


async def changed(worker: Runtime, state: PolicyState, view: dict[str, Any]) -> Response:
    """Answer a change: how the policy stood right after it (others may change it meanwhile), and who lacks it yet."""
    headers = tag(state)
    body = view | await worker.roll.told(state)
    return Response(msgspec.json.encode(body), media_type="application/json", headers=headers)


def tag(state: PolicyState) -> dict[str, str]:
    """The header that tells a policy's generation."""
    return {"ETag": f'"{state.generation}"'}


def generation_of(if_match: str | None) -> int | None:
    """The generation that a change names. Raises InvalidField."""
    if if_match is None:
        return None
    found = re.fullmatch(r'"?(\d{1,15})"?', if_match.strip())
    if found is None:
        raise InvalidField(f'If-Match is a deployment\'s ETag, like "3", not {if_match!r}', "If-Match")
    return int(found[1])
