"""Starting, stopping, being killed: nothing acknowledged is lost, nothing is left behind."""

from __future__ import annotations

import asyncio
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
import redis

from policies.store import BUNDLED
from service.settings import Settings
from tests.conftest import Server, children, new_server
from tests.waiting import gone, until

STATE = [0.01, -0.02, 0.03, 0.04]


@pytest.fixture
def fresh(tmp_path: Path) -> Iterator[Server]:
    """A service of the test's own, stopped at the end whatever happened to it."""
    mine = new_server(tmp_path, grace_s="5")
    yield mine
    if mine.process is not None and mine.process.poll() is None:
        mine.stop()


def transitions(server: Server, policy: str = "cartpole") -> list[dict[bytes, bytes]]:
    with redis.Redis.from_url(server.redis_url) as client:
        return [fields for _, fields in client.xrange(f"sf:{{{policy}}}:transitions")]


@dataclass
class Journal:
    """What a client was told: the oracle against which what arrives is held."""

    acted: list[str] = field(default_factory=list)
    rewarded: dict[str, float] = field(default_factory=dict)
    failed: int = 0


def play(url: str, journal: Journal, stop: threading.Event) -> None:
    """Act and reward as fast as answers come, one short episode after the other; go on through failures."""
    with httpx.Client(base_url=url, timeout=5.0) as client:
        while not stop.is_set():
            episode = str(uuid.uuid4())
            for step in range(5):
                try:
                    answer = client.post("/v1/act", json={"state": STATE, "episode": episode, "step": step}).json()
                    decision = answer["decision_id"]
                    journal.acted.append(decision)
                    body = {"decision_id": decision, "reward": random.random(), "terminated": step == 4}
                    if client.post("/v1/reward", json=body).status_code == 202:
                        journal.rewarded[decision] = body["reward"]
                except (httpx.HTTPError, ValueError, KeyError):
                    journal.failed += 1
                    stop.wait(0.05)


def short_window(folder: Path, seconds: int) -> Path:
    """The bundled policies, with a reward window so short that a test sees every decision end."""
    policies = folder / "policies"
    shutil.copytree(BUNDLED, policies)
    file = policies / "cartpole" / "deployment.yaml"
    text, changed = re.subn(r"window_s: \d+", f"window_s: {seconds}", file.read_text())
    assert changed == 1
    file.write_text(text)
    return policies


def kill_now_and_then(server: Server, journals: list[Journal], times: int) -> None:
    """SIGKILL the service each time the clients have got so many more rewards acknowledged, and start it again."""
    for _ in range(times):
        enough = sum(len(journal.rewarded) for journal in journals) + 150
        until(lambda enough=enough: sum(len(j.rewarded) for j in journals) >= enough, "traffic")  # type: ignore[misc]
        server.kill()
        server.start()


def test_sigkill_in_the_middle_loses_no_acknowledged_event(tmp_path: Path, fresh: Server) -> None:
    fresh.settings["SUREFOOT_POLICIES"] = str(short_window(tmp_path, 4))
    fresh.start()
    journals, stop = [Journal() for _ in range(4)], threading.Event()
    threads = [threading.Thread(target=play, args=(fresh.url, journal, stop)) for journal in journals]
    for thread in threads:
        thread.start()
    try:
        kill_now_and_then(fresh, journals, times=3)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    acted = {decision for journal in journals for decision in journal.acted}
    until(lambda: {each[b"i"].decode() for each in transitions(fresh)} >= acted, "a transition for every decision")
    arrived = {each[b"i"].decode(): each for each in transitions(fresh)}
    assert len(arrived) == len(transitions(fresh))
    rewarded = {decision: reward for journal in journals for decision, reward in journal.rewarded.items()}
    for decision, reward in rewarded.items():
        assert (arrived[decision][b"j"], float(arrived[decision][b"r"])) == (b"joined", reward)
    assert sum(journal.failed for journal in journals) > 0
    (lost,) = re.findall(r"^surefoot_ledger_lost_events (.*)$", httpx.get(f"{fresh.url}/metrics").text, re.MULTILINE)
    assert float(lost) == 0


