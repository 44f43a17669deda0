"""Stages: from call stacks to a stage each, from samples to shares, and a real server looked into."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from loadtests import sampling, stages
from loadtests.sampling import Busy, Profile, Stack, read, shares
from loadtests.stage_map import LOOP, OTHER, STAGES, Frame, stage_of, waits
from tests.waiting import until

ROOT = Path(__file__).parents[2]
RUN = ("run", "asyncio/runners.py")
ACT = ("Decider._settle", "service/act.py")


def stack(*frames: tuple[str, str]) -> list[Frame]:
    return [Frame(*each) for each in frames]


@pytest.mark.parametrize(
    ("frames", "stage"),
    [
        ([RUN], LOOP),
        ([RUN, ACT], "route and name"),
        ([RUN, ACT, ("judge", "service/judge.py"), ("all", "numpy/_core/_methods.py")], "rules"),
        ([RUN, ACT, ("Recheck.broken", "safety/recheck.py"), ("view_of", "safety/expression.py")], "last look"),
        ([RUN, ACT, ("ForbidEvaluator.judge", "safety/forbid.py"), ("view_of", "safety/expression.py")], "rules"),
        ([RUN, ("RequestResponseCycle.send", "uvicorn/protocols/http/httptools_impl.py")], "answer and write"),
        ([RUN, ("HttpToolsProtocol.data_received", "uvicorn/protocols/http/httptools_impl.py")], "read and parse HTTP"),
        ([RUN, ("HotRoutes._act", "service/hot.py"), ("decode_act", "service/wire.py")], "decode the body"),
        ([RUN, ("HotRoutes._decide_one", "service/hot.py"), ("encode", "service/wire.py")], "answer and write"),
        ([("_run", "service/writer.py"), ("execute", "sqlite3/dbapi2.py")], "commit"),
        ([RUN, ACT, ("quick", "service/quick.py"), ("all", "numpy/_core/_methods.py")], f"{OTHER}: service/quick.py"),
        ([("run", "threading.py")], f"{OTHER}: threading.py"),
        ([], OTHER),
    ],
)
def test_the_innermost_file_that_belongs_to_a_stage_decides(frames: list[tuple[str, str]], stage: str) -> None:
    assert stage_of(stack(*frames)) == stage


def test_the_map_names_files_that_exist() -> None:
    """A stage whose files have all gone would silently be nothing."""
    for stage, patterns in STAGES:
        ours = [each.partition(":")[0] for each in patterns if each.startswith(("service/", "safety/", "policies/"))]
        assert not ours or any(list(ROOT.glob(each)) for each in ours), stage


def test_py_spys_lines_are_read() -> None:
    lines = [
        "thread (7): MainThread;<module> (service/worker.py:147);f.<locals>.<listcomp> (service/act.py:3) 12",
        "thread (8): spool-writer;Writer._take (service/writer.py:88) 3",
        "no thread;f (a.py:1) 4",
        "",
    ]
    assert list(read(lines)) == [
        Stack(7, (Frame("<module>", "service/worker.py"), Frame("f.<locals>.<listcomp>", "service/act.py")), 12),
        Stack(8, (Frame("Writer._take", "service/writer.py"),), 3),
    ]


def test_a_thread_that_waits_is_known() -> None:
    assert waits(stack(("Writer._run", "service/writer.py"), ("Writer._take", "service/writer.py")))
    assert waits(stack(("Condition.wait", "threading.py")))
    assert not waits(stack(("Condition.wait", "threading.py"), ACT))
    assert not waits([])


def profile(*stacks: tuple[int, tuple[str, str], int], seconds: float = 10.0) -> Profile:
    return Profile([Stack(thread, (Frame(*frame),), seen) for thread, frame, seen in stacks], seconds)


def close(found: Mapping[str, float], wanted: Mapping[str, float]) -> bool:
    return found == pytest.approx(wanted)


def test_processor_time_is_shared_out_by_thread_and_then_by_samples() -> None:
    """Thread 1 uses 0.8 of a core, 300 of its samples in one stage and 100 in another; thread 2 uses 0.2."""
    seen = profile(
        (1, ("f", "service/judge.py"), 300), (1, ("f", "service/record.py"), 100), (2, ("f", "service/ledger.py"), 400)
    )  # fmt: skip
    assert close(shares(seen, {1: Busy(0.8, 0.8), 2: Busy(0.2, 0.2)}), {"rules": 0.6, "record": 0.2, "commit": 0.2})


def test_waiting_counts_as_far_as_other_samples_do_not_explain_the_time() -> None:
    """1,000 samples in all; at work half of the time makes 500, of which 300 were elsewhere: 200 are the loop's own."""
    seen = profile((1, ("f", "service/judge.py"), 300), (1, RUN, 700))
    assert close(shares(seen, {1: Busy(0.1, 0.5)}), {"rules": 0.6, LOOP: 0.4}), "it mostly waited for a core"
    assert close(shares(seen, {1: Busy(0.2, 0.2)}), {"rules": 1.0, LOOP: 0.0})
    assert close(shares(seen, {1: Busy(1.0, 1.0)}), {"rules": 0.3, LOOP: 0.7})


