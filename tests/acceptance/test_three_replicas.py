"""A budget holds over three replicas under load, while one is killed and Redis is away for a while.

Duty: from outside, over HTTP. What was spent is counted from what lies in Redis in the end, by the window that each
record names; that nothing is missing there is held against the answers.
"""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event

import httpx
import pytest
import redis

from policies.errors import StoreAway
from safety.bank import TERM_S
from service.decision import Record, decode_record
from service.redis_streams import RedisStreams, base, connect
from service.valkey import EmbeddedValkey
from tests.service.admins import STATE, Admin, serving
from tests.waiting import gone, until

LIMIT, WINDOW_S = 300, 5.0
ROWS, MOST = 4, 20_000  # rows of a request, and the most requests that one client makes
SOME = 150  # requests between two events
READERS = 64


@dataclass(frozen=True)
class Answered:
    """One answer to a batch, when it was asked for, and when it was here (monotonic)."""

    sent_s: float
    here_s: float
    ids: list[str]
    explored: list[bool]
    epsilon: list[float]
    logged: list[bool]


@dataclass
class Client:
    """Sends batches to one replica until it is told to stop, or the replica is gone."""

    url: str
    policy: str
    stop: Event = field(default_factory=Event)
    answers: list[Answered] = field(default_factory=list)
    gone: bool = False

    def run(self) -> None:
        body = {"policy": self.policy, "states": [STATE] * ROWS}
        with httpx.Client(base_url=self.url, timeout=30.0) as http:
            for _ in range(MOST):
                if self.stop.is_set():
                    return
                sent_s = time.monotonic()
                try:
                    answer = http.post("/v1/act/batch", json=body)
                except httpx.TransportError:
                    self.gone = True
                    return
                assert answer.status_code == 200, answer.text
                found = answer.json()
                columns = (found[each] for each in ("decision_id", "explored", "epsilon", "logged"))
                self.answers.append(Answered(sent_s, time.monotonic(), *columns))

    def since(self, moment_s: float) -> list[Answered]:
        """What was asked for after a moment."""
        return [each for each in self.answers if each.sent_s > moment_s]


@pytest.fixture
def shared(tmp_path: Path) -> Iterator[EmbeddedValkey]:
    mine = EmbeddedValkey(tmp_path / "shared", maxmemory_bytes=512 << 20)
    yield mine
    mine.stop()


def explore(admin: Admin, policy: str, limit: int, window_s: float) -> None:
    admin.pushed(policy, "v1", prefers=1)
    tag = admin.http.get(f"/admin/policies/{policy}/exploration").headers["etag"]
    document = {"epsilon": 1.0, "rate": {"limit": limit, "window_s": window_s}, "start": "now"}
    answer = admin.http.put(f"/admin/policies/{policy}/exploration", json=document, headers={"If-Match": tag})
    assert answer.status_code == 200, answer.text


def follows(admin: Admin, policy: str) -> bool:
    """Whether a replica decides for the policy, by the exploration that was declared."""
    seen = admin.http.get(f"/admin/policies/{policy}/exploration")
    known = seen.status_code == 200 and seen.json() != {}
    return known and admin.http.post("/v1/act", json={"policy": policy, "state": STATE}).status_code == 200


def decision_ids(url: str, policy: str) -> list[str]:
    """Every decision that Redis holds."""
    start = f"{base(policy)}:d:"
    with redis.Redis.from_url(url, protocol=2) as store:
        return [key.decode().removeprefix(start) for key in store.scan_iter(match=f"{start}*", count=1_000)]


def explored_records(url: str, policy: str, ids: Sequence[str]) -> list[Record]:
    """The records of those decisions that explored."""
    found: list[Record] = []

    async def some(streams: RedisStreams, part: Sequence[str]) -> None:
        waiting = list(part)
        while waiting:
            try:
                stored = await streams.read_decision(policy, waiting[-1])
            except StoreAway:  # a machine that is too busy to answer in time
                continue
            waiting.pop()
            assert stored is not None
            record = decode_record(stored.record)
            if record.explored:
                found.append(record)

    async def work() -> None:
        client = connect(url)
        streams = RedisStreams(client)
        await asyncio.gather(*(some(streams, ids[k::READERS]) for k in range(READERS)))
        await client.aclose()

    asyncio.run(work())
    return found