def test_sigterm_ships_everything_and_leaves_no_process(fresh: Server) -> None:
    fresh.start()
    assert fresh.process is not None
    family = [fresh.process.pid, *children(fresh.process.pid)]
    assert len(family) == 3
    with httpx.Client(base_url=fresh.url) as client:
        decisions = [client.post("/v1/act", json={"state": STATE}).json()["decision_id"] for _ in range(20)]
        rewards = [{"decision_id": decision, "reward": 1.0} for decision in decisions]
        assert client.post("/v1/reward/batch", json={"rewards": rewards}).status_code == 202
    assert fresh.stop() == 0
    assert all(gone(pid) for pid in family)
    fresh.start()
    assert {each[b"i"].decode() for each in transitions(fresh)} >= set(decisions)


def test_ctrl_c_in_the_terminal_stops_everything_too(fresh: Server) -> None:
    fresh.start()
    assert fresh.process is not None
    family = [fresh.process.pid, *children(fresh.process.pid)]
    fresh.process.send_signal(signal.SIGINT)
    assert fresh.process.wait(40) == 0
    assert all(gone(pid) for pid in family)


def test_when_only_the_parent_is_killed_the_worker_leaves_and_the_next_start_adopts_valkey(fresh: Server) -> None:
    fresh.start()
    assert fresh.process is not None
    family = children(fresh.process.pid)
    names = {pid: Path(f"/proc/{pid}/cmdline").read_bytes() for pid in family}
    (worker,) = [pid for pid, name in names.items() if b"service.worker" in name]
    (valkey,) = [pid for pid in family if pid != worker]
    fresh.process.kill()
    fresh.process.wait()
    fresh.start()
    until(lambda: gone(worker), "the orphaned worker to leave")
    assert not gone(valkey)
    assert '"event": "valkey_adopted"' in fresh.log
    assert fresh.stop() == 0
    assert gone(valkey)


def test_a_worker_and_a_valkey_that_die_are_replaced(fresh: Server) -> None:
    fresh.start()
    assert fresh.process is not None
    before = children(fresh.process.pid)
    for pid in before:
        os.kill(pid, signal.SIGKILL)

    def healed() -> bool:
        assert fresh.process is not None
        try:
            answer = httpx.post(f"{fresh.url}/v1/act", json={"state": STATE}, timeout=2.0)
            ready = httpx.get(f"{fresh.url}/health/ready", timeout=2.0).json()
        except httpx.HTTPError:
            return False
        return answer.status_code == 200 and ready["redis"] is not None

    until(healed, "a new worker")
    assert not set(children(fresh.process.pid)) & set(before)


def test_decisions_go_on_while_redis_is_away_and_nothing_is_lost(fresh: Server) -> None:
    fresh.start()
    with httpx.Client(base_url=fresh.url, timeout=10.0) as client:
        with redis.Redis.from_url(fresh.redis_url) as valkey:
            pid = int(valkey.info("server")["process_id"])
        os.kill(pid, signal.SIGSTOP)  # a black hole: connections stay open, nothing answers
        try:
            decisions = []
            for _ in range(30):
                answer = client.post("/v1/act", json={"state": STATE}).json()
                reward = client.post("/v1/reward", json={"decision_id": answer["decision_id"], "reward": 2.0})
                assert (answer["logged"], reward.status_code, reward.json()["status"]) == (True, 202, "accepted")
                decisions.append(answer["decision_id"])
            local = client.post("/v1/act", json={"state": STATE}, headers={"Idempotency-Key": "k"}).json()
            assert local["idempotency"] == "local"
            until(lambda: client.get("/health/ready").json()["degraded"], "degraded readiness")
            assert client.get("/health/ready").status_code == 200
        finally:
            os.kill(pid, signal.SIGCONT)
        until(lambda: {each[b"i"].decode() for each in transitions(fresh)} >= set(decisions), "the transitions")
        assert all(each[b"r"] == b"2.0" for each in transitions(fresh) if each[b"i"].decode() in decisions)


def serve(**environment: str) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("SUREFOOT_")}
    command = [sys.executable, "-m", "service.cli", "serve"]
    return subprocess.run(command, env=clean | environment, capture_output=True, text=True, timeout=60)


