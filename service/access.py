"""Who may call which of FastAPI's routes, and what routes are given: the running worker."""

from __future__ import annotations

import hmac
from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends, Header, Request

from policies.errors import Unauthorized
from service.runtime import Runtime


@dataclass(frozen=True, slots=True)
class Context:
    """What the routes are given: the running worker, once there is one, and the tokens."""

    state: dict[str, Runtime]
    client_token: str | None
    admin_token: str


def _runtime(request: Request) -> Runtime:
    context: Context = request.app.state.context
    return context.state["runtime"]


def client(request: Request, authorization: Annotated[str | None, Header()] = None) -> None:
    """Let clients and admins in. Raises Unauthorized."""
    context: Context = request.app.state.context
    if context.client_token is not None:
        _require(authorization, context.client_token, context.admin_token)


def admin(request: Request, authorization: Annotated[str | None, Header()] = None) -> None:
    """Let admins in. Raises Unauthorized."""
    context: Context = request.app.state.context
    _require(authorization, context.admin_token)


def _require(authorization: str | None, *tokens: str) -> None:
    given = (authorization or "").removeprefix("Bearer ").encode()
    if not any(hmac.compare_digest(given, token.encode()) for token in tokens):
        raise Unauthorized("send a valid token as `Authorization: Bearer …`")


Worker = Annotated[Runtime, Depends(_runtime)]
