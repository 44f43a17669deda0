"""EDGE: one policy's calls of `limits.lua`, one at a time and in order. The commands go through `RedisStreams`.

    sf:{policy}:lim:k:<digest>  all  h:<holder>  memory

Duty: carry what was executed (tells), rows that wait for room, and the leases of portions, in as few calls as there can
be; say within 20 ms what came of a row. It knows nothing of rules or actions.
Strategy: one call in flight; what comes meanwhile goes with the next. A call that has not been answered in 20 ms is
overdue: until it ends, rows are denied at once and nobody waits. Calls are numbered, so that one which arrives late
reserves nothing; tells are numbered and sent again until answered, so that each is applied once. A row that asks about
a key waits, in its 20 ms, for the row before it under that key; what is told of that one goes ahead.
Promise: nothing here blocks; every wait has a deadline; at most MAX_TELLS wait. When one is dropped that Redis cannot
know of, Redis is told so, and denies until it would have left its window.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import msgspec
import structlog

from policies.errors import StoreAway
from safety.limits import LimitSet
from safety.places import Ask, Places
from service.clock import Clock
from service.limit_requests import Asked, Request, Room, described, together
from service.limit_tells import Tell, Tells, Used
from service.redis_streams import RedisStreams, base

log = structlog.get_logger(__name__)

SCRIPT: Final = (Path(__file__).parent / "limits.lua").read_bytes()
ANSWER_S: Final = 0.020  # design section 7
# A row's draw follows its reservation at once; who has not drawn by then must not, and counts as executed.
HOLD_S: Final = 1.0
LEASE_S: Final = 2.0
RENEW_S: Final = 0.5
HASTE_S: Final = 0.05  # a portion that is used up is not asked for more often than this
BACKOFF_S: Final = 0.05
# For so long Redis knows a key's last action. 31 days, as long as the longest window.
REMEMBER_S: Final = 31 * 86_400
CHUNK: Final = 512
MAX_ASKS: Final = 64
MAX_TELLS: Final = 50_000  # of some 300 bytes: 15 MB
FAILED: Final = "failed"

_encode = msgspec.msgpack.Encoder().encode


@dataclass(frozen=True, slots=True)
class CallStatistics:
    calls: int
    failures: int  # calls that Redis did not answer
    denied: int  # requests without an answer in time
    dropped: int  # tells
    waiting: int  # tells
    away: bool


@dataclass(slots=True)
class _Counts:
    calls: int = 0
    failures: int = 0
    denied: int = 0


@dataclass(slots=True)
class _Lease:
    places: Places
    ask: Ask


@dataclass(slots=True)
class _Call:
    """One call, as it was sent."""

    number: int
    requests: list[Request]
    leases: list[_Lease]
    sent_s: float
    untold: bool
    arguments: list[Any] = field(default_factory=list)


class LimitCalls:
    """Calls for one policy. Use from the event loop's thread only."""

    def __init__(self, streams: RedisStreams, policy: str, holder: str, clock: Clock, *, now_ms: int = 0) -> None:
        self.now_ms = now_ms  # 0: the server's time; a test may set another
        self.answer_s = ANSWER_S
        self.places: dict[str, Places] = {}
        self.limits = LimitSet()
        self._streams, self._base, self._holder, self._clock = streams, base(policy), holder, clock
        self._requests: list[Request] = []
        self._tells = Tells(MAX_TELLS)
        self._open: dict[str, tuple[str, float]] = {}  # by key: the row that is between answer and tell, until when
        self._sending: list[Tell | Used] = []  # with numbers from `_first` on
        self._first = 1
        self._number = 0
        self._leaving: list[Places] = []
        self._token = ""
        self._untold = False
        self._task: asyncio.Task[None] | None = None
        self._call_s: float | None = None  # since when a call is in flight
        self._retry_s = self._leased_s = float("-inf")
        self._closing = False
        self._counts = _Counts()

    def configure(self, limits: LimitSet) -> None:
        """Go by other limits from the next call on. Portions of limits that stay are kept."""
        self.limits = limits
        before, self.places = self.places, {}
        for limit in limits.leased:
            found = before.pop(limit.field, None)
            if found is not None:
                found.limit = limit
            self.places[limit.field] = found or Places(limit)
        self._leaving += before.values()
        self._leased_s = float("-inf")

    async def ask(self, limits: LimitSet, rows: list[list[object]], keys: list[str]) -> Asked:
        """Reserve for rows; keys: their digests. Gives an answer within `answer_s`, if only that there is none."""
        now_s = self._clock.monotonic_s()
        request = Request(limits, rows, keys, asyncio.get_running_loop().create_future())
        if self._overdue(now_s) or now_s < self._retry_s or len(self._requests) >= MAX_ASKS:
            self._counts.denied += 1
            return Asked(None, False, now_s)
        self._requests.append(request)
        self._start()
        try:
            rooms = await asyncio.wait_for(request.future, self.answer_s)
        except TimeoutError:
            rooms = None
        self._counts.denied += rooms is None
        return Asked(rooms, request.sent, request.sent_s)

    def tell_nowait(self, tells: Iterable[Tell]) -> None:
        """Queue what became of rows."""
        for tell in tells:
            if self._open.get(tell.key, ("",))[0] == tell.name:
                del self._open[tell.key]
            if not self._tells.put_nowait(tell):
                # What Redis has reserved counts as executed by itself, in time; of the rest it knows nothing.
                self._untold = self._untold or not tell.answered
        self._start()

    def hasten(self) -> None:
        """Renew leases soon: a portion is used up."""
        if self._clock.monotonic_s() - self._leased_s >= HASTE_S:
            self._leased_s = float("-inf")
            self._start()

    async def run_once(self) -> None:
        """Send what is due, and wait until Redis has answered or failed."""
        self._retry_s = float("-inf")
        self._start()
        if self._task is not None:
            await asyncio.wait({self._task})

    async def close(self) -> None:
        """Give portions back and tell everything, if Redis is there."""
        self._closing, self._leased_s = True, float("-inf")
        await self.run_once()

    def statistics(self) -> CallStatistics:
        counts = self._counts
        waiting, away = len(self._tells) + len(self._sending), self._retry_s > float("-inf")
        return CallStatistics(counts.calls, counts.failures, counts.denied, self._tells.dropped, waiting, away)

    # The loop

    def _overdue(self, now_s: float) -> bool:
        return self._call_s is not None and now_s - self._call_s > self.answer_s

    def _due(self, now_s: float) -> bool:
        # Also without portions: a Redis that lost its memory learns it from those who knew it before.
        beats = self.places or self._leaving or self.limits.asks_redis
        beat = beats and now_s - self._leased_s >= RENEW_S
        return bool(self._tells or self._sending or beat or any(self._ready(each, now_s) for each in self._requests))

    def _ready(self, request: Request, now_s: float) -> bool:
        """Whether no row before it is open under one of its keys."""
        return not any(now_s < self._open[key][1] for key in request.keys if key in self._open)

    def _start(self) -> None:
        now_s = self._clock.monotonic_s()
        if self._task is None and now_s >= self._retry_s and self._due(now_s):
            self._task = asyncio.get_running_loop().create_task(self._drain())
            self._task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._task = self._call_s = None
        if not task.cancelled():
            task.result()
            self._start()  # for what came after its last look

    async def _drain(self) -> None:
        while self._due(self._clock.monotonic_s()):
            call = self._build()
            self._call_s = call.sent_s
            self._counts.calls += 1
            try:
                reply = await self._streams.script(SCRIPT, self._base, *call.arguments)
            except Exception as error:  # redis-py raises odd things, too, when a connection goes under it
                if not isinstance(error, StoreAway):
                    log.error("limits_call_failed", error=repr(error))
                self._untold = self._untold or call.untold
                self._answer(call.requests, None)
                self._fail()
                return
            self._apply(call, reply)
            self._call_s = None

    def _fail(self) -> None:
        self._counts.failures += 1
        self._retry_s = self._clock.monotonic_s() + BACKOFF_S
        requests, self._requests = self._requests, []
        self._answer(requests, None)

    def _answer(self, requests: Sequence[Request], rooms: list[Room] | None) -> None:
        start = 0
        for each in requests:
            end = start + len(each.rows)
            if not each.future.done():  # somebody who waited too long
                each.future.set_result(None if rooms is None else rooms[start:end])
            start = end

    def _build(self) -> _Call:
        now_s = self._clock.monotonic_s()
        self._number += 1
        waiting = [each for each in self._requests if not each.future.done()]
        ready = [each for each in waiting if self._ready(each, now_s)]
        requests = together(ready)
        self._requests = [each for each in waiting if each not in requests]
        limits = requests[0].limits if requests else self.limits
        for each in requests:
            each.sent, each.sent_s = True, now_s
        keys = {key for each in requests for key in each.keys}
        self._sending += self._tells.take(keys, CHUNK - len(self._sending))
        leases = self._renewals(now_s)
        call = _Call(self._number, requests, leases, now_s, self._untold)
        self._untold = False
        whole = [*limits.strict, *(each.places.limit for each in leases)]
        body = [
            [described(each) for each in limits.keyed],
            [described(each) for each in whole],
            len(limits.strict),
            [each.wire(now_s) for each in self._sending],
            [row for each in requests for row in each.rows],
            [[len(limits.strict) + 1 + at, *each.ask] for at, each in enumerate(leases)],
            round(1000 * HOLD_S),
            round(1000 * LEASE_S),
            round(1000 * REMEMBER_S) if limits.remembers == "shared" else 0,
            call.untold,
        ]
        fresh = f"{self._holder}.{self._number}"
        call.arguments = [self._holder, call.number, self._first, self._token, fresh, self.now_ms, _encode(body)]
        return call

    def _renewals(self, now_s: float) -> list[_Lease]:
        if now_s - self._leased_s < RENEW_S:
            return []
        self._leased_s = now_s
        self._open = {key: each for key, each in self._open.items() if now_s < each[1]}
        leases = []
        for places, closing in [(each, self._closing) for each in self.places.values()] + [
            (each, True) for each in self._leaving
        ]:
            use, ask = places.ask(now_s, closing)
            if any(use):
                self._sending.append(Used(places.limit, *use))
            leases.append(_Lease(places, ask))
        return leases

    def _apply(self, call: _Call, reply: list[Any]) -> None:
        if reply[0] == b"STALE":  # a later call of ours was applied: there is none, but a clock may say so one day
            self._answer(call.requests, None)
            return
        self._token = reply[0].decode()
        self._first += len(self._sending)
        self._sending = []
        self._retry_s = float("-inf")
        self._answer(call.requests, [Room(int(row[0]), row[1].decode(), row[2:]) for row in reply[1]])
        for request in call.requests:
            if not request.future.cancelled():
                names = [str(row[0]) for row in request.rows]
                held = zip(names, request.keys, strict=True)
                self._open |= {key: (name, call.sent_s + HOLD_S) for name, key in held if key}
        for lease, (total, share) in zip(call.leases, reply[2], strict=True):
            lease.places.granted(lease.ask, total, None if share < 0 else share, call.sent_s, LEASE_S)
        self._leaving = [each for each in self._leaving if each.reserved or each.held]
