"""Bringing a server to a size: so many versions, pending decisions or keys, through its own doors. EDGE: HTTP.

Duty: real versions that were pushed, checked and loaded; real decisions that were answered, recorded and shipped to the
join. Nothing is ever written behind the service's back.
Promise: when `fill` returns, the service itself says that it has as many; where that cannot be, RuntimeError.
"""

from __future__ import annotations

import io
import json
import tarfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from loadtests import bodies, closed_loop
from loadtests.closed_loop import Answer
from loadtests.growth_cases import Series
from loadtests.measuring import settle
from loadtests.networks import POLICY, SMALL, WATCHES, write_version
from loadtests.servers import ADMIN_TOKEN, Running, post

Say = Callable[[str], None]

CONNECTIONS = 4
ROWS = 512  # of a request, where rows do not wait for Redis
# One call reserves for all rows of a request, within the 20 ms after which a limit that was not answered denies.
LIMITED_ROWS = 16
ROUND = 65_536  # decisions between two looks
SHIPPED_S = 120.0
SEEN_S = 60.0
LOOK_EVERY_S = 0.1
TRIES = 20


def fill(server: Running, series: Series, size: int, folder: Path, say: Say) -> None:
    """Bring a server to a size. Raises RuntimeError or OSError."""
    if series.kind == "versions":
        push(server, size, folder, say)
    elif series.kind == "pending":
        decide(server, size, say)
    elif series.kind == "keys":
        track(server, size, say)


def push(server: Running, versions: int, folder: Path, say: Say) -> None:
    """Push versions until so many are loaded."""
    headers = {"Content-Type": "application/x-tar", "Authorization": f"Bearer {ADMIN_TOKEN}"}
    for number in range(2, versions + 1):
        label = f"v{number}"
        write_version(folder / label, SMALL, label, WATCHES + number)
        status, text = post(server.port, f"/admin/policies/{POLICY}/versions", _tar(folder / label), headers)
        if status != 201:
            raise RuntimeError(f"version {label} was answered {status}: {text[:500]}")
        if number % 10 == 0:
            say(f"    {number} versions of {versions}")
    _seen(server, "surefoot_loaded_versions", versions)


def decide(server: Running, pending: int, say: Say) -> None:
    """Decide, and reward nothing, until so many decisions wait in the join."""
    there = 0
    while there < pending:
        asked = bodies.batches(SMALL, min(ROWS, pending - there))
        count = max(1, min(ROUND, pending - there) // asked.rows)
        answers = closed_loop.ask(
            server.port, [asked.requests()[i % len(asked.bodies)] for i in range(count)], CONNECTIONS
        )
        _decided(answers)
        settle(server, SHIPPED_S)
        there = _seen(server, "surefoot_pending_decisions", there + count * asked.rows)
        say(f"    {there:,} decisions wait, of {pending:,}")


def track(server: Running, keys: int, say: Say) -> None:
    """Decide under each key once, until the limit has counted each of them."""
    waiting = [f"k{i}" for i in range(keys)]
    for _ in range(TRIES):
        denied: list[str] = []
        for start in range(0, len(waiting), ROUND):
            denied += _under(server, waiting[start : start + ROUND])
            say(f"    {min(start + ROUND, len(waiting)):,} keys of {len(waiting):,}, {len(denied):,} to ask again")
        waiting = denied
        if not waiting:
            settle(server, SHIPPED_S)
            return
    raise RuntimeError(f"{len(waiting)} of {keys} keys are denied again and again: Valkey answers too late")


def _under(server: Running, keys: Sequence[str]) -> list[str]:
    """Ask for a decision under each key. Gives those that fell back, so that nothing was counted for certain."""
    parts = [keys[at : at + LIMITED_ROWS] for at in range(0, len(keys), LIMITED_ROWS)]
    path, headers = "/v1/act/batch", {"Content-Type": bodies.JSON}
    requests = bodies.Asking(path, headers, [bodies.keyed(SMALL, part) for part in parts]).requests()
    answers = closed_loop.ask(server.port, requests, CONNECTIONS)
    fallbacks = _decided(answers, may_fall_back=True)
    return [key for key, fallback in zip(keys, fallbacks, strict=True) if fallback is not None]


def _decided(answers: Sequence[Answer], *, may_fall_back: bool = False) -> list[str | None]:
    """Give the fallback of each row. Raises RuntimeError for what was not decided, or not recorded."""
    found: list[str | None] = []
    for answer in answers:
        columns = json.loads(answer.body) if answer.status == 200 else {}
        if not columns or not all(columns["logged"]) or (any(columns["fallback"]) and not may_fall_back):
            raise RuntimeError(
                f"the server was asked for decisions, and answered {answer.status}: {answer.body[:500]!r}"
            )
        found += columns["fallback"]
    return found


def _seen(server: Running, gauge: str, wanted: int) -> int:
    """Wait until the service counts as many."""
    deadline = time.monotonic() + SEEN_S
    while (found := int(server.gauge(gauge))) < wanted:
        if time.monotonic() > deadline:
            raise RuntimeError(f"{gauge} is {found}, and should be {wanted}")
        time.sleep(LOOK_EVERY_S)
    return found


def _tar(folder: Path) -> bytes:
    with io.BytesIO() as file:
        with tarfile.open(fileobj=file, mode="w") as tar:
            for path in sorted(folder.iterdir()):
                tar.add(path, path.name)
        return file.getvalue()
