"""The admin routes for rollouts. On FastAPI, below `/admin`.

Duty: HTTP to calls of `rollout_changes.py`, and what is known of a rollout to JSON. What the leader has counted is read
from Redis, so that every replica shows the same.
"""

from __future__ import annotations

import contextlib
from typing import Annotated, Any, Final

import msgspec
from fastapi import APIRouter, Header, Path, Request, Response

from policies.errors import GenerationMissing, StoreAway
from service.access import BEARER, By, Guarded, Worker
from service.admin import changed, find, generation_of, tag
from service.rollout_changes import Order, OrderName
from service.runtime import Runtime
from service.standing import PolicyState
from service.wire import decode
from shadow.rollout_plan import RolloutPlan

router = APIRouter(prefix="/admin", tags=["rollout"], route_class=Guarded, dependencies=[BEARER])
IfMatch = Annotated[str | None, Header(alias="If-Match")]
Move = Annotated[OrderName, Path(description="What to do")]
_PLAN: Final[dict[str, Any]] = {
    "requestBody": {"required": True, "content": {"application/json": {"schema": {"type": "object"}}}}
}
_ORDER: Final[dict[str, Any]] = {
    "requestBody": {
        "required": False,
        "content": {
            "application/json": {
                "schema": {
                    "type": "object",
                    "properties": {
                        "version": {"type": "string", "description": "begin, quarantine, release"},
                        "weight": {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1},
                        "reason": {"type": "string", "maxLength": 500},
                    },
                }
            }
        },
    }
}


@router.get("/policies/{policy}/rollout", summary="A policy's rollout: plan, where it stands, what the guards say")
async def rollout(policy: str, worker: Worker) -> Response:
    state = find(worker, policy)
    return Response(msgspec.json.encode(await _view(state, worker)), media_type="application/json", headers=tag(state))


@router.put("/policies/{policy}/rollout", summary="The plan that the next rollout goes by", openapi_extra=_PLAN)
async def plan(policy: str, request: Request, worker: Worker, by: By, if_match: IfMatch = None) -> Response:
    wanted = decode(await request.body(), RolloutPlan)
    expected, state = generation_of(if_match), find(worker, policy)
    if expected is None:
        detail = f"the policy is at generation {state.generation}: read it, and send its ETag as If-Match"
        raise GenerationMissing(detail, "If-Match")
    state = await worker.rollout_changes.plan(policy, wanted, expected, by)
    return await changed(worker, state, await _view(state, worker))


@router.post(
    "/policies/{policy}/rollout/{move}",
    summary="Begin a rollout, move it, stop it; latch a version, or release it. If-Match only if it should hold",
    openapi_extra=_ORDER,
)
async def order(
    policy: str, move: Move, request: Request, worker: Worker, by: By, if_match: IfMatch = None
) -> Response:
    find(worker, policy)
    wanted = decode(await request.body() or b"{}", Order)
    state = await worker.rollout_changes.order(policy, move, wanted, generation_of(if_match), by)
    return await changed(worker, state, await _view(state, worker))


async def _view(state: PolicyState, worker: Runtime) -> dict[str, Any]:
    document, view = state.document, None
    with contextlib.suppress(StoreAway):  # what was counted is not known then; where the rollout stands is
        view = await worker.rollouts.view(state.name)
    standing = None if document is None else document.standing
    if standing is None or view is None or view.of != f"{standing.id}:{standing.generation}":
        view = None  # of another rollout, or step
    told = worker.estimating.told(state.name)
    return {
        "policy": state.name,
        "generation": state.generation,
        "champion": None if document is None else document.deployment.champion,
        "plan": None if document is None else document.rollout,
        "standing": standing,
        "marks": {} if document is None else document.marks,
        "next": "" if view is None else view.next,
        "evidence": None if view is None else view.evidence,
        "gate": None if view is None else view.gate,
        "estimates": {} if told is None else {label: each.estimates for label, each in told.versions.items()},
    }
