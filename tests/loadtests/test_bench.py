"""The benchmark as a user starts it: numbers come out, nothing stays behind, what is missing is said."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from loadtests import bodies, processes, wrk
from loadtests.cases import EMPTY, FASTAPI, GROUPS, PEERS, SUREFOOT, Spec, chosen
from loadtests.measuring import asking
from loadtests.networks import CONV, MEDIUM, SMALL, Network, contextual, thresholds, write_policy
from loadtests.open_loop import OpenLoop
from loadtests.processes import Cores
from loadtests.servers import Running, interpreter, post, running
from loadtests.targets import ROWS
from tests.waiting import gone, until

ROOT = Path(__file__).parents[2]
CORES = Cores.among(os.sched_getaffinity(0))
ENVIRONMENTS = Path(os.environ.get("BENCH_PEERS", ROOT / "build" / "peers"))


def bench(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "loadtests.bench", *arguments]
    env = os.environ | environment
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=240, check=False)


def test_a_short_run_gives_figures_for_every_row(tmp_path: Path) -> None:
    short = ["--repetitions", "2", "--seconds", "0.2", "--warm-s", "0.1", "--rate", "100"]
    only = ["--only=base/*/open", f"--folder={tmp_path}", f"--json={tmp_path / 'out.json'}"]
    done = bench(*short, *only)
    assert done.returncode == 0, done.stderr + done.stdout
    written: dict[str, Any] = json.loads((tmp_path / "out.json").read_text())
    assert [row["name"] for row in written["rows"]] == [
        f"base/{each}/open" for each in ("empty", "fastapi", "surefoot")
    ]
    for row in written["rows"]:
        assert len(row["repetitions"]) == 2
        for sample in row["repetitions"]:
            assert sample["decisions"] == 20, "all were answered"
            assert sample["refused"] == sample["failed"] == sample["given up"] == 0
        assert all(row["median"][figure] > 0 for figure in ("per_s", "p50_us", "p99_us", "p999_us", "peak_mb"))
        assert row["command"].startswith("python -m loadtests.bench --only 'base/*/open' --repetitions 2")
        assert row["name"] in done.stdout
    assert [row["ratio"] for row in written["rows"]] == [{}, {}, {}], "the rate was given"
    assert "not measured" in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["out.json"], "servers' folders are gone"


def test_several_runs_are_told_each_and_then_together(tmp_path: Path) -> None:
    written = tmp_path / "out.json"
    short = ["--quick", "--seconds", "0.2", "--warm-s", "0.1", "--rate", "100", "--only=base/empty/open"]
    done = bench(*short, "--runs", "2", f"--folder={tmp_path}", f"--json={written}")
    assert done.returncode == 0, done.stderr + done.stdout
    assert "run 1 of 2" in done.stdout
    assert done.stdout.splitlines()[-1].split() == ["target", "wanted", "run", "1", "run", "2"], "no target is about it"
    runs = json.loads(written.read_text())["runs"]
    assert [[row["name"] for row in run["rows"]] for run in runs] == [["base/empty/open"]] * 2
    assert [path.name for path in tmp_path.iterdir()] == ["out.json"]


def test_what_targets_need_can_be_listed() -> None:
    assert set(bench("--list", "--targets").stdout.split()) == set(ROWS)


def test_processor_time_is_finer_than_a_tick_and_gone_processes_count_as_nothing() -> None:
    process = subprocess.Popen([sys.executable, "-c", "import time\nwhile True: pass"])
    try:
        until(lambda: processes.cpu_s([process.pid]) > 0.05, "some work")
        assert any(round(processes.cpu_s([process.pid]) * 1e6) % 10_000 for _ in range(5))
    finally:
        process.kill()
        process.wait()
    assert processes.cpu_s([process.pid]) == 0.0


def test_without_wrk_it_says_how_to_get_it() -> None:
    done = bench("--quick", "--only", "base", PATH="")
    assert done.returncode == 2
    assert "apt-get install wrk" in done.stderr


def test_an_unknown_row_is_told_with_those_there_are() -> None:
    done = bench("--only", "bas")
    assert (done.returncode, done.stdout) == (2, "")
    assert "bas is no row; groups are base, durability" in done.stderr


def test_the_rows_can_be_listed() -> None:
    done = bench("--list", "--only", "conv")
    assert done.stdout.split() == ["conv/fastapi/c4", "conv/surefoot/c4", "conv/surefoot-raw/c4"]


@pytest.mark.parametrize("spec", [EMPTY, FASTAPI, SUREFOOT], ids=lambda spec: spec.name)
def test_a_server_is_pinned_answers_and_leaves_nobody_behind(spec: Spec, tmp_path: Path) -> None:
    asked = bodies.acts(SMALL)
    with running(spec, tmp_path / "server", CORES) as server:
        everybody = processes.tree(server.process.pid)
        for pid in everybody:
            wanted = CORES.store if processes.is_store(pid) else CORES.server
            assert os.sched_getaffinity(pid) == {wanted}
        assert any(map(processes.is_store, everybody)) == (spec.kind == "surefoot")
        before = server.cpu_s()
        found = OpenLoop(server.port, asked.requests(), connections=2).run(rate=200.0, seconds=0.5)
        assert found.statuses == {200: 100}
        assert sum(server.cpu_s()) >= sum(before)
        assert server.peak_mb() > 10
        assert server.unshipped() >= 0
    assert [pid for pid in everybody if Path(f"/proc/{pid}").exists()] == []


def test_what_a_server_leaves_behind_is_ended(tmp_path: Path) -> None:
    """A shell that leaves at once when told so, and forgets the program that it has started."""
    process = subprocess.Popen(["sh", "-c", "sleep 1000 & wait"])
    until(lambda: len(processes.tree(process.pid)) == 2, "the program")
    everybody = processes.tree(process.pid)
    Running(EMPTY, process, 0, 0.0, tmp_path / "log").stop()
    until(lambda: all(map(gone, everybody)), "the end of both")


@pytest.mark.parametrize("kind", PEERS)
def test_a_peer_answers_what_fastapi_answers(kind: str, tmp_path: Path) -> None:
    if not interpreter(ENVIRONMENTS, kind).exists():
        pytest.skip(f"no {kind} in {ENVIRONMENTS}: docs/performance.md says how it comes there")
    entries = [entry for group in chosen(["peers"], installed=[kind]) for entry in group.entries]
    found = {}
    for spec in (FASTAPI, PEERS[kind]):
        (asked, *_) = [asking(entry) for entry in entries if entry.spec == spec]
        with running(spec, tmp_path / spec.name, CORES, peers=ENVIRONMENTS) as server:
            answers = [post(server.port, asked.path, body, asked.headers) for body in asked.bodies[:16]]
        assert {status for status, _ in answers} == {200}, answers
        found[spec] = [values(json.loads(text)) for _, text in answers]
    assert found[PEERS[kind]] == pytest.approx(found[FASTAPI], rel=1e-4)


def values(answer: dict[str, Any]) -> float:
    """The largest value: it tells network and state."""
    return float(max(answer["outputs"][0]["data"] if "outputs" in answer else answer["values"]))


def test_what_is_measured_are_decisions_that_rules_change_and_exploration_varies(tmp_path: Path) -> None:
    asked = bodies.acts(SMALL)
    with running(SUREFOOT, tmp_path / "server", CORES) as server:
        answers = [json.loads(post(server.port, asked.path, body, asked.headers)[1]) for body in asked.bodies]
        batch = bodies.batches(SMALL, 64)
        columns = json.loads(post(server.port, batch.path, batch.bodies[0], batch.headers)[1])
    assert all(each["fallback"] is None and each["logged"] for each in answers)
    assert {each["exploration"]["epsilon"] for each in answers} == {0.05}
    assert len({each["action"] for each in answers}) > 1
    assert 0 < sum(each["safety"]["overridden"] for each in answers) < len(answers)
    assert len(set(columns["decision_id"])) == 64
    assert not any(columns["fallback"])


@pytest.mark.skipif(shutil.which("wrk") is None, reason="wrk is not installed")
def test_wrk_drives_every_kind_of_body(tmp_path: Path) -> None:
    with running(EMPTY, tmp_path / "server", CORES) as server:
        for number, asked in enumerate((bodies.acts(SMALL), bodies.acts(CONV, raw=True), bodies.batches(SMALL, 16))):
            folder = tmp_path / str(number)
            folder.mkdir()
            script = wrk.write_script(folder, asked.path, asked.headers, asked.bodies)
            found = wrk.run(wrk.command(server.port, script, connections=2, seconds=1.0))
            assert found.requests > 0
            assert (found.refused, found.failed) == (0, 0)


def test_ended_early_it_stops_what_it_has_started(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "loadtests.bench", "--only", "base/surefoot/open", "--seconds", "60"]
    process = subprocess.Popen([*command, "--folder", str(tmp_path)], cwd=ROOT, stdout=subprocess.DEVNULL)
    try:
        until(lambda: any(map(processes.is_store, processes.tree(process.pid))), "the server's start")
        everybody = processes.tree(process.pid)
    finally:
        process.terminate()
        process.wait(60)
    left = [pid for pid in everybody if not gone(pid)]
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert left == []
    assert list(tmp_path.iterdir()) == []


def test_every_kind_of_body_is_taken(tmp_path: Path) -> None:
    """By a server each with the network it is meant for, all rules in force, a shadow watching."""
    specs = {
        SMALL: (
            Spec("small", rules=20, context_rules=3, shadow=True),
            [bodies.acts(SMALL), bodies.batches(SMALL, 1024)],
        ),
        CONV: (Spec("conv", network="conv", rules=0), [bodies.acts(CONV), bodies.acts(CONV, raw=True)]),
    }
    for network, (spec, askings) in specs.items():
        with running(spec, tmp_path / network.name, CORES) as server:
            for asked in askings:
                found = OpenLoop(server.port, asked.requests(), 1, patience_s=30.0).run(rate=100.0, seconds=0.04)
                assert found.statuses == {200: 4}, server.log.read_text()


def test_fastapi_takes_images(tmp_path: Path) -> None:
    with running(Spec("fastapi", "fastapi", network="conv"), tmp_path / "server", CORES) as server:
        found = OpenLoop(server.port, bodies.acts(CONV).requests(), 1, patience_s=30.0).run(rate=100.0, seconds=0.02)
    assert found.statuses == {200: 2}


@pytest.mark.parametrize("network", [SMALL, MEDIUM], ids=lambda each: each.name)
def test_policies_pass_the_services_own_check(network: Network, tmp_path: Path) -> None:
    write_policy(tmp_path, network, rules=[*thresholds(20), *contextual(3)], shadow=True)
    folder = tmp_path / "bench"
    for command in (
        ["policy", "check", str(folder / "v1")],
        ["policy", "check", str(folder / "v2")],
        ["safety", "check", str(folder / "safety.yaml"), "--policy-bundle", str(folder / "v1")],
    ):
        done = subprocess.run(
            [sys.executable, "-m", "service.cli", *command], cwd=ROOT, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr


def test_wrks_figures_are_read_from_among_what_else_it_prints() -> None:
    line = 'RESULT {"requests": 1000, "duration_us": 2000000, "refused": 100, "failed": 1, '
    line += '"p50_us": 5, "p99_us": 6, "p999_us": 7}'
    found = wrk.read(f"Running 1s test\n  1 threads\n{line}\n")
    assert (found.per_s, found.failed, found.p999_us) == (450.0, 1, 7)
    with pytest.raises(RuntimeError, match="unable to connect"):
        wrk.read("Running 1s test", "unable to connect")


def test_cores_are_dealt_out() -> None:
    assert Cores.among({0}) == Cores(server=0, driver=0, store=0)
    assert Cores.among({4, 5}) == Cores(server=4, driver=5, store=5)
    assert Cores.among({4, 5}, "server") == Cores(server=4, driver=5, store=4)
    assert Cores.among({1, 2, 3}) == Cores(server=1, driver=2, store=3)


def test_the_page_names_every_group_and_no_other() -> None:
    page = (ROOT / "docs" / "performance.md").read_text()
    assert re.findall(r"^\| `([a-z]+)` \|", page, re.MULTILINE) == [group.name for group in GROUPS]
