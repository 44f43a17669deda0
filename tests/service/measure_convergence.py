"""Print how long a change takes until every replica serves it: `python -m tests.service.measure_convergence`.

Three services that share one Valkey, on this machine; each is asked all the time which generation decides. A change is
a promotion between two versions that all have loaded. The numbers stand in docs/control.md.
"""

from __future__ import annotations

import statistics
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from service.valkey import EmbeddedValkey
from tests.service.admins import STATE, Admin, serving
from tests.waiting import until

REPLICAS, CHANGES = 3, 50


@dataclass
class Watch:
    """When a replica first decided by each generation (monotonic)."""

    url: str
    since_s: dict[int, float] = field(default_factory=dict)

    def run(self, stop: threading.Event) -> None:
        with httpx.Client(base_url=self.url, timeout=30.0) as http:
            while not stop.wait(0.001):
                answer = http.post("/v1/act", json={"policy": "toy", "state": STATE}).raise_for_status().json()
                self.since_s.setdefault(answer["generation"], time.monotonic())


@dataclass(frozen=True)
class Change:
    """How long a change took, in seconds: to its answer, and until every replica was seen to decide by it."""

    answered_s: float
    everywhere_s: float
    behind: list[str]


def has_all(admin: Admin) -> bool:
    answer = admin.http.get("/admin/policies/toy")
    return answer.status_code == 200 and [each["loaded"] for each in answer.json()["versions"].values()] == [True, True]


def measure(admins: Sequence[Admin], watches: Sequence[Watch]) -> list[Change]:
    """Promote to and fro, by one replica after the other."""
    found = []
    for turn in range(CHANGES):
        admin, generation = admins[turn % len(admins)], turn + 2
        began_s = time.monotonic()
        answer = admin.deploy("toy", f'"{generation - 1}"', champion=("v2", "v1")[turn % 2])
        answered_s = time.monotonic()
        assert answer.status_code == 200, answer.text
        until(lambda generation=generation: all(generation in each.since_s for each in watches), "all")  # type: ignore[misc]
        last_s = max(each.since_s[generation] for each in watches)
        found.append(Change(answered_s - began_s, last_s - began_s, answer.json()["behind"]))
    return found


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="sf-") as folder, ExitStack() as stack:
        shared = EmbeddedValkey(Path(folder) / "shared", maxmemory_bytes=64 << 20)
        url = shared.start()
        stack.callback(shared.stop)
        names = [f"replica-{number}" for number in range(REPLICAS)]
        admins = [stack.enter_context(serving(Path(folder) / name, redis_url=url)) for name in names]
        admins[0].pushed("toy", "v1")
        admins[0].pushed("toy", "v2", prefers=1)
        for admin in admins:
            until(lambda admin=admin: has_all(admin), "both versions")  # type: ignore[misc]
        stop, watches = threading.Event(), [Watch(admin.server.url) for admin in admins]
        with ThreadPoolExecutor(REPLICAS) as pool:
            runs = [pool.submit(watch.run, stop) for watch in watches]
            try:
                changes = measure(admins, watches)
            finally:
                stop.set()
            for run in runs:
                run.result()
    print(f"{REPLICAS} replicas, {CHANGES} promotions, ms | median | max\n---|---|---")  # noqa: T201
    for title, values in (
        ("until all replicas decide by it", [each.everywhere_s for each in changes]),
        ("until it is answered", [each.answered_s for each in changes]),
    ):
        print(f"{title} | {statistics.median(values) * 1000:.0f} | {max(values) * 1000:.0f}")  # noqa: T201
    print(f"answered before all confirmed: {sum(bool(each.behind) for each in changes)}")  # noqa: T201


if __name__ == "__main__":
    main()