def test_a_second_service_on_the_same_data_directory_is_refused(fresh: Server) -> None:
    fresh.start()
    second = serve(SUREFOOT_DATA_DIR=str(fresh.data_dir), SUREFOOT_PORT="0")
    assert second.returncode == 1
    assert str(fresh.process.pid if fresh.process else 0) in second.stderr
    assert httpx.get(f"{fresh.url}/health/ready").status_code == 200


@pytest.mark.parametrize(
    ("environment", "named"),
    [
        ({"SUREFOOT_COLOUR": "red"}, "SUREFOOT_COLOUR"),
        ({"SUREFOOT_PORT": "many"}, "SUREFOOT_PORT"),
        ({"SUREFOOT_DEVICE": "tpu"}, "SUREFOOT_DEVICE"),
        ({"SUREFOOT_WORKERS": "0"}, "SUREFOOT_WORKERS"),
        ({"SUREFOOT_HOST": "0.0.0.0"}, "SUREFOOT_CLIENT_TOKEN"),
    ],
)
def test_a_wrong_setting_stops_the_start_and_is_named(environment: dict[str, str], named: str, tmp_path: Path) -> None:
    refused = serve(SUREFOOT_DATA_DIR=str(tmp_path / "data"), **environment)
    assert refused.returncode == 1
    assert named in refused.stderr
    assert not (tmp_path / "data").exists()


def test_a_wrong_policy_directory_stops_the_start_and_is_named(tmp_path: Path) -> None:
    missing = str(tmp_path / "none")
    refused = serve(SUREFOOT_DATA_DIR=str(tmp_path / "data"), SUREFOOT_PORT="0", SUREFOOT_POLICIES=missing)
    assert refused.returncode == 1
    assert missing in refused.stderr


def test_tokens_are_required_off_loopback_and_where_they_are_set(tmp_path: Path) -> None:
    closed = new_server(tmp_path, client_token="c-token", admin_token="a-token")
    closed.start()
    try:
        with httpx.Client(base_url=closed.url) as client:
            for method, path in (("POST", "/v1/act"), ("GET", "/metrics"), ("GET", "/v1/decisions/x")):
                refused = client.request(method, path, json={"state": STATE} if method == "POST" else None)
                assert (refused.status_code, refused.json()["code"]) == (401, "unauthorized")
            bearer = {"Authorization": "Bearer c-token"}
            assert client.post("/v1/act", json={"state": STATE}, headers=bearer).status_code == 200
            assert client.get("/metrics", headers=bearer).status_code == 200
            assert client.get("/admin/policies", headers=bearer).status_code == 403  # a good token, but a client's
            (policy,) = client.get("/admin/policies", headers={"Authorization": "Bearer a-token"}).json()
            assert (policy["policy"], policy["champion"]) == ("cartpole", "v2")
            assert client.get("/health/live").status_code == 200
    finally:
        closed.stop()
    assert "c-token" not in closed.log


def test_slow_bodies_are_cut(tmp_path: Path) -> None:
    import socket

    slow = new_server(tmp_path, body_timeout_s="0.2")
    slow.start()
    try:
        with socket.create_connection(("127.0.0.1", slow.port), timeout=10) as connection:
            connection.sendall(b"POST /v1/act HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
            assert b" 408 " in connection.recv(4096)
    finally:
        slow.stop()


def test_every_decision_of_a_run_replays_to_the_same_action_and_propensity(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    from service.replay import replay_decision

    with httpx.Client(base_url=server.url) as client:
        batch = {"states": [[random.gauss(0, 1) for _ in range(4)] for _ in range(100)]}
        decisions = client.post("/v1/act/batch", json=batch).json()["decision_id"]
        until(lambda: client.get(f"/v1/decisions/{decisions[-1]}").status_code == 200, "the records")
    settings = Settings(data_dir=server.data_dir)

    async def replay_all() -> list[dict[str, Any]]:
        return [await replay_decision(decision, settings) for decision in decisions]

    assert all(outcome["same"] for outcome in asyncio.run(replay_all()))
    monkeypatch.setenv("SUREFOOT_DATA_DIR", str(server.data_dir))
    command = [sys.executable, "-m", "service.cli", "replay", decisions[0]]
    assert '"same": true' in subprocess.run(command, capture_output=True, text=True, check=True).stdout
