"""The routes that need no haste, on FastAPI: health, decisions, metrics, documents; `admin.py` adds its own.

Duty: read-only views of a running worker. Errors of the tree become problem+json by one handler.
"""

from __future__ import annotations

import asyncio
from dataclasses import asdict
from typing import Any

import msgspec
from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.utils import get_openapi
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException

from policies.errors import InvalidField, StoreAway, SurefootError
from service import admin, admin_access, admin_rollout, openapi
from service.access import BEARER, Context, Guarded, Whoever, Worker
from service.callers import Caller
from service.decision import RewardRecord, decode_record, decode_reward_record
from service.history import describe
from service.problems import CONTENT_TYPE, problem
from service.redis_streams import StoredDecision, StoredReward
from service.runtime import Runtime
from service.wire import FieldError, Problem

SHIPPING_TRIES = 10
SHIPPING_PAUSE_S = 0.02


health = APIRouter(prefix="/health", tags=["health"])
views = APIRouter(route_class=Guarded, dependencies=[BEARER])


@health.get("/live", summary="Whether the process answers")
async def live() -> dict[str, str]:
    return {"status": "live"}


@health.get("/ready", summary="Whether it should get traffic, and why not")
async def ready(worker: Worker) -> JSONResponse:
    reasons = worker.reasons()
    about = {"reasons": reasons, "loading": worker.catalog.absence.waiting()}
    body = {"status": "not_ready" if reasons else "ready", **about, **_durability(worker)}
    body["workers"] = {"serving": worker.team.serving, "of": worker.team.size}
    return JSONResponse(body, 503 if reasons else 200)


@views.get("/v1/decisions/{decision_id}", tags=["decisions"], summary="A decision's record, its join, and why")
async def decision(decision_id: str, worker: Worker, caller: Whoever) -> Response:
    """The whole record of a decision, where it stands in the join, and why it was what it was."""
    stored = await _find(worker, decision_id, caller)
    body = describe(stored, decode_record(stored.record)) | {"join": _join(stored)}
    return Response(msgspec.json.encode(body), media_type="application/json")


@views.get("/metrics", tags=["operations"], summary="Prometheus metrics, of all workers")
async def metrics(worker: Worker) -> Response:
    worker.refresh_metrics()
    registry = await worker.team.registry(worker.metrics.registry)
    return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)


def build_api(state: dict[str, Runtime]) -> FastAPI:
    """Build the application. `state["runtime"]` is there once the worker has started."""
    app = FastAPI(
        title="Surefoot",
        version="0.1.0",
        summary="Online policy serving for reinforcement learning: safe actions, exact propensities, joined rewards.",
        redoc_url=None,
    )
    app.state.context = Context(state)
    for router in (health, views, admin.router, admin_access.router, admin_rollout.router):
        app.include_router(router)
    _handle_errors(app)
    app.openapi = lambda: _document(app)  # type: ignore[method-assign]
    return app


def _durability(worker: Runtime) -> dict[str, Any]:
    """What events survive here and now, and what of the tier asked for the connected Redis cannot give."""
    acks = worker.shipper.statistics().acks
    recording = {policy: worker.ledger.recording(policy) for policy in worker.policies}
    return worker.watch.view() | {"recording": recording, "replication": None if acks is None else asdict(acks)}


async def _find(worker: Runtime, decision_id: str, caller: Caller) -> StoredDecision:
    """Read a decision from Redis; one that is still on its way there gets a moment to arrive."""
    identity, policy = worker.rewards.find(decision_id)
    caller.confine(policy.policy)
    for _ in range(SHIPPING_TRIES):
        stored = await worker.streams.read_decision(policy.policy, identity.text)
        if stored is not None:
            return stored
        worker.shipper.kick()
        await asyncio.sleep(SHIPPING_PAUSE_S)
    raise StoreAway("this decision's record has not reached Redis yet", "decision_id")


def _join(stored: StoredDecision) -> dict[str, Any]:
    return {
        "state": stored.state_name,
        "waiting_for": stored.waiting_for,
        "due_ms": stored.due_ms,
        "reward": None if stored.reward is None else _reward(stored.reward),
        "collected": [_reward(each) for each in stored.collected],
        "end": stored.end,
        "next_decision_id": stored.next_id,
    }


def _reward(reward: StoredReward) -> dict[str, Any]:
    record = decode_reward_record(reward.record) if reward.record else RewardRecord()
    return {
        "reward": reward.reward,
        "reward_id": reward.reward_id or None,
        "accepted_ms": reward.at_ms,
        "metrics": record.metrics,
        "sent": record.sent,
    }


def _handle_errors(app: FastAPI) -> None:
    def respond(body: Problem, headers: dict[str, str] | None = None) -> Response:
        return Response(msgspec.json.encode(body), body.status, headers, CONTENT_TYPE)

    @app.exception_handler(SurefootError)
    async def ours(request: Request, error: SurefootError) -> Response:
        headers = {"Retry-After": str(error.retry_after_s)} if error.retry_after_s is not None else None
        return respond(problem(error, instance=request.url.path), headers)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        found = problem(InvalidField("the request does not fit"), instance=request.url.path)
        errors = [FieldError(".".join(map(str, each["loc"])), each["msg"]) for each in error.errors()]
        return respond(msgspec.structs.replace(found, errors=errors))

    @app.exception_handler(HTTPException)
    async def plain(request: Request, error: HTTPException) -> Response:
        code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "http_error")
        body = Problem(
            type=f"urn:surefoot:problem:{code}",
            title=str(error.detail),
            status=error.status_code,
            code=code,
            detail=f"{request.method} {request.url.path}: {error.detail}",
            instance=request.url.path,
        )
        return respond(body, dict(error.headers or {}))


def _document(app: FastAPI) -> dict[str, Any]:
    """The OpenAPI document: FastAPI's own routes and the hot ones."""
    if app.openapi_schema is None:
        document = get_openapi(title=app.title, version=app.version, summary=app.summary, routes=app.routes)
        document["paths"] = openapi.paths() | document["paths"]
        document.setdefault("components", {}).setdefault("schemas", {}).update(openapi.schemas())
        app.openapi_schema = document
    return app.openapi_schema