def rested(clients: Sequence[Client]) -> Callable[[], bool]:
    """Whether each client has had some answers more."""
    before = [len(client.answers) for client in clients]
    return lambda: all(len(c.answers) >= n + SOME for c, n in zip(clients, before, strict=True))


def explores(client: Client, since_s: float) -> bool:
    return any(any(each.explored) for each in client.since(since_s))


@dataclass(frozen=True)
class Fleet:
    """The replicas that are never killed, those who ask them, and a policy that nobody asks about in the meantime."""

    admins: Sequence[Admin]
    clients: Sequence[Client]
    spare: str

    def away(self, end: Callable[[], None], again: Callable[[], object]) -> None:
        """Take Redis away until nobody explores, and bring it back, and exploration with it."""
        for admin in self.admins:
            until(lambda admin=admin: strength(admin, self.spare) > 0.0, "a portion to spare")  # type: ignore[misc]
        end()
        ended_s = time.monotonic() + TERM_S  # of the last lease that could have been granted
        until(lambda: all(len(each.since(ended_s)) >= SOME for each in self.clients), "answers without a lease")
        assert [strength(admin, self.spare) for admin in self.admins] == [0.0, 0.0]  # though nobody has spent it
        back_s = time.monotonic()
        again()
        until(lambda: all(explores(each, back_s) for each in self.clients), "exploration after Redis is back")
        held(self.clients, ended_s, back_s)


def strength(admin: Admin, policy: str) -> float:
    epsilon: float = admin.act(policy)["exploration"]["epsilon"]
    return epsilon


def killed_by_hand(shared: EmbeddedValkey) -> None:
    pid = shared.pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    until(lambda: gone(pid), "the end of Redis")


def held(clients: Sequence[Client], ended_s: float, back_s: float) -> None:
    """No survivor explored from the end of the last lease until Redis was back."""
    for client in clients:
        alone = [each for each in client.since(ended_s) if each.here_s < back_s]
        assert len(alone) >= SOME
        assert not any(any(each.explored) or max(each.epsilon) > 0.0 for each in alone)


def test_the_budget_holds_through_a_killed_replica_and_without_redis(
    tmp_path: Path, policy: str, shared: EmbeddedValkey
) -> None:
    url = shared.start()
    with ExitStack() as stack:
        admins = [stack.enter_context(serving(tmp_path / name, redis_url=url)) for name in ("one", "two", "three")]
        spare = f"{policy}-spare"
        explore(admins[0], policy, LIMIT, WINDOW_S)
        explore(admins[0], spare, 100_000, 3_600.0)
        for admin in admins:
            until(lambda admin=admin: follows(admin, policy) and follows(admin, spare), "both")  # type: ignore[misc]
        clients = [Client(admin.server.url, policy) for admin in admins]
        *survivors, killed = clients
        fleet = Fleet(admins[:2], survivors, spare)
        with ThreadPoolExecutor(len(clients)) as pool:
            runs = [pool.submit(client.run) for client in clients]
            try:
                until(lambda: all(explores(each, 0.0) for each in clients), "exploration by all")
                until(rested(clients), "some load")
                admins[2].server.kill()
                until(lambda: killed.gone, "the end of the killed one")
                until(rested(survivors), "some load without it")
                fleet.away(shared.stop, shared.start)
                admins[2].server.start()  # what it had written down before it was killed is told now
                until(rested(survivors), "some load with Redis")
                fleet.away(lambda: killed_by_hand(shared), shared.ensure)
                until(rested(survivors), "some load in the end")
            finally:
                for client in clients:
                    client.stop.set()
            for run in runs:
                run.result()
        counted(url, policy, clients)


def counted(url: str, policy: str, clients: Sequence[Client]) -> None:
    """Every logged decision is in Redis, and what they explored stays below the cap in each window."""
    answers: list[Answered] = [each for client in clients for each in client.answers]
    logged = {i for each in answers for i, was in zip(each.ids, each.logged, strict=True) if was}
    assert len(logged) == len(answers) * ROWS
    until(lambda: logged <= set(decision_ids(url, policy)), "every logged decision in Redis")
    found = explored_records(url, policy, decision_ids(url, policy))
    windows = Counter(record.window for record in found)
    assert len(found) >= sum(map(sum, (each.explored for each in answers)))  # and what the killed one did not answer
    assert all(window.startswith("rate:5000:") for window in windows), windows
    assert max(windows.values()) <= LIMIT, windows
    assert len(windows) >= 3, windows
