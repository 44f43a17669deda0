"""Too many questions at once: who waits, for how long, and what those are told who have waited in vain.

    arrives -> begin -> … -> done
            -> waits, unparsed -> begin, or refused at its deadline

Duty: between the hot routes and two pure parts, the waiting room and the gradient limit: the clock, the timer, the
deadline that a request names, metrics. It knows no HTTP but two headers, and nothing of decisions.
Strategy: a refusal costs as much as an empty answer, so what is too much costs least by waiting: nobody is refused
before its deadline, but for batches: they wait behind single questions, and for half of their time only while such
wait. Shadows are shown nothing from a quarter on: they are given up first, then batches, then questions. Rewards,
health, metrics and admin routes do not come here.
Promise: who is refused was never begun, so nothing of it is recorded; who was begun is `done` exactly once.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Mapping
from typing import Final, Literal, Protocol

import structlog

from policies.errors import BadTimeout, Overloaded, SurefootError
from service.clock import Clock
from service.limit_gradient import GradientLimit
from service.metrics import Metrics
from service.waiting_room import WaitingRoom

TIMEOUT: Final = "X-Request-Timeout-Ms"
ENVOYS: Final = "x-envoy-expected-rq-timeout-ms"
# A refusal may come so much late, and takes others along: timers are not made for each.
LOOK_EVERY_S: Final = 0.005
LOOK_AGAIN_S: Final = 0.02

log = structlog.get_logger(__name__)
Kind = Literal["act", "batch"]

_NAMES: Final = [(name.lower().encode(), name) for name in (TIMEOUT, ENVOYS)]
_MILLISECONDS: Final = re.compile(rb"[1-9]\d{0,8}")


class Guest(Protocol):
    """Who may have to wait."""

    @property
    def kind(self) -> Kind: ...
    @property
    def until_s(self) -> float:
        """When it is too late."""

    def begin(self) -> None:
        """Be decided now. `Overload.done` follows, now or later. Never raises."""

    def refuse(self, error: SurefootError) -> None:
        """Be told that it was in vain. Never raises."""


class Overload:
    """What a worker takes on. Use from the event loop's thread only."""

    def __init__(
        self,
        clock: Clock,
        metrics: Metrics,
        away: Callable[[], int] = lambda: 0,
        *,
        deadline_s: float,
        max_deadline_s: float,
        most: int,
    ) -> None:
        """most: rows that are decided at once, at the most. away: how many of them wait for a network elsewhere."""
        self._clock = clock
        self._metrics = metrics
        self._deadline_s = deadline_s
        self._max_deadline_s = max_deadline_s
        self._limit = GradientLimit(most)
        self._room: WaitingRoom[Guest] = WaitingRoom(self._limit.limit)
        self._timer: asyncio.TimerHandle | None = None
        self._look_at_s = 0.0
        self._away = away
        self._raised = False  # the room's limit is higher by those that are away
        self._admitting = False

    def time_for(self, headers: Mapping[bytes, bytes]) -> float:
        """How long a request may take, in seconds. Raises BadTimeout."""
        for raw, name in _NAMES:
            sent = headers.get(raw)
            if sent is not None:
                if not _MILLISECONDS.fullmatch(sent):
                    raise BadTimeout("send a whole number of milliseconds, 1 or more", name)
                return min(int(sent) / 1000, self._max_deadline_s)
        return self._deadline_s

    def enter(self, guest: Guest, now_s: float, size: int) -> None:
        """Begin with a guest, or have it wait."""
        if self._room.enter(guest, now_s, guest.until_s, size=size, low=guest.kind == "batch"):
            guest.begin()
            return
        if not self._admitting:
            self._admit()
        self._watch(now_s)

    def come(self, headers: Mapping[bytes, bytes], kind: Kind) -> Place:
        """Note when a request that is awaited has come. Raises BadTimeout."""
        return Place(self, kind, self._clock.monotonic_s(), self.time_for(headers))

    async def wait(self, place: Place, size: int) -> None:
        """Wait until a request may be begun with. Raises Overloaded."""
        self.enter(place, self._clock.monotonic_s(), size)
        try:
            await place.begun
        except asyncio.CancelledError:
            if not self._room.withdraw(place) and not place.begun.cancelled():
                self.done()
            raise

    def grow(self, units: int) -> None:
        """Say that who was begun with brings more rows than one."""
        self._room.grow(units)

    def done(self, units: int = 1) -> None:
        """Say that who was begun with is through. Others may begin."""
        self._room.leave(units)
        if (len(self._room) or self._raised) and not self._admitting:
            self._admit()

    def note(self, took_s: float) -> None:
        """Take what a decision has taken."""
        if self._limit.note(took_s, self._room.inside):
            self._fit()  # `done` follows, and lets in whom it can

    def withdraw(self, guest: Guest) -> None:
        """Forget a guest who has left, if it waits."""
        if len(self._room):
            self._room.withdraw(guest)

    def count_late(self, kind: Kind) -> None:
        """Count a request that was begun with and not decided in time."""
        self._metrics.shed.labels(kind, "late").inc()

    def pressed(self) -> bool:
        """Whether there is more to be done than can be: work that nobody waits for is to be left."""
        return len(self._room) > 0 and self._room.pressed(self._clock.monotonic_s())

    def refresh_metrics(self) -> None:
        now = self._room.statistics()
        self._metrics.concurrency_limit.set(now["limit"])
        self._metrics.deciding.set(now["inside"])
        self._metrics.waiting.set(now["waiting"])

    def statistics(self) -> dict[str, int]:
        return self._room.statistics()

    def _fit(self) -> None:
        """Set the room's limit: rows that wait for a network elsewhere keep nobody from being decided here."""
        away = self._away() if self._room.inside >= self._limit.limit else 0
        self._raised = away > 0
        self._room.limit = self._limit.limit + away

    def _admit(self) -> None:
        self._admitting = True  # who is begun with may be done before the next one is
        try:
            self._fit()
            while (guest := self._room.admit(self._clock.monotonic_s())) is not None:
                guest.begin()
        finally:
            self._admitting = False

    def _watch(self, now_s: float) -> None:
        due_s = self._room.next_deadline_s
        if due_s is None or (self._timer is not None and self._look_at_s <= due_s):
            return
        if self._timer is not None:
            self._timer.cancel()
        self._look_at_s = min(max(due_s, now_s + LOOK_EVERY_S), now_s + LOOK_AGAIN_S)
        self._timer = asyncio.get_running_loop().call_later(self._look_at_s - now_s, self.look)

    def look(self) -> None:
        """Refuse those whose time is up, and let in whom others have made room for by going elsewhere."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        now_s = self._clock.monotonic_s()
        for guest, reason in self._room.send_away(now_s):
            self._metrics.shed.labels(guest.kind, reason).inc()
            try:
                guest.refuse(Overloaded("there was no time for it before its deadline"))
            except Exception:  # one caller's trouble is not the others'
                log.exception("refusal_failed")
        if len(self._room) and not self._admitting:
            self._admit()
        self._watch(now_s)


class Place:
    """A request that somebody awaits. until_s: it is not decided later."""

    def __init__(self, overload: Overload, kind: Kind, now_s: float, time_s: float) -> None:
        self._overload = overload
        self.kind: Kind = kind
        self.until_s = now_s + time_s
        self.begun: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def begin(self) -> None:
        if self.begun.done():  # given up meanwhile
            self._overload.done()
        else:
            self.begun.set_result(None)

    def refuse(self, error: SurefootError) -> None:
        if not self.begun.done():
            self.begun.set_exception(error)
