"""EDGE: a connection that does not come to the end of its headers is cut, as one that never ends its body gets 408.

Duty: what uvicorn leaves open: from the first byte of a request (or from the connection, for its first) until its
headers are whole, a client has `SUREFOOT_BODY_TIMEOUT_S`. Idle connections between requests are uvicorn's
`timeout_keep_alive`.
Strategy: one timer per connection, armed and disarmed by the parser's own callbacks; nothing is done for each byte.
Promise: no client holds a descriptor open by sending its headers slowly, or not at all.
"""

from __future__ import annotations

import asyncio
from typing import Any, ClassVar

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

ANSWER = b"HTTP/1.1 408 Request Timeout\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"


class Watched(HttpToolsProtocol):
    """uvicorn's protocol, with an eye on the time that headers take."""

    head_timeout_s: ClassVar[float] = 5.0
    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._arm()

    def connection_lost(self, exc: Exception | None) -> None:
        self._disarm()
        super().connection_lost(exc)

    def on_message_begin(self) -> None:
        self._arm()
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self._disarm()
        super().on_headers_complete()

    def _arm(self) -> None:
        self._disarm()
        self._timer = self.loop.call_later(self.head_timeout_s, self._cut)

    def _disarm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _cut(self) -> None:
        self._timer = None
        if not self.transport.is_closing():
            self.transport.write(ANSWER)
            self.transport.close()


def watching(timeout_s: float) -> type[Watched]:
    """Make the protocol class that uvicorn is given."""
    return type("Watching", (Watched,), {"head_timeout_s": timeout_s})
