"""Several workers behind one socket, as processes: shares, deaths, metrics, budgets, tokens, the audit log, the end."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from service.audit import verify
from tests.conftest import Server, children, new_server
from tests.service.admins import AUTHORIZED, TOKEN, Admin
from tests.service.admins import STATE as TWO_FEATURES
from tests.service.test_life import STATE, Journal, play, short_window, transitions
from tests.waiting import gone, until

DECISIONS = "surefoot_decisions_total"
REWARDS = "surefoot_rewards_total"


@pytest.fixture
def crew(tmp_path: Path) -> Iterator[Server]:
    """Two workers, not started; stopped at the end whatever happened to them."""
    mine = new_server(tmp_path, workers="2", grace_s="5", admin_token=TOKEN)
    yield mine
    if mine.process is not None and mine.process.poll() is None:
        mine.stop()


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as mine:
        yield mine


def start(server: Server) -> None:
    server.start()
    until(lambda: serving(server) == int(server.settings["SUREFOOT_WORKERS"]), "all workers")


def serving(server: Server) -> int:
    try:
        workers = httpx.get(f"{server.url}/health/ready", timeout=5.0).json()["workers"]
    except httpx.HTTPError:
        return 0
    assert workers["of"] == int(server.settings["SUREFOOT_WORKERS"])
    return int(workers["serving"])


def workers_of(server: Server) -> list[int]:
    assert server.process is not None
    found = []
    for pid in children(server.process.pid):
        try:
            if b"service.worker" in Path(f"/proc/{pid}/cmdline").read_bytes():
                found.append(pid)
        except FileNotFoundError:
            continue
    return found


def scrape(server: Server) -> dict[str, float]:
    """The sum over all series of each sample."""
    text = httpx.get(f"{server.url}/metrics", timeout=10.0).raise_for_status().text
    found: dict[str, float] = defaultdict(float)
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found[sample.name] += sample.value
    return dict(found)


def connections(server: Server) -> dict[int, int]:
    """How many established connections to the service each worker holds."""
    established = set()
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        _, local, _, state, *_, inode = line.split()[:10]
        if int(local.split(":")[1], 16) == server.port and state == "01":
            established.add(f"socket:[{inode}]")
    return {
        pid: len(established & {_link(each) for each in Path(f"/proc/{pid}/fd").iterdir()})
        for pid in workers_of(server)
    }


def _link(path: Path) -> str:
    try:
        return str(path.readlink())
    except FileNotFoundError:
        return ""


class Traffic:
    """Clients that act and reward without a pause, each on connections of its own, and remember what they were told."""

    def __init__(self, url: str, clients: int = 6) -> None:
        self.journals = [Journal() for _ in range(clients)]
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=play, args=(url, each, self._stop)) for each in self.journals]

    def __enter__(self) -> Traffic:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    @property
    def acted(self) -> int:
        return sum(len(journal.acted) for journal in self.journals)

    @property
    def rewarded(self) -> int:
        return sum(len(journal.rewarded) for journal in self.journals)

    @property
    def failed(self) -> int:
        return sum(journal.failed for journal in self.journals)

    def wait(self, more: int) -> None:
        """Wait until so many more rewards have been acknowledged."""
        enough = self.rewarded + more
        until(lambda: self.rewarded >= enough, "traffic")


def test_one_scrape_tells_what_all_have_done_and_each_has_its_share(crew: Server) -> None:
    start(crew)
    with Traffic(crew.url) as traffic:
        traffic.wait(more=300)
    rows = {"states": [STATE] * 50}
    for _ in range(8):
        assert httpx.post(f"{crew.url}/v1/act/batch", json=rows).status_code == 200
    for _ in range(8):  # each on a new connection, to whichever worker
        told = scrape(crew)
        assert (told[DECISIONS], told[REWARDS]) == (traffic.acted + 400, traffic.rewarded)
        assert told["surefoot_reward_delay_seconds_count"] <= traffic.rewarded
        assert (told["surefoot_workers"], told["surefoot_worker_restarts"]) == (2.0, 0.0)
    assert traffic.failed == 0
    until(lambda: len(transitions(crew)) > 0 or scrape(crew)["surefoot_ledger_unshipped_events"] == 0, "shipping")
    until(lambda: scrape(crew)["surefoot_pending_decisions"] > 0, "the join")
    assert {path.name for path in (crew.data_dir / "spool").iterdir()} == {"slot-0", "slot-1"}


def test_a_killed_worker_loses_nothing_others_answer_and_it_is_replaced(tmp_path: Path, crew: Server) -> None:
    crew.settings["SUREFOOT_POLICIES"] = str(short_window(tmp_path, 4))
    start(crew)
    stop = threading.Event()
    falls: list[tuple[str, float, float]] = []

    def watch() -> None:
        """Hold every scrape against the one before: nothing that was counted may ever be missing."""
        before: dict[str, float] = {}
        while not stop.is_set():
            try:
                now = scrape(crew)
            except httpx.HTTPError:
                continue  # the worker was killed while it answered
            names = [name for name in now if name.endswith(("_total", "_count", "_bucket"))]
            falls.extend((name, before[name], now[name]) for name in names if now[name] < before.get(name, 0.0))
            before = now

    watching = threading.Thread(target=watch)
    watching.start()
    try:
        with Traffic(crew.url) as traffic:
            traffic.wait(more=100)
            for victim in workers_of(crew):
                os.kill(victim, signal.SIGKILL)
                until(lambda victim=victim: gone(victim), "the death")  # type: ignore[misc]
                traffic.wait(more=100)  # by the other, or by the next
                until(lambda: serving(crew) == 2, "the next worker")
                traffic.wait(more=100)
    finally:
        stop.set()
        watching.join()
    assert falls == []
    assert traffic.failed <= 2 * len(traffic.journals)  # calls in flight on the one that was killed
    told = scrape(crew)
    assert traffic.acted <= told[DECISIONS] <= traffic.acted + traffic.failed
    assert traffic.rewarded <= told[REWARDS] <= traffic.rewarded + traffic.failed
    assert told["surefoot_worker_restarts"] == 2.0
    with Traffic(crew.url) as more:
        more.wait(more=50)
    assert scrape(crew)[DECISIONS] - told[DECISIONS] == more.acted
    assert scrape(crew)[REWARDS] - told[REWARDS] == more.rewarded
    acted = {each for part in (traffic, more) for journal in part.journals for each in journal.acted}
    until(lambda: {each[b"i"].decode() for each in transitions(crew)} >= acted, "a transition for every decision")
    arrived = {each[b"i"].decode(): each for each in transitions(crew)}
    assert len(arrived) == len(transitions(crew))
    assert len({each[b"p"] for each in arrived.values()}) >= 2
    for journal in (*traffic.journals, *more.journals):
        for decision, reward in journal.rewarded.items():
            assert (arrived[decision][b"j"], float(arrived[decision][b"r"])) == (b"joined", reward)
    assert scrape(crew)["surefoot_ledger_lost_events"] == 0


def test_while_one_is_dead_the_other_answers_and_counts_for_both(crew: Server) -> None:
    start(crew)
    with Traffic(crew.url) as traffic:
        traffic.wait(more=100)
    before = scrape(crew)
    first, second = workers_of(crew)
    os.kill(first, signal.SIGKILL)
    with httpx.Client(base_url=crew.url) as client:
        assert client.post("/v1/act", json={"state": STATE}).status_code == 200
    until(lambda: second in workers_of(crew) and scrape(crew)["surefoot_workers"] == 1.0, "the burial")
    assert scrape(crew)[DECISIONS] == before[DECISIONS] + 1
    until(lambda: serving(crew) == 2, "the next worker")
    assert second in workers_of(crew)
    assert scrape(crew)[DECISIONS] == before[DECISIONS] + 1


def test_a_worker_that_is_asked_to_leave_leaves_its_counts_and_is_replaced(crew: Server) -> None:
    start(crew)
    with Traffic(crew.url) as traffic:
        traffic.wait(more=60)
    leaving = workers_of(crew)[0]
    os.kill(leaving, signal.SIGTERM)
    until(lambda: gone(leaving) and serving(crew) == 2, "the next worker")
    assert (scrape(crew)[DECISIONS], scrape(crew)[REWARDS]) == (traffic.acted, traffic.rewarded)


def test_connections_are_shared_out_evenly(crew: Server) -> None:
    start(crew)
    with ExitStack() as stack:
        clients = [stack.enter_context(httpx.Client(base_url=crew.url)) for _ in range(64)]
        with ThreadPoolExecutor(16) as pool:
            answers = list(pool.map(lambda client: client.get("/health/live").status_code, clients))
        assert set(answers) == {200}
        shares = connections(crew).values()
        assert sum(shares) == 64
        assert min(shares) >= 24


def test_a_worker_that_is_stopped_keeps_nobody_waiting(crew: Server) -> None:
    start(crew)
    stopped = workers_of(crew)[0]
    os.kill(stopped, signal.SIGSTOP)
    try:
        for _ in range(100):
            answer = httpx.post(f"{crew.url}/v1/act", json={"state": STATE}, timeout=10.0)
            assert answer.status_code == 200
        assert scrape(crew)[DECISIONS] == 100.0
    finally:
        os.kill(stopped, signal.SIGCONT)


def test_sigterm_drains_all_and_leaves_no_process(crew: Server) -> None:
    start(crew)
    assert crew.process is not None
    family = [crew.process.pid, *children(crew.process.pid)]
    assert len(family) == 4
    with Traffic(crew.url) as traffic:
        traffic.wait(more=60)
    assert crew.stop() == 0
    assert all(gone(pid) for pid in family)
    assert crew.log.count('"event": "draining"') == 2
    start(crew)
    acted = {each for journal in traffic.journals for each in journal.acted}
    assert {each[b"i"].decode() for each in transitions(crew)} <= acted
    until(lambda: scrape(crew)["surefoot_ledger_unshipped_events"] == 0, "nothing left to ship")


def test_when_the_parent_is_killed_all_workers_leave(crew: Server) -> None:
    start(crew)
    assert crew.process is not None
    workers = workers_of(crew)
    crew.process.kill()
    crew.process.wait()
    until(lambda: all(gone(worker) for worker in workers), "the workers to leave")
    start(crew)
    assert scrape(crew)[DECISIONS] == 0.0


def everywhere(server: Server, path: str, *statuses: int, **headers: str) -> bool:
    """Whether every worker answers so: new connections go to the one that has fewest."""
    with ExitStack() as stack:
        clients = [stack.enter_context(httpx.Client(base_url=server.url, timeout=30.0)) for _ in range(6)]
        return all(client.get(path, headers=AUTHORIZED | headers).status_code in statuses for client in clients)


def test_a_change_is_answered_when_every_worker_has_it(crew: Server, policy: str) -> None:
    start(crew)
    with closing(Admin(crew)) as admin:
        for number, label in enumerate(("v1", "v2")):
            admin.pushed(policy, label, prefers=number)
        until(lambda: everywhere(crew, f"/admin/policies/{policy}", 200, **AUTHORIZED), "the policy at both")
        for number, label in enumerate(("v2", "v1") * 5):
            tag = f'"{number + 1}"'
            changed = admin.deploy(policy, tag, champion=label)
            assert changed.json()["behind"] == []
            told = set()
            for _ in range(40):  # each on a connection of its own, at whichever worker takes it
                body = {"policy": policy, "state": TWO_FEATURES}
                answer = httpx.post(f"{crew.url}/v1/act", json=body).json()
                told.add((answer["version"], answer["generation"], answer["action"]))
            assert told == {(label, number + 2, int(label == "v2"))}


def test_workers_do_not_overspend_a_budget_that_they_share(crew: Server, policy: str, stack: ExitStack) -> None:
    start(crew)
    admin = stack.enter_context(closing(Admin(crew)))
    admin.pushed(policy, "v1", prefers=1)
    until(lambda: everywhere(crew, f"/admin/policies/{policy}", 200), "the version at both")
    tag = admin.http.get(f"/admin/policies/{policy}/exploration").headers["etag"]
    document = {"epsilon": 1.0, "rate": {"limit": 40, "window_s": 10}, "start": "now"}
    began_s = time.monotonic()
    changed = admin.http.put(f"/admin/policies/{policy}/exploration", json=document, headers={"If-Match": tag})
    assert changed.status_code == 200, changed.text
    explored: Counter[str] = Counter()

    def explore(_: int) -> None:
        with httpx.Client(base_url=crew.url, timeout=30.0, headers=AUTHORIZED) as client:
            for _ in range(20):
                answer = client.post("/v1/act", json={"policy": policy, "state": TWO_FEATURES})
                if answer.status_code == 200:
                    explored[answer.json()["decision_id"]] += bool(answer.json()["explored"])

    def spent() -> bool:
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(explore, range(8)))
        return sum(explored.values()) >= 60

    until(spent, "exploration")
    windows = 2 + int((time.monotonic() - began_s) / 10)  # that can have been touched
    assert sum(explored.values()) <= 40 * windows
    assert scrape(crew)["surefoot_explored_total"] == sum(explored.values())


def test_changes_at_both_workers_make_one_chain_and_tokens_hold_at_both(
    crew: Server, policy: str, stack: ExitStack
) -> None:
    start(crew)
    admin = stack.enter_context(closing(Admin(crew)))
    admin.pushed(policy, "v1")
    until(lambda: everywhere(crew, f"/admin/policies/{policy}", 200), "the version at both")

    def anew(method: str, path: str, **options: Any) -> httpx.Response:
        """Ask on a new connection."""
        return httpx.request(method, crew.url + path, timeout=30.0, **{"headers": AUTHORIZED} | options)

    def change(number: int) -> int:
        tag = anew("GET", f"/admin/policies/{policy}").headers["etag"]
        body = admin.view(policy)["deployment"] | {"champion": "v1"}
        headers = AUTHORIZED | {"If-Match": tag}
        return anew("PUT", f"/admin/policies/{policy}/deployment", json=body, headers=headers).status_code

    with ThreadPoolExecutor(8) as pool:
        answers = Counter(pool.map(change, range(40)))
    assert answers.keys() <= {200, 412}
    made = anew("POST", "/admin/tokens", json={"role": "viewer", "owner": "eve"})
    assert made.status_code == 201, made.text
    bearer = f"Bearer {made.json()['token']}"
    until(lambda: everywhere(crew, "/admin/policies", 200, Authorization=bearer), "the token at both")
    assert anew("DELETE", f"/admin/tokens/{made.json()['id']}").status_code in (200, 204)
    # 429: who goes on with a revoked token is taken for one who guesses. A token that stands is never told so.
    until(lambda: everywhere(crew, "/admin/policies", 401, 429, Authorization=bearer), "its end at both")
    until(lambda: scrape_as_admin(crew)["surefoot_audit_unchained"] == 0, "the chain")
    chains = [crew.data_dir / "audit" / f"chain-{number}.jsonl" for number in range(2)]
    until(lambda: len({path.read_bytes() for path in chains}) == 1, "the same chain in both files")
    lines = chains[0].read_bytes().splitlines()
    assert verify(lines).seq == len(lines)
    done = [line for line in lines if b"generation_moved" not in line and policy.encode() in line]
    assert len(done) >= answers[200]


def scrape_as_admin(server: Server) -> dict[str, float]:
    text = httpx.get(f"{server.url}/metrics", headers=AUTHORIZED).raise_for_status().text
    return {sample.name: sample.value for family in text_string_to_metric_families(text) for sample in family.samples}


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("SUREFOOT_")}
    command = [sys.executable, "-m", "service.cli", *arguments]
    return subprocess.run(command, env=clean | environment, capture_output=True, text=True, timeout=60)


def test_a_start_that_cannot_succeed_is_given_up_with_one_reason(tmp_path: Path) -> None:
    missing = str(tmp_path / "none")
    said = {"SUREFOOT_DATA_DIR": str(tmp_path / "data"), "SUREFOOT_PORT": "0", "SUREFOOT_POLICIES": missing}
    refused = run("serve", "--workers", "3", **said)
    assert refused.returncode == 1
    assert missing in refused.stderr
    assert len(re.findall('"event": "worker_started"', refused.stderr + refused.stdout)) == 1


def test_the_number_of_workers_is_an_option_and_a_setting(tmp_path: Path) -> None:
    shown = run("config", "show", SUREFOOT_WORKERS="4")
    assert "SUREFOOT_WORKERS=4  # " in shown.stdout
    for refused in (
        run("serve", "--workers", "0", SUREFOOT_DATA_DIR=str(tmp_path / "data")),
        run("serve", "--workers", "1000", SUREFOOT_WORKERS="2", SUREFOOT_DATA_DIR=str(tmp_path / "data")),
    ):
        assert refused.returncode == 1
        assert "SUREFOOT_WORKERS" in refused.stderr
    assert not (tmp_path / "data").exists()
