"""Print what HTTP costs a worker for one decision: `python -m tests.service.measure_http`.

In µs of processor time of the event loop's thread, the best of many rounds: bytes in, bytes out, without a socket.
`empty` is an ASGI application that answers `{}` under the same uvicorn, `short` the short way of `POST /act`, `long`
the same questions through ASGI. The pipeline is left out: every row has its outcome at once.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from typing import Any

import uvicorn
import uvloop
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.server import ServerState

from loadtests.yardsticks import empty
from service.coalesce import Done
from service.plan import Outcome, Row
from service.short_way import answering
from tests.service.asking import desk, planned
from tests.service.lines import DATE, Worker, request

CONNECTIONS = 16
ROUNDS = 400
BODY = b'{"policy":"toy","state":[0.12,0.34,-0.5,0.25,1.5,-2.25,0.125,0.75]}'
DATA = request("/v1/act", BODY, "Content-Type: application/json")


class Answers:
    """How many have been written."""

    def __init__(self) -> None:
        self.count = 0


class Wire(asyncio.Transport):
    """The other end of a connection, which reads everything at once."""

    def __init__(self, answers: Answers) -> None:
        super().__init__()
        self._answers = answers

    def write(self, data: Any) -> None:
        self._answers.count += data.startswith(b"HTTP/1.1 200")

    def is_closing(self) -> bool:
        return False


async def cost_us(app: Any, protocol: type[HttpToolsProtocol]) -> float:
    """The best of the rounds, for one request."""
    fixed = {"ws": "none", "lifespan": "off", "log_config": None, "access_log": False, "proxy_headers": False}
    config = uvicorn.Config(app, http=protocol, **fixed)  # type: ignore[arg-type]
    config.load()
    state, answers = ServerState(), Answers()
    state.default_headers = [(b"date", DATE)]
    lines = [protocol(config, state, {}) for _ in range(CONNECTIONS)]
    for line in lines:
        line.connection_made(Wire(answers))
    best = float("inf")
    for turn in range(1, ROUNDS + 1):
        began_s = time.thread_time()
        for line in lines:
            line.data_received(DATA)
        while answers.count < turn * CONNECTIONS:
            await asyncio.sleep(0)
        best = min(best, time.thread_time() - began_s)
    for line in lines:
        line.connection_lost(ConnectionResetError())
    return best / CONNECTIONS * 1e6


def at_once(outcome: Outcome) -> Callable[[Sequence[Row], Done, float], None]:
    return lambda rows, done, deadline_s: done([outcome] * len(rows))


async def main() -> None:
    with desk(planned((8,))) as found:
        (outcome,) = await found.coalescer.submit([Row(state=[0.0] * 8)])
        found.coalescer.put = at_once(outcome)  # type: ignore[method-assign,assignment]
        short = answering(lambda: Worker(found.routes), 5.0)
        measured = {
            "empty": await cost_us(empty, HttpToolsProtocol),
            "short": await cost_us(found.routes, short),
            "long": await cost_us(found.routes, HttpToolsProtocol),
        }
    for name, cost in measured.items():
        print(f"{name:6} {cost:5.1f} µs  {cost / measured['empty']:5.2f} × empty")  # noqa: T201


if __name__ == "__main__":
    uvloop.run(main())
