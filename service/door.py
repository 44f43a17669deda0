"""EDGE: where connections come in; when several workers listen on one socket each takes its share.

Duty: accept, and leave to others what they should have. What becomes of a connection is uvicorn's.
Strategy: a worker that is alone takes all that wait. uvloop's own servers take one connection in each turn of the loop,
so that under load the last of a thousand callers is heard after a thousand batches. With others, an event loop that is
idle would take whatever waits: of 64 connections that a client opens at once one of two workers gets 58 to 64, and
keeps them. So while another one that listens has fewer by more than `SLACK`, a worker looks away for a moment. Whoever
has fewer is awake too, and takes it; if it is not (stopped, or busy), the connection is still there after the moment,
and is taken; then two, four, … as long as the other does not stir.
Promise: no connection is refused, or waits for long, because of a worker that does not answer.
"""

from __future__ import annotations

import asyncio
import errno
import socket
from collections.abc import Callable
from ssl import SSLContext
from typing import Any, Final, cast

import structlog

from service.boards import Board

SLACK: Final = 1
PATIENCE_S: Final = 0.005  # ten turns of a busy loop
AT_ONCE: Final = 256  # most that are taken after waiting in vain: 2,048 can wait at all
# As asyncio does: without descriptors nothing can be done until connections close.
EXHAUSTED_S: Final = 1.0
EXHAUSTED: Final = {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM}

log = structlog.get_logger(__name__)


class Door:
    """An asyncio server as far as uvicorn uses one. Use from the event loop's thread only."""

    def __init__(
        self,
        listener: socket.socket,
        protocol: type[asyncio.Protocol],
        options: dict[str, Any],
        ssl: SSLContext | None,
        mine: Board | None,
        others: list[Board],
    ) -> None:
        """protocol, options: what to make for each connection. mine: None where there are no others to tell."""
        self._listener = listener
        self._ssl = ssl
        self._mine = mine
        self._others = others
        self._loop = asyncio.get_running_loop()
        self._make = _counted(protocol, options, self._left)
        self._open_to_all = False
        self._opening: set[asyncio.Task[None]] = set()
        self._waiting: asyncio.TimerHandle | None = None
        self._connections = 0
        self._seen = 0  # what others had when this worker last looked away
        self._vain = 1  # how many it takes when they still have that

    def open(self) -> None:
        """Begin to accept."""
        self._listener.setblocking(False)
        self._open_to_all = True
        self._tell()
        self._loop.add_reader(self._listener, self._look)

    @property
    def connections(self) -> int:
        """How many are open."""
        return self._connections

    def close(self) -> None:
        """Accept nothing more. Others are not to wait for this worker. Safe to call twice."""
        self._loop.remove_reader(self._listener)
        if self._waiting is not None:
            self._waiting.cancel()
        self._open_to_all = False
        self._tell()

    async def wait_closed(self) -> None:
        """Wait for connections that are being opened."""
        await asyncio.gather(*self._opening)

    def _look(self) -> None:
        for _ in range(AT_ONCE):
            fewest, all_others = self._others_have()
            if self._connections > fewest + SLACK:
                self._seen = all_others
                self._rest(PATIENCE_S, self._look_again)
                return
            self._vain = 1
            if not self._take():
                return

    def _look_again(self) -> None:
        """Take what nobody wanted, the more the longer nobody wants any."""
        if self._others_have()[1] != self._seen:
            self._vain = 1
        for _ in range(self._vain):
            if not self._take():
                return
        self._vain = min(2 * self._vain, AT_ONCE)

    def _others_have(self) -> tuple[int, int]:
        """Count the connections of the one that has fewest, and of all."""
        found = [each.connections for each in self._others if each.listening]
        return min(found, default=self._connections), sum(found)

    def _take(self) -> bool:
        try:
            connection, _ = self._listener.accept()
        except OSError as error:
            if error.errno in EXHAUSTED:
                log.error("no_more_connections", error=error.strerror)
                self._rest(EXHAUSTED_S, self._look)
            return False  # another worker was faster, or the client has gone
        connection.setblocking(False)
        self._connections += 1
        self._tell()
        task = self._loop.create_task(self._open(connection))
        self._opening.add(task)
        task.add_done_callback(self._opening.discard)
        return True

    async def _open(self, connection: socket.socket) -> None:
        try:
            await self._loop.connect_accepted_socket(self._make, connection, ssl=self._ssl)
        except (OSError, asyncio.CancelledError):  # no handshake; TLS errors are OSErrors
            connection.close()
            self._left()

    def _rest(self, seconds: float, then: Callable[[], object]) -> None:
        def resume() -> None:
            self._waiting = None
            self._loop.add_reader(self._listener, self._look)
            then()

        if self._waiting is None:
            self._loop.remove_reader(self._listener)
            self._waiting = self._loop.call_later(seconds, resume)

    def _left(self) -> None:
        self._connections -= 1
        self._tell()

    def _tell(self) -> None:
        if self._mine is not None:
            self._mine.listen(self._connections if self._open_to_all else None)


def _counted(
    protocol: type[asyncio.Protocol], options: dict[str, Any], left: Callable[[], None]
) -> Callable[[], asyncio.Protocol]:
    """Make a factory of protocols that say when their connection has ended."""

    def connection_lost(self: Any, exc: Exception | None) -> None:
        protocol.connection_lost(self, exc)
        left()

    counted = cast(type[Any], type("Counted", (protocol,), {"connection_lost": connection_lost}))
    return lambda: cast(asyncio.Protocol, counted(**options))
