"""Tier `replicated`: rows of one policy that are kept here and wait for Redis's replicas to have them, too. Pure but
for its timer.

Duty: hold the futures of such rows, let them wait no longer than they may, and say whether replication confirms at all,
so that nobody explores on a hope. Knows nothing of Redis, files or what is in a row; the shipper tells it.
Strategy: a table of three states. After a fault nothing is explored but rows still wait, since most faults are short;
once a row has waited in vain nobody waits any more, so that callers do not pile up behind a replica that is gone.
Promise: a row's future is done within `timeout_s` of its commit; it is done well only if replicas have the row.
"""

from __future__ import annotations

import asyncio
from collections import deque
from enum import StrEnum
from typing import NamedTuple

from policies.errors import Unconfirmed


class State(StrEnum):
    UNKNOWN = "unknown"  # at the start, or a call went wrong: not explored, but waited for
    CONFIRMING = "confirming"
    FAILING = "failing"  # a row waited in vain: nobody waits until replicas confirm again


class Move(StrEnum):
    CONFIRMED = "confirmed"
    DOUBT = "doubt"  # a call was not answered, or by too few replicas
    TIMEOUT = "timeout"


TABLE: dict[tuple[State, Move], State] = {
    (State.UNKNOWN, Move.CONFIRMED): State.CONFIRMING,
    (State.UNKNOWN, Move.DOUBT): State.UNKNOWN,
    (State.UNKNOWN, Move.TIMEOUT): State.FAILING,
    (State.CONFIRMING, Move.CONFIRMED): State.CONFIRMING,
    (State.CONFIRMING, Move.DOUBT): State.UNKNOWN,
    (State.CONFIRMING, Move.TIMEOUT): State.FAILING,
    (State.FAILING, Move.CONFIRMED): State.CONFIRMING,
    (State.FAILING, Move.DOUBT): State.FAILING,
    (State.FAILING, Move.TIMEOUT): State.FAILING,
}


class _Waiter(NamedTuple):
    until_s: float
    end: int
    committed: asyncio.Future[None]


class Confirmation:
    """One policy's. Use from the event loop's thread alone."""

    def __init__(self, loop: asyncio.AbstractEventLoop, timeout_s: float) -> None:
        self._loop = loop
        self._timeout_s = timeout_s
        self._waiting: deque[_Waiter] = deque()  # by `end`, and so by time
        self._timer: asyncio.TimerHandle | None = None
        self.state = State.UNKNOWN

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    def kept(self, end: int, committed: asyncio.Future[None]) -> None:
        """A row up to `end`, exclusive, is on this machine's disk."""
        if self.state is State.FAILING:
            _fail(committed, "Redis's replicas do not confirm at present; it is kept here and will be sent")
            return
        self._waiting.append(_Waiter(self._loop.time() + self._timeout_s, end, committed))
        if self._timer is None:
            self._timer = self._loop.call_at(self._waiting[0].until_s, self._expire)

    def confirmed(self, end: int) -> None:
        """Replicas have everything before `end`."""
        self.state = TABLE[self.state, Move.CONFIRMED]
        while self._waiting and self._waiting[0].end <= end:
            committed = self._waiting.popleft().committed
            if not committed.done():
                committed.set_result(None)

    def doubt(self) -> None:
        self.state = TABLE[self.state, Move.DOUBT]

    def refuse(self, end: int) -> None:
        """Rows before `end` will not be confirmed: Redis refuses them."""
        while self._waiting and self._waiting[0].end <= end:
            _fail(self._waiting.popleft().committed, "Redis refuses it; it is kept aside here")

    def close(self) -> None:
        """Nobody will confirm anything any more."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        while self._waiting:
            _fail(self._waiting.popleft().committed, "the service stops; it is kept here and will be sent")

    def _expire(self) -> None:
        self._timer = None
        now_s = self._loop.time()
        while self._waiting and self._waiting[0].until_s <= now_s:
            self.state = TABLE[self.state, Move.TIMEOUT]
            detail = f"no confirmation within {self._timeout_s:g} s; it is kept here and will be sent"
            _fail(self._waiting.popleft().committed, detail)
        if self._waiting:
            self._timer = self._loop.call_at(self._waiting[0].until_s, self._expire)


def _fail(committed: asyncio.Future[None], detail: str) -> None:
    if not committed.done():
        committed.set_exception(Unconfirmed(detail))
        committed.exception()  # seen: nobody needs to await it
