"""A service with far more callers than it can answer in their time: by counts and order, at any pace."""

from __future__ import annotations

import asyncio
import json
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest
import redis

from tests.conftest import Server, new_server
from tests.service.lines import request
from tests.waiting import until

STATE = b'{"state":[0.01,-0.02,0.03,0.04]}'
ADMIN = "the-token-of-an-operator-of-this-test"
CALLERS = 300
ASKED_EACH = 12
# Nobody can answer 300 callers within so little; each caller gives up on its first try and again.
HASTY = request("/v1/act", STATE, "X-Request-Timeout-Ms: 5")
PATIENT = request("/v1/act", STATE, "X-Request-Timeout-Ms: 10000")


@dataclass
class Seen:
    """What all callers were answered."""

    statuses: Counter[int] = field(default_factory=Counter)
    decisions: list[str] = field(default_factory=list)
    refused: list[bytes] = field(default_factory=list)


async def read(reader: asyncio.StreamReader) -> tuple[int, bytes, bytes]:
    head = await reader.readuntil(b"\r\n\r\n")
    found = re.search(rb"content-length: (\d+)", head)
    assert found is not None
    return int(head[9:12]), head, await reader.readexactly(int(found[1]))


async def call(port: int, seen: Seen, number: int) -> None:
    """Ask again and again on one connection; every fourth caller has time."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    for _ in range(ASKED_EACH):
        writer.write(PATIENT if number % 4 == 0 else HASTY)
        status, head, body = await read(reader)
        seen.statuses[status] += 1
        if status == 200:
            answer = json.loads(body)
            assert answer["logged"], "recorded before it is answered"
            seen.decisions.append(answer["decision_id"])
        else:
            assert json.loads(body)["code"] == "overloaded"
            seen.refused.append(head)
    writer.close()


async def look(url: str, over: asyncio.Event) -> int:
    """Ask what must always answer, until the others are through. Gives how often."""
    looks = 0
    async with httpx.AsyncClient(base_url=url, timeout=10.0) as client:
        while not over.is_set():
            for path in ("/health/live", "/health/ready", "/metrics", "/admin/policies"):
                found = await client.get(path, headers={"Authorization": f"Bearer {ADMIN}"})
                assert found.status_code == 200, (path, found.text)
                looks += 1
    return looks


async def crowd(server: Server, seen: Seen) -> int:
    over = asyncio.Event()
    looking = asyncio.create_task(look(server.url, over))
    await asyncio.gather(*(call(server.port, seen, number) for number in range(CALLERS)))
    over.set()
    return await looking


@pytest.mark.parametrize("workers", [1, 2])
def test_far_too_many_callers_are_answered_or_refused_and_the_log_holds_just_the_answered(
    tmp_path: Path, workers: int
) -> None:
    server = new_server(tmp_path, max_concurrency="8", admin_token=ADMIN, workers=str(workers))
    server.start()
    try:
        seen = Seen()
        looks = asyncio.run(crowd(server, seen))
        assert looks >= 4
        assert seen.statuses.total() == CALLERS * ASKED_EACH
        assert set(seen.statuses) == {200, 503}
        assert all(b"\r\nretry-after: 1\r\n" in head for head in seen.refused)
        assert len(set(seen.decisions)) == len(seen.decisions) >= CALLERS // 4 * ASKED_EACH
        for _ in range(20):
            answer = httpx.post(f"{server.url}/v1/act", content=STATE)
            assert answer.status_code == 200, "it is over at once"
            seen.decisions.append(answer.json()["decision_id"])
        with redis.Redis.from_url(server.redis_url) as client:
            until(lambda: client.zcard("sf:{cartpole}:due") >= len(seen.decisions), "the log to be shipped")
            assert {each.decode() for each in client.zrange("sf:{cartpole}:due", 0, -1)} == set(seen.decisions)
        text = httpx.get(f"{server.url}/metrics").text
        assert total(text, "surefoot_shed_requests_total") == seen.statuses[503]
        assert total(text, "surefoot_decisions_total") == len(seen.decisions)

        def busy() -> float:  # what the other worker counts is told now and then
            now = httpx.get(f"{server.url}/metrics").text
            return total(now, "surefoot_waiting_requests") + total(now, "surefoot_deciding_rows")

        until(lambda: busy() == 0, "both workers to say that nobody waits")
    finally:
        assert server.stop() == 0


def total(metrics: str, name: str) -> float:
    return sum(map(float, re.findall(rf"^{name}(?:\{{[^}}]*\}})? (\S+)$", metrics, re.MULTILINE)))
