"""Row 17: far more callers than can be answered in their time."""

from __future__ import annotations

import asyncio
import json
import random
import re
import time
from collections import Counter
from dataclasses import dataclass, field

from tests.faults.journal import Act
from tests.faults.policy import some_request
from tests.faults.report import Report, Row, Settings
from tests.faults.world import World, world

HASTE_MS = 30  # what three of four callers give a question: less than their turn takes to come
PATHS = (b"/health/live", b"/health/ready", b"/metrics")


@dataclass
class Crowd:
    """Callers who ask again as soon as they are answered, and what they were told."""

    here: World
    until_s: float
    statuses: Counter[int] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    looks: list[float] = field(default_factory=list)  # how long each look at what must always answer took

    async def gather(self, callers: int) -> None:
        port, seeds = self.here.replicas[0].port, self.here.settings.chance
        chances = [random.Random(seeds.random()) for _ in range(callers)]
        calls = [self._call(port, number, chance) for number, chance in enumerate(chances)]
        await asyncio.gather(self._look(port), *calls)

    async def _call(self, port: int, number: int, chance: random.Random) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        asked = 0
        while time.monotonic() < self.until_s:
            token, request = (f"crowd-{number}-{asked}", 0), some_request(chance)
            asked += 1
            fields = {"policy": self.here.policy, "episode": token[0], "step": 0, "include": ["distribution"]}
            body = json.dumps(fields | request).encode()
            haste = b"" if number % 4 == 0 else b"X-Request-Timeout-Ms: %d\r\n" % HASTE_MS
            act = self.here.journal.acts[token] = Act(request, time.monotonic())
            head = b"POST /v1/act HTTP/1.1\r\nHost: x\r\n%bContent-Length: %d\r\n\r\n" % (haste, len(body))
            writer.write(head + body)
            status, head, answer = await _read(reader)
            self.statuses[status] += 1
            if status == 200:
                act.here_s, act.answer = time.monotonic(), json.loads(answer)
                continue
            del self.here.journal.acts[token]  # so that it would be unexpected, were it recorded
            if status != 503 or b"retry-after: 1" not in head or json.loads(answer)["code"] != "overloaded":
                self.wrong.append(f"{status} {answer[:200]!r}")
        writer.close()

    async def _look(self, port: int) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        while time.monotonic() < self.until_s:
            for path in PATHS:
                began_s = time.monotonic()
                writer.write(b"GET %b HTTP/1.1\r\nHost: x\r\n\r\n" % path)
                status, _, answer = await _read(reader)
                self.looks.append(time.monotonic() - began_s)
                if status != 200:
                    self.wrong.append(f"{path!r}: {status} {answer[:200]!r}")
        writer.close()


async def _read(reader: asyncio.StreamReader) -> tuple[int, bytes, bytes]:
    head = (await reader.readuntil(b"\r\n\r\n")).lower()
    found = re.search(rb"content-length: (\d+)", head)
    assert found is not None, head
    return int(head[9:12]), head, await reader.readexactly(int(found[1]))


def overload(settings: Settings) -> Report:
    """Callers who do not wait for better times."""
    callers, seconds = settings.count(200, 1000), settings.either(2.0, 20.0)
    with world(settings, max_concurrency="64") as here:
        with here.play(rate=settings.either(20, 40)) as game:
            game.more(10)
        crowd = Crowd(here, time.monotonic() + seconds)
        asyncio.run(crowd.gather(callers))
        with here.play(rate=settings.either(20, 40)) as game:  # all is well at once
            game.more(10)
        report = Report(17, "overload", here.settle())
        answered, refused = crowd.statuses[200], crowd.statuses[503]
        report.expect(not crowd.wrong, f"{len(crowd.wrong)} answers are wrong: {crowd.wrong[:3]}")
        report.expect(not here.journal.failed(), f"calls failed before or after: {here.journal.failed()[:3]}")
        report.expect(bool(answered and refused and crowd.looks), f"{crowd.statuses}, {len(crowd.looks)} looks")
        report.expect("request_failed" not in here.replicas[0].log, "a request failed inside")
    slowest_ms = 1000 * sorted(crowd.looks)[int(0.99 * len(crowd.looks))]
    report.notes.append(
        f"{callers} callers: {answered / seconds:.0f} answered a second, {refused / seconds:.0f} refused; "
        f"health and metrics within {slowest_ms:.0f} ms (p99)"
    )
    return report


ROWS = (Row(17, "overload", overload),)
