"""FastAPI's routes behind tokens: who is let in, what of it is written down, what routes are given.

    identify -> permit -> (a change: intent) -> the route -> (its outcome) -> the answer

Duty: `Guarded` stands before every route of a router that names it, so that no route can be forgotten. Who may what is
`callers.py`'s and `roles.py`'s to say.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Annotated, Any, cast

from fastapi import Depends, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from fastapi.security import HTTPBearer

from policies.errors import Forbidden
from service.callers import Caller
from service.roles import action_of, needed
from service.runtime import Runtime

HALT = "halt"
Handler = Callable[[Request], Awaitable[Response]]
# The document says that routes take a token; whether it is a good one is decided before FastAPI looks at the request.
BEARER = Depends(HTTPBearer(auto_error=False, description="A token: `surefoot token create` makes one."))


@dataclass(frozen=True, slots=True)
class Context:
    """What the routes are given: the running worker, once there is one."""

    state: dict[str, Runtime]


class Guarded(APIRoute):
    """A route that needs the permission of `roles.ROUTES`; changes are written to the audit log."""

    def get_route_handler(self) -> Callable[[Request], Any]:
        inner, path = super().get_route_handler(), self.path_format

        async def handle(request: Request) -> Response:
            return await _guard(request, path, inner)

        return handle


async def _guard(request: Request, path: str, inner: Handler) -> Response:
    worker, permission = _runtime(request), needed(request.method, path)
    action = action_of(request.method, path)
    # A dashboard that asks too often must keep nobody from halting.
    caller = worker.admission.callers.identify(request.scope, permission, urgent=action == HALT)
    request.state.caller = caller
    policy = request.path_params.get("policy", "")
    if action is None:
        worker.admission.callers.permit(caller, permission, policy)
        return await inner(request)
    subject = request.path_params.get("label") or request.path_params.get("token") or ""
    try:
        worker.admission.callers.permit(caller, permission, policy)
    except Forbidden as refused:
        await worker.admission.audit.record(caller.who, action, policy, subject, refused.code)
        raise
    async with worker.admission.audit.change(caller.who, action, policy, subject, urgent=action == HALT) as note:
        if policy in worker.catalog.states:
            note.before = worker.catalog.states[policy].generation
        try:
            return await inner(request)
        except RequestValidationError:
            note.outcome = "invalid_field"
            raise


def _runtime(request: Request) -> Runtime:
    context: Context = request.app.state.context
    return context.state["runtime"]


def _caller(request: Request) -> Caller:
    return cast(Caller, request.state.caller)


def _name(request: Request) -> str:
    return _caller(request).name


Worker = Annotated[Runtime, Depends(_runtime)]
Whoever = Annotated[Caller, Depends(_caller)]
By = Annotated[str, Depends(_name)]
