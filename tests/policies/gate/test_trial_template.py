"""Trials that are forked: they say what trials say that are started alone, and leave as little behind."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from policies.confine import Limits
from policies.errors import BundleError
from policies.trial import try_bundle
from policies.trial_template import Template
from tests.policies.gate import hostile
from tests.policies.gate.cases import HURRIED, TIGHT, Files, around
from tests.policies.gate.test_trial import bundle_files_with_wrong_outputs
from tests.policies.networks import identity_files
from tests.waiting import until

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks")
GONE = (FileNotFoundError, ProcessLookupError)
STARVED = Limits(memory_bytes=64 << 20, memory_factor=0)


@pytest.fixture
def template() -> Iterator[Template]:
    with Template() as template:
        yield template
    assert not of_trials()


def of_trials() -> dict[int, list[int]]:
    """Processes of trials that this one has started, and what each has started."""
    found = {}
    for pid in (pid for task in os.listdir("/proc/self/task") for pid in children(os.getpid(), task)):
        with suppress(*GONE):
            if b"policies.trial_child" in Path(f"/proc/{pid}/cmdline").read_bytes():
                found[pid] = children(pid, str(pid))
    return found


def children(pid: int, task: str) -> list[int]:
    try:
        return [int(each) for each in Path(f"/proc/{pid}/task/{task}/children").read_text().split()]
    except GONE:
        return []


def verdict(template: Template, files: Files, limits: Limits = TIGHT) -> str:
    try:
        try_bundle(files, limits, run=template.run)
    except BundleError as error:
        return str(error.check)
    return "passed"


def test_each_gets_its_own_verdict_from_one_process(template: Template) -> None:
    assert verdict(template, identity_files()) == "passed"
    (process,) = of_trials()
    for files, limits, expected in (
        (around(hostile.constant_of_shape()), TIGHT, "memory"),
        (around(hostile.loop(None)), Limits(cpu_s=1), "cpu_time"),
        (around(hostile.loop(None)), HURRIED, "wall_time"),
        (identity_files(), STARVED, "memory"),
        (bundle_files_with_wrong_outputs(), TIGHT, "golden"),
        (identity_files(description="another"), TIGHT, "passed"),
    ):
        assert verdict(template, files, limits) == expected
        assert of_trials() == {process: []}


def test_none_is_started_for_nothing() -> None:
    with Template():
        assert not of_trials()


def test_a_fork_has_no_secret_no_socket_and_its_own_limits(template: Template, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SUREFOOT_ADMIN_TOKEN", "very-secret")
    said: list[str] = []
    loop = around(hostile.loop(None))
    trial = threading.Thread(target=lambda: said.append(verdict(template, loop, Limits(cpu_s=2))))
    trial.start()
    until(lambda: any(of_trials().values()), "the fork")
    ((pid,),) = of_trials().values()
    until(lambda: "2" in line(pid, "Max cpu time"), "its limits")
    opened = {number: os.readlink(f"/proc/{pid}/fd/{number}") for number in os.listdir(f"/proc/{pid}/fd")}
    environment = Path(f"/proc/{pid}/environ").read_bytes()
    trial.join()
    assert b"SUREFOOT_" not in environment
    assert not [name for name in opened.values() if name.startswith("socket:")]
    assert said == ["cpu_time"]


def line(pid: int, name: str) -> list[str]:
    limits = Path(f"/proc/{pid}/limits").read_text().splitlines()
    return next(each.split() for each in limits if each.startswith(name))


@pytest.mark.parametrize("when", ["before a trial", "in a trial"])
def test_without_the_process_a_trial_is_started_alone(template: Template, when: str) -> None:
    assert verdict(template, identity_files()) == "passed"
    (process,) = of_trials()
    if when == "before a trial":
        os.kill(process, 9)
    else:
        said: list[str] = []
        loop = around(hostile.loop(None))
        trial = threading.Thread(target=lambda: said.append(verdict(template, loop, Limits(cpu_s=30))))
        trial.start()
        until(lambda: any(of_trials().values()), "the fork")
        ((pid,),) = of_trials().values()
        os.kill(process, 9)
        trial.join()
        assert said == ["crash"]
        until(lambda: not Path(f"/proc/{pid}").exists(), "the end of the fork")
    assert verdict(template, identity_files()) == "passed"
    assert verdict(template, bundle_files_with_wrong_outputs()) == "golden"
