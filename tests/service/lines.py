"""Connections to the hot routes in process: real sockets, uvicorn's protocol or the service's own, no server around it.

Ids and the clock are the same in every run (`asking.py`), so answers of two protocols can be compared byte for byte.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import uvicorn
import uvloop
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.server import ServerState

from service.body import respond
from service.hot import HotRoutes
from service.short_way import answering
from tests.service.asking import Desk, desk, planned

BODY = b'{"state":[0.5,-1.0,2.0]}'
DATE = b"Sat, 21 Nov 2026 10:00:00 GMT"
WAIT_S = 10.0


def request(path: str = "/v1/act", body: bytes = BODY, *headers: str, method: str = "POST") -> bytes:
    """A request in bytes, with the length of its body."""
    lines = [f"{method} {path} HTTP/1.1", "Host: here", f"Content-Length: {len(body)}", *headers]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


@dataclass
class Worker:
    """What a protocol sees of a worker."""

    hot: HotRoutes
    draining: bool = False


@dataclass
class Front:
    """A worker's connections."""

    desk: Desk
    worker: Worker
    state: ServerState
    make: Callable[[], HttpToolsProtocol]
    clients: list[Client] = field(default_factory=list)

    async def connect(self, send_buffer: int | None = None) -> Client:
        """Open a connection. send_buffer: of the server, in bytes."""
        mine, theirs = socket.socketpair()
        if send_buffer is not None:
            theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)
        for each in (mine, theirs):
            each.setblocking(False)
        await asyncio.get_running_loop().connect_accepted_socket(self.make, theirs)
        made = Client(mine)
        self.clients.append(made)
        return made

    @property
    def recorded(self) -> int:
        """How many decisions the ledger holds."""
        return sum(row.count for row in self.desk.ledger.register("toy").window)


@dataclass
class Client:
    """The other end of a connection."""

    socket: socket.socket
    got: bytes = b""

    async def send(self, data: bytes) -> None:
        await asyncio.get_running_loop().sock_sendall(self.socket, data)

    async def answer(self) -> bytes:
        """Read one answer, head and body."""
        while True:
            head, found, rest = self.got.partition(b"\r\n\r\n")
            if found:
                lengths = [
                    int(line[15:]) for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")
                ]
                length = lengths[0] if lengths else 0
                if len(rest) >= length:
                    self.got = rest[length:]
                    return head + found + rest[:length]
            if not await self.more():
                return self.got

    async def ask(self, data: bytes) -> bytes:
        await self.send(data)
        return await self.answer()

    async def more(self) -> bool:
        """Read what there is; false: the server has closed."""
        async with asyncio.timeout(WAIT_S):
            data = await asyncio.get_running_loop().sock_recv(self.socket, 1 << 20)
        self.got += data
        return bool(data)

    async def rest(self) -> bytes:
        """Read until the server closes."""
        while await self.more():
            pass
        found, self.got = self.got, b""
        return found

    def leave(self) -> None:
        self.socket.close()


@asynccontextmanager
async def front(
    short: bool = True, limit_s: float = 5.0, token: str | None = None, most: int = 256, **settings: Any
) -> AsyncIterator[Front]:
    """Make a worker's HTTP side. short: with the short way, otherwise uvicorn as it is. most: decided at once."""
    with desk(planned((3,)), token, most) as found:
        found.routes.body_timeout_s = limit_s
        worker = Worker(found.routes)

        async def app(scope: Any, receive: Any, send: Any) -> None:
            if scope["path"] in found.routes.paths:
                await found.routes(scope, receive, send)
            else:
                await respond(send, 200, b'{"elsewhere":true}')

        protocol = answering(lambda: worker, limit_s) if short else HttpToolsProtocol
        options = {"timeout_keep_alive": 75} | settings
        config = uvicorn.Config(
            app, http=protocol, ws="none", lifespan="off", log_config=None, access_log=False, **options
        )
        config.load()
        state = ServerState()
        state.default_headers = [(b"date", DATE)]
        made = Front(found, worker, state, lambda: protocol(config, state, {}))
        try:
            yield made
        finally:
            for client in made.clients:
                client.leave()
            await until(lambda: not state.connections)


async def until(condition: Callable[[], object]) -> None:
    """Let the loop turn until something holds."""
    async with asyncio.timeout(WAIT_S):
        while not condition():
            await asyncio.sleep(0)


async def turns() -> None:
    """Let the loop turn a few times: what was sent in process has been read by then."""
    for _ in range(8):
        await asyncio.sleep(0)


def run(work: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Run a test on the loop that serves."""
    uvloop.run(work())
