"""Low disk, replicas that fall silent, and the loss of the primary, as callers of a running service meet them."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.conftest import Server, new_server
from tests.service.pairs import Pair, pair
from tests.waiting import until

STATE = [0.01, -0.02, 0.03, 0.04]
# Others may write to the same disk meanwhile: far more than a minute of that.
ROOM = 1 << 30


@pytest.fixture
def both(tmp_path: Path) -> Iterator[Pair]:
    with pair(tmp_path / "redis") as found:
        yield found


@pytest.fixture
def fresh(tmp_path: Path) -> Iterator[Server]:
    """A service of the test's own, not started, stopped at the end."""
    mine = new_server(tmp_path / "service", grace_s="5")
    yield mine
    if mine.process is not None and mine.process.poll() is None:
        mine.stop()


class Caller:
    """Remembers what it was told."""

    def __init__(self, http: httpx.Client) -> None:
        self.http = http
        self.acts: list[dict[str, Any]] = []

    def act(self) -> dict[str, Any]:
        response = self.http.post("/v1/act", json={"state": STATE})
        assert response.status_code == 200, response.text
        self.acts.append(response.json())
        return self.acts[-1]

    def reward(self, act: dict[str, Any]) -> httpx.Response:
        return self.http.post("/v1/reward", json={"decision_id": act["decision_id"], "reward": 1.0})

    def ready(self) -> dict[str, Any]:
        return dict(self.http.get("/health/ready").json())

    def metric(self, line: str) -> float:
        (value,) = re.findall(rf"^{re.escape(line)} (\S+)$", self.http.get("/metrics").text, re.MULTILINE)
        return float(value)

    def joined(self, act: dict[str, Any]) -> str:
        found = self.http.get(f"/v1/decisions/{act['decision_id']}").json()
        return str(found["join"]["state"]) if "join" in found else str(found)


@contextmanager
def calling(url: str) -> Iterator[Caller]:
    with httpx.Client(base_url=url, timeout=10.0) as http:
        yield Caller(http)


def safe_and_unlogged(act: dict[str, Any]) -> bool:
    return (act["logged"], act["explored"], act["exploration"]["epsilon"]) == (False, False, 0.0)


def problem(response: httpx.Response) -> tuple[int, str, str]:
    return response.status_code, response.json()["code"], response.headers["retry-after"]


def test_low_disk_refuses_rewards_answers_acts_safely_and_recovers_by_itself(fresh: Server, tmp_path: Path) -> None:
    disk = os.statvfs(tmp_path)
    fresh.settings["SUREFOOT_SPOOL_MIN_FREE_BYTES"] = str(disk.f_bavail * disk.f_frsize - ROOM)
    fresh.start()
    with calling(fresh.url) as caller:
        fill_and_free(caller, tmp_path / "filler")


def fill_and_free(caller: Caller, filler: Path) -> None:
    first = caller.act()
    assert first["logged"]
    assert caller.reward(first).status_code == 202
    try:
        with filler.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, 2 * ROOM)
        refused = caller.reward(first)
        assert (refused.status_code, refused.json()["code"], refused.headers["retry-after"]) == (
            503,
            "ledger_broken",
            "5",
        )
        assert "reserve" in refused.json()["detail"]
        for _ in range(20):
            assert safe_and_unlogged(caller.act())
        assert caller.http.get("/health/ready").status_code == 503
        assert caller.ready()["reasons"] == ["ledger_not_accepting"]
        assert caller.metric('surefoot_ledger_recording{policy="cartpole"}') == 0.0
        assert caller.metric('surefoot_unlogged_decisions_total{policy="cartpole"}') == 20.0
    finally:
        filler.unlink()
    until(lambda: caller.act()["logged"], "a ledger that takes events again")
    again = caller.reward(caller.acts[-1])
    assert (again.status_code, again.json()["status"]) == (202, "joined")
    assert caller.ready()["reasons"] == []


def test_in_tier_replicated_nothing_is_acknowledged_that_a_failover_would_take(both: Pair, fresh: Server) -> None:
    fresh.settings |= {"SUREFOOT_DURABILITY": "replicated", "SUREFOOT_REDIS_URL": both.url}
    fresh.start()
    with calling(fresh.url) as caller:
        lose_the_primary(caller, both)


def lose_the_primary(caller: Caller, both: Pair) -> None:
    until(lambda: caller.act()["logged"], "replicas that confirm")
    rewarded = caller.acts[-1]
    assert caller.reward(rewarded).json()["status"] == "joined", "the verdict came with the confirmation"
    assert (caller.ready()["degraded"], caller.ready()["recording"]) == (False, {"cartpole": True})

    both.part()
    until(lambda: not caller.act()["logged"], "a confirmation that does not come")
    until(lambda: safe_and_unlogged(caller.act()), "exploration that is off")
    refused = caller.reward(caller.acts[-1])
    assert problem(refused) == (503, "unconfirmed", "1")
    until(lambda: caller.ready()["degraded"], "readiness that says so")
    ready = caller.ready()
    assert (ready["status"], ready["recording"]) == ("ready", {"cartpole": False}), (
        "acts are answered as safely elsewhere"
    )
    assert "too_few_replicas:0" in [each["reason"] for each in ready["degraded_by"]]
    assert ready["replication"]["enough"] is False

    late = caller.acts[-1]
    both.fail_over()
    both.replica.start()
    both.follow()
    until(lambda: caller.act()["logged"], "replicas of the new primary that confirm")
    assert caller.reward(caller.acts[-1]).status_code == 202
    again = caller.reward(late)
    assert (again.status_code, again.json()["status"], again.json()["duplicate"]) == (202, "joined", True)
    assert {caller.joined(act) for act in (rewarded, late)} == {"joined"}
    assert {caller.joined(act) for act in caller.acts} <= {"joined", "pending"}, "each is there, logged or not"
    assert caller.metric("surefoot_ledger_lost_events") == 0.0
    assert caller.metric('surefoot_ship_failures_total{reason="unconfirmed"}') >= 1.0
    until(lambda: caller.metric("surefoot_ledger_unconfirmed_events") == 0.0, "everything confirmed")
