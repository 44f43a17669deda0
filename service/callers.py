"""Who calls, and whether they may: from a request's head to a caller, or a refusal.

    bearer -> token, by hash -> role grants it? -> one of its policies? -> not too often?

Duty: authentication, authorisation and rates, for hot routes and all others alike. It knows no FastAPI and no Redis;
tokens are published to it. Strategy: everything is a look-up in memory: a hash and two dicts, 2 µs for a hot route.
Promise: a call that is refused has had no effect. Who guesses is slowed down by address, and locks nobody out: a token
of 128 bits or more is not a guess that came true, so it is let in whatever came from its address before.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

from policies.errors import Forbidden, TooMany, Unauthorized
from service.audit_log import Who
from service.body import Head, header
from service.clock import Clock
from service.metrics import Metrics
from service.roles import OPENABLE, Permission, Role, grants
from service.throttle import Throttle, bucket_of
from service.tokens import STRONG, Token, by_hash, hash_of, recognise

BURST_S: Final = 2.0  # a console that opens asks for everything at once


@dataclass(frozen=True, slots=True)
class Caller:
    """Somebody who was let in. policies: those that the token is for; empty: all."""

    name: str
    owner: str
    role: Role
    policies: frozenset[str] = frozenset()
    address: str = ""

    @property
    def who(self) -> Who:
        """The caller as the audit log names it."""
        return Who(self.name, self.owner, self.address)

    def reaches(self, policy: str) -> bool:
        """Say whether the token is for a policy."""
        return not self.policies or policy in self.policies

    def confine(self, policy: str) -> None:
        """Raise Forbidden for a policy that the token is not for."""
        if not self.reaches(policy):
            raise Forbidden(f"this token is not for the policy {policy!r}", "policy")


ANYONE: Final = Caller("anyone", "", "client")


class Callers:
    """The tokens that stand, and how often each caller came. Use from the event loop's thread only.

    client, admin: the tokens of the settings; without a client token, calls that clients make need none.
    """

    def __init__(
        self, client: str | None, admin: str, clock: Clock, metrics: Metrics, *, rate: float, failures_per_minute: float
    ) -> None:
        self._open = client is None
        roles: tuple[tuple[Role, str | None], ...] = (("client", client), ("admin", admin))
        self._weak = {role for role, text in roles if text is not None and len(text) < STRONG}
        self._settings = [_built_in(role, text) for role, text in roles if text is not None]
        self._table: Mapping[str, Token] = {}
        self._known: Mapping[str, Caller] = {}  # by token id
        self._clock = clock
        self._refused = metrics.refused_callers
        self._rates = Throttle(rate, rate * BURST_S)
        self._failures = Throttle(failures_per_minute / 60.0, failures_per_minute)
        self.used: set[str] = set()  # whose tokens were used since somebody emptied this
        self.publish(())

    def publish(self, tokens: Iterable[Token]) -> None:
        """Let these tokens in, and those of the settings, and no other."""
        # The settings' come last: a stored token cannot take the place of one.
        self._table = by_hash([*tokens, *self._settings])
        self._known = {
            each.id: Caller(each.id, each.owner, each.role, frozenset(each.policies)) for each in self._table.values()
        }

    def hot(self, head: Head, permission: Permission) -> Caller:
        """Let in a call that has no rate. Raises Unauthorized, Forbidden or TooMany."""
        if self._open:
            return ANYONE
        caller = self._identify(head.headers.get(b"authorization"), head.client)
        if not grants(caller.role, permission):
            self._refused.labels("forbidden").inc()
            raise _not_granted(caller, permission)
        return caller

    def identify(self, scope: Mapping[str, Any], permission: Permission | None, *, urgent: bool = False) -> Caller:
        """Say who calls, if they do not call too often. urgent: that is not asked of a caller who is known.

        Raises Unauthorized or TooMany.
        """
        if self._open and permission in OPENABLE:
            return ANYONE
        where, now_s = address_of(scope), self._clock.monotonic_s()
        address = bucket_of(where)
        try:
            caller = self._identify(header(scope, b"authorization"), scope.get("client"))  # type: ignore[arg-type]
        except Unauthorized:
            self._limit(f"no:{address}", now_s)
            raise
        if not urgent:
            self._limit(f"token:{caller.name}", now_s)
            self._limit(f"address:{address}", now_s)
        return replace(caller, address=where)

    def permit(self, caller: Caller, permission: Permission | None, policy: str) -> None:
        """Hold a caller against what a route needs. Raises Forbidden, or TooMany where that has happened too often."""
        try:
            if not grants(caller.role, permission):
                raise _not_granted(caller, permission)
            if policy:
                caller.confine(policy)
        except Forbidden:
            # Each such refusal of a change is written to a log that is never trimmed.
            self._fail(f"forbidden:{caller.name}")
            self._refused.labels("forbidden").inc()
            raise

    def _identify(self, given: bytes | None, client: tuple[str, int] | None) -> Caller:
        if given is None:
            self._refused.labels("missing").inc()
            raise Unauthorized("send a token as `Authorization: Bearer …`")
        token = recognise(self._table, given.removeprefix(b"Bearer "), self._clock.event_ms())
        if token is None or (token.role in self._weak and token.id == token.role):
            self._hold_off_guessing(bucket_of(_address(client)), guessed=token is None)
        if token is None:
            self._refused.labels("wrong").inc()
            raise Unauthorized(
                "send a valid token as `Authorization: Bearer …`; this one is unknown, revoked or expired"
            )
        self.used.add(token.id)
        return self._known[token.id]

    def _hold_off_guessing(self, address: str, *, guessed: bool) -> None:
        if guessed or self._failures.left(f"wrong:{address}", self._clock.monotonic_s()) < 1.0:
            self._fail(f"wrong:{address}")

    def _fail(self, name: str) -> None:
        wait_s = self._failures.take(name, self._clock.monotonic_s())
        if wait_s:
            self._refused.labels("throttled").inc()
            raise TooMany("too many refused calls: wait, and look at the token", None, wait_s)

    def _limit(self, name: str, now_s: float) -> None:
        wait_s = self._rates.take(name, now_s)
        if wait_s:
            self._refused.labels("throttled").inc()
            raise TooMany("too many requests to /admin: ask less often", None, wait_s)


def address_of(scope: Mapping[str, Any]) -> str:
    """Where a request came from: the peer of the connection. What a proxy says of others is not believed."""
    return _address(scope.get("client"))


def _address(client: tuple[str, int] | None) -> str:
    return str(client[0]) if client else ""


def _built_in(role: Role, text: str) -> Token:
    return Token(id=role, hash=hash_of(text.encode()), role=role, owner="", created_at_ms=0, created_by="settings")


def _not_granted(caller: Caller, permission: Permission | None) -> Forbidden:
    return Forbidden(f"the role {caller.role!r} does not have the permission {permission or 'admin'!r}")
