"""Row 16: clients that go away in the middle of a request, and clients that never come to its end."""

from __future__ import annotations

import json
import socket
import struct
import time
from pathlib import Path

from tests.faults.journal import Act
from tests.faults.policy import some_request
from tests.faults.report import Report, Row, Settings
from tests.faults.world import World, world
from tests.waiting import until

RST = struct.pack("ii", 1, 0)
BODY_TIMEOUT_S = 1.0


def going_away(settings: Settings) -> Report:
    """Reset connections after the headers, after half a body, and before the answer."""
    with world(settings) as here:
        with here.play(rate=settings.either(60, 100)) as game:
            game.more(20)
            before = _descriptors(here)
            for number in range(settings.count(150, 3000)):
                _go_away(here, number)
            game.more(20)
        # Sockets of the players are closed by now; those of the others must be.
        until(lambda: _descriptors(here) <= before, "the descriptors of clients that went away")
        report = Report(16, "clients that reset", here.settle())
        _as_promised(report, here)
        unanswered = [token for token in here.journal.acts if token[0].startswith("gone-")]
        report.notes.append(f"{len(unanswered)} whole requests without a listener, each decided once at most")
    return report


def _go_away(here: World, number: int) -> None:
    request = some_request(here.settings.chance)
    token = (f"gone-{number}", 0)
    body = json.dumps({"policy": here.policy, "episode": token[0], "step": 0, **request}).encode()
    head = f"POST /v1/act HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    kind = number % 3
    if kind == 2:
        here.journal.acts[token] = Act(request, time.monotonic())
    with socket.create_connection(("127.0.0.1", here.replicas[0].port)) as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RST)
        connection.sendall(head + (b"", body[: len(body) // 2], body)[kind])


def _descriptors(here: World) -> int:
    (pid,) = here.replicas[0].workers
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))


def slow_bodies(settings: Settings) -> Report:
    """500 clients send their headers and never their body: they are cut, and nobody else notices."""
    many = settings.count(100, 500)
    with world(settings, body_timeout_s=str(BODY_TIMEOUT_S)) as here:
        with here.play(rate=settings.either(60, 100)) as game:
            game.more(20)
            before = _descriptors(here)
            held = [socket.create_connection(("127.0.0.1", here.replicas[0].port), timeout=30.0) for _ in range(many)]
            for connection in held:
                connection.sendall(b"POST /v1/act HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
            answers = [connection.recv(4096).split(b"\r\n")[0] for connection in held]
            for connection in held:
                connection.close()
            game.more(20)
        until(lambda: _descriptors(here) <= before, "the descriptors of slow clients")
        report = Report(16, f"{many} slow bodies", here.settle())
        cut = sum(b" 408 " in answer for answer in answers)
        report.expect(cut == many, f"{cut} of {many} slow clients got 408")
        _as_promised(report, here)
        report.notes.append(f"{cut} cut with 408")
    return report


def _as_promised(report: Report, here: World) -> None:
    failed = here.journal.failed()
    report.expect(not failed, f"{len(failed)} calls of others failed: {failed[:3]}")
    report.expect("request_failed" not in here.replicas[0].log, "a request failed inside")


ROWS = (Row(16, "clients that reset", going_away), Row(16, "slow bodies", slow_bodies, in_tests=False))
