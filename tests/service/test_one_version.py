"""An answer is made wholly by one version: networks that answer with their version, under traffic, while it changes.

Duty: over HTTP, from several connections at a time, singly and in batches. Each generation's deployment is known to the
test; an answer's generation, version, role, action and values must be of that one.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest

from tests.policies.networks import bundle_files, linear
from tests.service.admins import STATE, Admin, serving
from tests.waiting import until

VERSIONS = 4
CHANGES = 40
ROWS = 16


def values_of(number: int) -> list[float]:
    """What version `number` says of any state: it prefers the action of its number; nobody else has these values."""
    return [100.0 * number + (5.0 if action == number else float(-action)) for action in range(VERSIONS)]


def telling(policy: str, number: int) -> dict[str, bytes]:
    """A bundle whose network says which version it is."""
    proto = linear([[0.0] * VERSIONS] * 2, values_of(number))
    return bundle_files(proto, [STATE], [values_of(number)], policy=policy, version=f"v{number}", exploration=None)


@dataclass
class Client:
    """Asks until it is told to stop: in turn a single decision with its values, and a batch."""

    url: str
    policy: str
    name: str
    singles: list[dict[str, Any]] = field(default_factory=list)
    batches: list[dict[str, Any]] = field(default_factory=list)

    def run(self, stop: threading.Event) -> None:
        with httpx.Client(base_url=self.url, timeout=30.0) as http:
            turn = 0
            while not stop.is_set():
                turn += 1
                single = {"policy": self.policy, "state": STATE, "key": f"{self.name}-{turn}", "include": ["values"]}
                self.singles.append(http.post("/v1/act", json=single).raise_for_status().json())
                keys = [f"{self.name}-{turn}-{row}" for row in range(ROWS)]
                batch = {"policy": self.policy, "states": [STATE] * ROWS, "keys": keys}
                self.batches.append(http.post("/v1/act/batch", json=batch).raise_for_status().json())


@pytest.fixture
def admin(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Admin]:
    with serving(tmp_path_factory.mktemp("one")) as mine:
        yield mine


def promote_to_and_fro(admin: Admin, policy: str) -> dict[int, dict[str, str]]:
    """Change the deployment many times. Gives role by version, for each generation."""
    roles = {1: {"v0": "champion"}}
    for turn in range(1, CHANGES + 1):
        champion, challenger = f"v{turn % VERSIONS}", f"v{(turn + 1) % VERSIONS}"
        canary = {"challengers": [{"version": challenger, "weight": 0.5}]} if turn % 2 else {}
        answer = admin.deploy(policy, f'"{turn}"', champion=champion, **canary)
        assert (answer.status_code, answer.headers["etag"]) == (200, f'"{turn + 1}"'), answer.text
        roles[turn + 1] = {champion: "champion"} | ({challenger: "challenger"} if turn % 2 else {})
    return roles


def fits(roles: dict[str, str], version: str, role: str, action: int) -> bool:
    return roles.get(version) == role and version == f"v{action}"


def test_an_answer_is_of_one_version_and_of_its_generation(admin: Admin, policy: str) -> None:
    for number in range(VERSIONS):
        assert admin.push(telling(policy, number), policy).status_code == 201
    stop = threading.Event()
    clients = [Client(admin.server.url, policy, f"c{i}") for i in range(4)]
    with ThreadPoolExecutor(len(clients)) as pool:
        runs = [pool.submit(client.run, stop) for client in clients]
        try:
            until(lambda: all(client.batches for client in clients), "traffic")
            roles = promote_to_and_fro(admin, policy)
            last = [len(client.batches) for client in clients]
            until(
                lambda: all(len(c.batches) > n + 1 for c, n in zip(clients, last, strict=True)), "the last deployment"
            )
        finally:
            stop.set()
        for run in runs:
            run.result()
    seen: Counter[int] = Counter()
    for each in [one for client in clients for one in client.singles]:
        assert fits(roles[each["generation"]], each["version"], each["role"], each["action"]), each
        assert each["values"] == values_of(each["action"]), each
        assert each["assigned_version"] == each["version"]
        seen[each["generation"]] += 1
    for each in [one for client in clients for one in client.batches]:
        rows = list(zip(each["version"], each["role"], each["action"], strict=True))
        assert len(rows) == ROWS
        assert all(fits(roles[each["generation"]], *row) for row in rows), each
        seen[each["generation"]] += 1
    assert len(seen) > CHANGES / 2, seen
    assert seen[CHANGES + 1] > 0
