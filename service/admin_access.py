"""The admin routes for tokens and for the audit log. On FastAPI, below `/admin`.

Duty: HTTP to calls of `token_store.py` and `audit_chain.py`. The text of a new token is in the answer that makes it and
nowhere else.
"""

from __future__ import annotations

import contextlib
import secrets
from typing import Annotated, Any, Literal

import msgspec
from fastapi import APIRouter, Query, Request, Response
from msgspec import Meta, Struct

from policies.errors import Forbidden, InvalidField, StoreAway, UnknownToken
from service import tokens
from service.access import BEARER, Guarded, Whoever, Worker
from service.audit_files import statement_of
from service.audit_log import noted
from service.roles import ROLES, Role
from service.token_store import view
from service.tokens import MAX_TOKENS, Name, Token, Tokens
from service.wire import decode

HOUR_MS = 3_600_000
MAX_PAGE = 1_000
JSON = "application/json"


class Wanted(Struct, forbid_unknown_fields=True, frozen=True):
    """A token to make. owner: a person or a team. expires_in_hours: none means never."""

    role: Role
    owner: Name
    policies: tuple[Name, ...] = ()
    expires_in_hours: Annotated[float, Meta(gt=0, le=87_600)] | None = None
    note: Annotated[str, Meta(max_length=200)] = ""


router = APIRouter(prefix="/admin", tags=["access"], route_class=Guarded, dependencies=[BEARER])
After = Annotated[int, Query(ge=0, description="The number of the last entry that is known already")]
Limit = Annotated[int, Query(ge=1, le=MAX_PAGE)]
Policy = Annotated[str | None, Query(description="Only entries about this policy")]
Source = Annotated[
    Literal["redis", "disk"] | None, Query(description="Whose copy to read; unset: Redis's, else this replica's")
]
_WANTED = {
    "requestBody": {
        "required": True,
        "content": {
            JSON: {
                "schema": {
                    "type": "object",
                    "required": ["role", "owner"],
                    "properties": {
                        "role": {"enum": list(ROLES)},
                        "owner": {"type": "string"},
                        "policies": {"type": "array", "items": {"type": "string"}},
                        "expires_in_hours": {"type": "number", "exclusiveMinimum": 0},
                        "note": {"type": "string", "maxLength": 200},
                    },
                }
            }
        },
    }
}


@router.get("/tokens", summary="All tokens, without their texts")
async def list_tokens(worker: Worker) -> Response:
    now_ms, used = worker.clock.event_ms(), {}
    with contextlib.suppress(StoreAway):
        used = await worker.admission.tokens.last_used()
    return _json([view(each, used.get(each.id), now_ms) for each in worker.admission.tokens.tokens])


@router.post("/tokens", status_code=201, summary="Make a token; its text is told this once", openapi_extra=_WANTED)
async def create_token(request: Request, worker: Worker, caller: Whoever) -> Response:
    wanted, now_ms = decode(await request.body(), Wanted), worker.clock.event_ms()
    text = tokens.text_of(secrets.token_bytes(tokens.BYTES))
    lasts_h = wanted.expires_in_hours
    token = Token(
        id=f"t-{secrets.token_hex(6)}",
        hash=tokens.hash_of(text.encode()),
        role=wanted.role,
        owner=wanted.owner,
        created_at_ms=now_ms,
        created_by=caller.name,
        policies=wanted.policies,
        expires_at_ms=None if lasts_h is None else now_ms + round(lasts_h * HOUR_MS),
        note=wanted.note,
    )
    if wanted.policies and wanted.role == "admin":
        raise InvalidField("an admin's token is for all policies: it can make any other", "policies")
    noted().subject = f"{token.id} {token.role} {token.owner}"

    def add(standing: Tokens) -> Tokens:
        if len(standing.tokens) >= MAX_TOKENS:
            raise Forbidden(f"there are {MAX_TOKENS} tokens: revoke those that nobody uses")
        return standing.plus(token)

    await worker.admission.tokens.change(add)
    return _json(view(token, None, now_ms) | {"token": text}, 201)


@router.delete("/tokens/{token}", status_code=204, summary="Revoke a token; it ends everywhere within 2 s")
async def revoke_token(token: str, worker: Worker) -> Response:
    def remove(standing: Tokens) -> Tokens:
        if token not in standing.tokens:
            raise UnknownToken(f"there is no token {token[:20]!r}; those of the settings are changed there", "token")
        return standing.minus(token)

    await worker.admission.tokens.change(remove)
    return Response(status_code=204)


@router.get("/audit", summary="The audit log, oldest first")
async def audit(
    worker: Worker, caller: Whoever, after: After = 0, limit: Limit = 100, policy: Policy = None, source: Source = None
) -> Response:
    """Entries after a number. `next` is what to ask for next, null at the end; `head` is this replica's last entry."""
    if caller.policies:
        if policy is None:
            raise Forbidden("this token is for some policies only: name one of them", "policy")
        caller.confine(policy)
    where, lines = await worker.admission.chain.read(after, limit, source)
    entries = [msgspec.Raw(line) for line in lines if policy is None or statement_of(line).policy == policy]
    head = worker.admission.chain.head
    return _json(
        {
            "entries": entries,
            "next": after + len(lines) if len(lines) == limit else None,
            "source": where,
            "head": {"seq": head.seq, "hash": head.hash},
            "unchained": len(worker.admission.audit.pending),
        }
    )


def _json(body: Any, status: int = 200) -> Response:
    return Response(msgspec.json.encode(body), status, media_type=JSON)
