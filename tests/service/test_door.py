"""A worker that is alone takes all connections that wait, whatever else it does between two turns of its loop."""

from __future__ import annotations

import asyncio
import socket
from contextlib import ExitStack

import uvloop

from service.door import AT_ONCE, Door

CALLERS = 2 * AT_ONCE


class Greeter(asyncio.Protocol):
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport  # which nobody else holds
        transport.write(b"!")  # type: ignore[attr-defined]


def test_all_that_wait_are_taken_at_once() -> None:
    async def work() -> None:
        with ExitStack() as stack:
            listener = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=2048))
            callers = [stack.enter_context(socket.create_connection(listener.getsockname())) for _ in range(CALLERS)]
            door = Door(listener, Greeter, {}, None, None, [])
            door.open()
            stack.callback(door.close)
            turns = 0
            while door.connections < CALLERS:
                turns += 1
                assert turns <= 10, "one in each turn"
                await asyncio.sleep(0)
            await door.wait_closed()
            for caller in callers:
                caller.setblocking(False)
                assert await asyncio.get_running_loop().sock_recv(caller, 1) == b"!"
            for caller in callers:
                caller.close()
            while door.connections:
                await asyncio.sleep(0)
            door.close()
            door.close()

    uvloop.run(work())
