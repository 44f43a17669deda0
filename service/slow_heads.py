"""EDGE: how long a connection may keep a worker waiting: for a head, for a body below ASGI, between requests.

Duty: what uvicorn leaves open: from the first byte of a request (or from the connection, for its first) until its
headers are whole, a client has `SUREFOOT_BODY_TIMEOUT_S`, and as long again for a body below ASGI (`short_way.py`).
Idle connections are closed after uvicorn's `timeout_keep_alive`.
Strategy: in a request that comes in one piece no timer is touched. One is armed when bytes end in the middle of
something; one for each connection looks after idleness, and when it rings too early it is set again for the rest.
Promise: no client holds a descriptor open by sending its headers slowly, or not at all.
"""

from __future__ import annotations

import asyncio
from typing import Any, ClassVar, Final

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

ANSWER: Final = b"HTTP/1.1 408 Request Timeout\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"

NOTHING: Final = 0
HEAD: Final = 1
BODY: Final = 2


class Watched(HttpToolsProtocol):
    """uvicorn's protocol, with an eye on what it waits for."""

    limit_s: ClassVar[float] = 5.0

    def __init__(self, *given: Any, **named: Any) -> None:
        super().__init__(*given, **named)
        self._awaited = HEAD  # what is coming, as far as its time is watched here
        self._timer: asyncio.TimerHandle | None = None
        self._idle_timer: asyncio.TimerHandle | None = None
        self._idle_since_s = 0.0

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._arm()

    def connection_lost(self, exc: Exception | None) -> None:
        self._awaits(NOTHING)
        if self._idle_timer is not None:
            self._idle_timer.cancel()
            self._idle_timer = None
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._awaited and self._timer is None:  # it ended in the middle
            self._arm()

    def on_response_complete(self) -> None:
        """As uvicorn's, but for its timer."""
        if self.pipeline:
            super().on_response_complete()
            return
        self.server_state.total_requests += 1
        if self.transport.is_closing():
            return
        self.flow.resume_reading()
        self._idle_since_s = self.loop.time()
        if self._idle_timer is None:
            self._idle_timer = self.loop.call_later(self.timeout_keep_alive, self._close_if_idle)

    def _awaits(self, what: int) -> None:
        """Say what is coming now. What was before has come."""
        self._awaited = what
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _arm(self) -> None:
        self._timer = self.loop.call_later(self.limit_s, self._late)

    def _late(self) -> None:
        self._timer = None
        if self._awaited == BODY:
            self._late_body()
        elif not self.transport.is_closing():
            self.transport.write(ANSWER)
            self.transport.close()

    def _late_body(self) -> None:
        """A body below ASGI has not come in time."""

    def _close_if_idle(self) -> None:
        self._idle_timer = None
        if self.transport.is_closing():
            return
        busy = self._awaited or not (self.cycle is None or self.cycle.response_complete)
        rest_s = self.timeout_keep_alive if busy else self._idle_since_s + self.timeout_keep_alive - self.loop.time()
        if rest_s > 0:
            self._idle_timer = self.loop.call_later(rest_s, self._close_if_idle)
        else:
            self.transport.close()
