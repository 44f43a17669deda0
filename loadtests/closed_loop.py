"""So many requests over so many kept connections, each answer waited for, all answers kept.

Duty: ask a fixed number of times, and give what was answered, in order: for whoever needs the answers, as rewards need
the ids of decisions, or a server in a known state. Throughput is measured by wrk, latency by `open_loop.py`: this
driver's own time is neither small nor counted.
Promise: an answer for every request, or RuntimeError.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

PATIENCE_S = 60.0  # for one answer


@dataclass(frozen=True, slots=True)
class Answer:
    status: int
    body: bytes


def ask(port: int, requests: Sequence[bytes], connections: int) -> list[Answer]:
    """Ask a server on loopback. Raises RuntimeError when it leaves a request without an answer."""
    return asyncio.run(_ask(port, requests, connections))


async def _ask(port: int, requests: Sequence[bytes], connections: int) -> list[Answer]:
    answers: list[Answer | None] = [None] * len(requests)
    waiting = iter(enumerate(requests))

    async def caller() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        try:
            for index, request in waiting:
                writer.write(request)
                answers[index] = await asyncio.wait_for(_answer(reader), PATIENCE_S)
        finally:
            writer.close()

    try:
        await asyncio.gather(*(caller() for _ in range(min(connections, len(requests)))))
    except (OSError, TimeoutError, ValueError, asyncio.IncompleteReadError) as error:
        raise RuntimeError(f"a request was left without an answer: {error!r}") from error
    return [answer for answer in answers if answer is not None]


async def _answer(reader: asyncio.StreamReader) -> Answer:
    head = await reader.readuntil(b"\r\n\r\n")
    at = head.lower().index(b"\r\ncontent-length:")
    length = int(head[at + 17 : head.index(b"\r\n", at + 2)])
    return Answer(int(head[9:12]), await reader.readexactly(length))
