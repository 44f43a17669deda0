"""What persons do to rollouts: set the plan, begin one, move it, stop it, latch versions and release them.

Duty: an order, by name, to the next control document (`rolling.py`), put in force by compare-and-set (`changes.py`).
What the service does by itself is `rollouts.py`'s.
Promise: an order either is what happened, or is refused and has changed nothing. An order without a generation is made
from whatever stands: the table of moves says whether it can still be made.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Final, Literal
from uuid import uuid4

from msgspec import Meta, Struct
from msgspec.structs import replace

from policies.errors import InvalidField, UnknownVersion
from service.audit_log import noted
from service.changes import Changes
from service.clock import Clock
from service.rolling import begun, made, paused, quarantined, released, resumed, returns_of, standing_of, weighed
from service.standing import Document, PolicyState
from shadow.rollout import Move, Stage
from shadow.rollout_plan import RolloutPlan

OrderName = Literal[
    "begin", "advance", "promote", "rollback", "withdraw", "pause", "resume", "weight", "quarantine", "release"
]


class Order(Struct, forbid_unknown_fields=True, frozen=True):
    """What an order says besides its name."""

    version: str | None = None  # begin, quarantine, release
    weight: float | None = None  # weight
    reason: Annotated[str, Meta(max_length=500)] = ""


Change = Callable[[PolicyState, Document, Order, int], Document]


class RolloutChanges:
    """Orders of this worker's operators."""

    def __init__(self, changes: Changes, clock: Clock) -> None:
        self._changes = changes
        self._clock = clock

    async def plan(self, policy: str, wanted: RolloutPlan, expected: int, by: str) -> PolicyState:
        """Replace the plan that the next rollout goes by. Raises InvalidField, and as `Changes.amend`."""

        def change(state: PolicyState, document: Document) -> Document:
            returns_of(wanted, document.deployment)
            return replace(document, rollout=wanted)

        return await self._changes.amend(policy, expected, change, by)

    async def order(self, policy: str, name: OrderName, order: Order, expected: int | None, by: str) -> PolicyState:
        """Carry out an order. Raises MoveRefused, InvalidField, UnknownVersion, and as `Changes.amend`."""

        noted().told(f"{name} {order.version or ''}".rstrip(), "")  # also of an order that is refused

        def change(state: PolicyState, document: Document) -> Document:
            wanted = ORDERS[name](state, document, order, self._clock.event_ms())
            noted().told(_told(name, wanted, order), "")
            return wanted

        return await self._changes.amend(policy, expected, change, by)


def _told(name: OrderName, wanted: Document, order: Order) -> str:
    """What the audit log says of an order."""
    standing = wanted.standing
    subject = order.version or ("" if standing is None else standing.version)
    where = "" if standing is None or standing.version != subject else f" {standing.stage.value} {standing.weight:g}"
    return f"{name} {subject}{where}"


def _begin(state: PolicyState, document: Document, order: Order, now_ms: int) -> Document:
    version = _named(state, order)
    reason = order.reason or "begun"
    return begun(document, version, state.digest(version) or "", uuid4().hex[:12], reason, now_ms)


def _move(move: Move) -> Change:
    def change(state: PolicyState, document: Document, order: Order, now_ms: int) -> Document:
        return made(document, move, order.reason or "by hand", now_ms, _digest(state, document))

    return change


def _roll_back(state: PolicyState, document: Document, order: Order, now_ms: int) -> Document:
    """Back at once: out of the canary; out of the shadow; or the champion before it comes back."""
    stage = standing_of(document).stage
    move = Move.ROLL_BACK if stage is Stage.CANARY else Move.QUARANTINE
    return made(document, move, order.reason or "by hand", now_ms, _digest(state, document))


def _advance(state: PolicyState, document: Document, order: Order, now_ms: int) -> Document:
    """The next thing: out of the shadow, or the next step."""
    move = Move.TRY if standing_of(document).stage is Stage.SHADOW else Move.ADVANCE
    return made(document, move, order.reason or "by hand", now_ms)


def _weigh(state: PolicyState, document: Document, order: Order, now_ms: int) -> Document:
    if order.weight is None:
        raise InvalidField("say the share of units that the version should decide", "weight")
    return weighed(document, order.weight, order.reason or "by hand", now_ms)


def _quarantine(state: PolicyState, document: Document, order: Order, now_ms: int) -> Document:
    version = _named(state, order)
    return quarantined(document, version, state.digest(version) or "", order.reason or "by hand", now_ms)


ORDERS: Final[Mapping[OrderName, Change]] = {
    "begin": _begin,
    "advance": _advance,
    "promote": _move(Move.PROMOTE),
    "rollback": _roll_back,
    "withdraw": _move(Move.WITHDRAW),
    "pause": lambda state, document, order, now_ms: paused(document, order.reason),
    "resume": lambda state, document, order, now_ms: resumed(document, order.reason, now_ms),
    "weight": _weigh,
    "quarantine": _quarantine,
    "release": lambda state, document, order, now_ms: released(document, _named(state, order), order.reason),
}


def _named(state: PolicyState, order: Order) -> str:
    if order.version is None:
        raise InvalidField("say which version", "version")
    if order.version not in state.labels:
        raise UnknownVersion(f"there is no version {state.name}/{order.version}", "version")
    return order.version


def _digest(state: PolicyState, document: Document) -> str:
    return state.digest(standing_of(document).version) or ""
