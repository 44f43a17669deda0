"""The trial: what the child may take and see, that nothing of it stays, and what is remembered of its verdicts."""

from __future__ import annotations

import asyncio
import json
import os
import sys
import threading
from pathlib import Path

import pytest

from policies.confine import Limits
from policies.errors import BundleError
from policies.store import BUNDLED, read_folder
from policies.trial import run_trial, try_bundle
from tests.conftest import children
from tests.policies.gate import hostile
from tests.policies.gate.cases import STATES, TIGHT, around
from tests.policies.networks import identity_files
from tests.waiting import until

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def refusal(files: dict[str, bytes], limits: Limits = TIGHT, cache: Path | None = None) -> BundleError:
    with pytest.raises(BundleError) as caught:
        try_bundle(files, limits, cache)
    return caught.value


def child_of_this_test() -> int | None:
    """The process id of a running trial."""
    for task in os.listdir("/proc/self/task"):
        for pid in Path(f"/proc/self/task/{task}/children").read_text().split():
            if b"policies.trial_child" in Path(f"/proc/{pid}/cmdline").read_bytes():
                return int(pid)
    return None


def test_the_bundled_version_fits_its_memory_limit_twice() -> None:
    folder = BUNDLED / "cartpole" / "v2"
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert try_bundle(files).digest == read_folder(folder).digest
    outcome = run_trial(files)
    assert outcome.refusal is None
    assert 0 < 2 * outcome.peak_bytes < Limits().memory_bytes


@LINUX
def test_the_child_sees_no_secret_and_is_gone_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SUREFOOT_ADMIN_TOKEN", "very-secret")
    found: list[BundleError] = []
    trial = threading.Thread(target=lambda: found.append(refusal(around(hostile.loop(None)), Limits(cpu_s=2))))
    trial.start()
    until(child_of_this_test, "the child")
    pid = child_of_this_test()
    environment = Path(f"/proc/{pid}/environ").read_bytes()
    limits = Path(f"/proc/{pid}/limits").read_text()
    trial.join()
    assert b"very-secret" not in environment
    assert b"SUREFOOT_" not in environment
    assert "Max core file size" in limits
    assert [error.check for error in found] == ["cpu_time"]
    assert pid not in children(os.getpid())


@LINUX
def test_a_child_that_is_killed_is_a_refusal_like_any_other(tmp_path: Path) -> None:
    found: list[BundleError] = []
    files = around(hostile.loop(None))
    trial = threading.Thread(target=lambda: found.append(refusal(files, Limits(cpu_s=30), tmp_path)))
    trial.start()
    until(child_of_this_test, "the child")
    pid = child_of_this_test()
    assert pid is not None
    os.kill(pid, 9)
    trial.join()
    assert found[0].check == "crash"
    assert "SIGKILL" in found[0].detail
    assert not list(tmp_path.iterdir())


def test_a_bundle_that_needs_more_memory_than_python_is_refused_as_such() -> None:
    assert refusal(identity_files(), Limits(memory_bytes=64 << 20, memory_factor=0)).check == "memory"


def test_it_runs_beside_an_event_loop_and_several_at_once(tmp_path: Path) -> None:
    async def all_at_once() -> list[object]:
        bundles = [identity_files(description=str(i % 3)) for i in range(6)]
        bundles += [around(hostile.constant_of_shape())] * 2
        trials = (asyncio.to_thread(try_bundle, files, TIGHT, tmp_path) for files in bundles)
        return await asyncio.gather(*trials, return_exceptions=True)

    results = asyncio.run(all_at_once())
    assert [getattr(result, "check", "passed") for result in results] == ["passed"] * 6 + ["memory"] * 2
    assert len(list(tmp_path.iterdir())) == 4


def entries(folder: Path) -> list[Path]:
    return sorted(folder.iterdir()) if folder.exists() else []


def test_verdicts_are_remembered_for_bundle_and_limits(tmp_path: Path) -> None:
    cache = tmp_path / "verdicts"
    good, bad = identity_files(), bundle_files_with_wrong_outputs()
    first = try_bundle(good, TIGHT, cache)
    (entry,) = entries(cache)
    assert try_bundle(good, TIGHT, cache).digest == first.digest
    assert refusal(bad, TIGHT, cache).detail == refusal(bad, TIGHT, cache).detail
    assert len(entries(cache)) == 2
    kept = json.loads(entry.read_text())
    entry.write_text(json.dumps(kept | {"check": "golden", "detail": "what was remembered"}))
    assert refusal(good, TIGHT, cache).detail == "what was remembered"
    assert try_bundle(good, Limits(cpu_s=3), cache).digest == first.digest
    assert len(entries(cache)) == 3


def bundle_files_with_wrong_outputs() -> dict[str, bytes]:
    return identity_files() | {"golden.json": json.dumps({"states": STATES, "outputs": [[9, 9], [9, 9]]}).encode()}


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[]", b'{"key": "of another"}', b'{"key": 1}'])
def test_an_entry_that_cannot_be_read_is_as_none(content: bytes, tmp_path: Path) -> None:
    try_bundle(identity_files(), TIGHT, tmp_path)
    (entry,) = entries(tmp_path)
    entry.write_bytes(content)
    try_bundle(identity_files(), TIGHT, tmp_path)
    assert json.loads(entry.read_text())["check"] is None


def test_an_entry_of_another_bundle_is_as_none(tmp_path: Path) -> None:
    bad = bundle_files_with_wrong_outputs()
    refusal(bad, TIGHT, tmp_path)
    (entry,) = entries(tmp_path)
    try_bundle(identity_files(), TIGHT, tmp_path)
    (other,) = set(entries(tmp_path)) - {entry}
    entry.write_bytes(other.read_bytes())
    assert refusal(bad, TIGHT, tmp_path).check == "golden"


def test_what_may_be_the_machines_fault_is_not_remembered(tmp_path: Path) -> None:
    cache = tmp_path / "verdicts"
    assert refusal(around(hostile.loop(None)), Limits(cpu_s=1), cache).check == "cpu_time"
    assert not entries(cache)


def test_a_cache_that_cannot_be_written_changes_no_verdict(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert try_bundle(identity_files(), TIGHT, tmp_path / "file").policy == "toy"
    assert refusal(bundle_files_with_wrong_outputs(), TIGHT, tmp_path / "file").check == "golden"