def test_threads_that_used_nothing_or_were_not_seen_have_no_share() -> None:
    seen = profile((1, ("f", "service/judge.py"), 10), (2, ("_worker", "concurrent/futures/thread.py"), 10))
    assert close(shares(seen, {1: Busy(0.5, 0.5), 2: Busy(0.0, 0.0), 3: Busy(0.5, 0.5)}), {"rules": 1.0})
    assert shares(seen, {}) == {}
    assert close(shares(seen, {2: Busy(0.1, 0.1)}), {"loops behind": 1.0}), "all that it did was there"


def test_the_table_has_every_stage_that_took_time_and_what_is_in_no_list_by_name() -> None:
    shown = stages.stages_table(
        {"c1": {"rules": 20.0, f"{OTHER}: service/quick.py": 3.0, "infer": 0.001, stages.STORE: 30.0}}
    )
    lines = {line.split("  ")[0]: line.split()[-1] for line in shown.splitlines()}
    assert lines["rules"] == "20.0"
    assert lines["other: service/quick.py"] == "3.0"
    assert lines["all of it"] == "23.0"
    assert lines[stages.STORE] == "30.0"
    assert "infer" not in lines


spying = pytest.mark.skipif(
    shutil.which("py-spy") is None or shutil.which("wrk") is None, reason="py-spy or wrk is not installed"
)


@spying
def test_threads_of_a_process_are_told_apart(tmp_path: Path) -> None:
    """One thread works in a function of its own, another one waits."""
    program = tmp_path / "program.py"
    program.write_text(
        "import threading\n"
        "def work():\n    while True:\n        sum(range(1000))\n"
        "threading.Thread(target=work, daemon=True).start()\nthreading.Event().wait()\n"
    )
    process = subprocess.Popen([sys.executable, str(program)])
    try:
        until(lambda: sum(used_s for _, used_s in sampling.threads(process.pid).values()) > 0.2, "some work")
        busy = sampling.watch(process.pid, 0.5)
        found = sampling.record(process.pid, 1.0, tmp_path / "samples.txt")
    finally:
        process.kill()
        process.wait()
    working = {each.thread for each in found.stacks for frame in each.frames if frame.function == "work"}
    assert len(working) == 1
    assert busy[working.pop()].at_work > 0.5 > busy[process.pid].at_work
    assert sampling.shares(found, busy)[f"{OTHER}: program.py"] > 0.9


@spying
def test_the_command_shares_out_what_a_decision_costs(tmp_path: Path) -> None:
    written = tmp_path / "stages.json"
    command = [sys.executable, "-m", "loadtests.stages", "--quick", "--seconds", "1", "--only", "of-16"]
    done = subprocess.run(
        [*command, f"--folder={tmp_path}", f"--json={written}"],
        cwd=ROOT, capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    (found,) = json.loads(written.read_text())["loads"].values()
    deciding = ("route and name", "infer", "rules", "explore and draw", "last look", "record")
    assert len([stage for stage in deciding if found.get(stage)]) >= 3, "a second shows most stages, if not each"
    for stage in deciding:
        assert stage not in found or found[stage] < 0.05 or f"{found[stage]:.1f}" in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["stages.json"]


def test_without_py_spy_it_says_how_to_get_it() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "loadtests.stages"],
        cwd=ROOT, env=os.environ | {"PATH": ""}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert "Install it with" in done.stderr
