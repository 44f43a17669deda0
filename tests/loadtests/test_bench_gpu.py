"""The bare loop and the service beside it: every way gives the network's answers, on whatever devices there are."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from loadtests import bench_gpu
from loadtests.bare_session import WAYS, Bare, NoCudaError, Way, asker, open_session
from loadtests.networks import CONV, MEDIUM, SMALL, Network, model, states
from loadtests.results import Row

ROOT = Path(__file__).parents[2]


def cuda() -> bool:
    try:
        open_session(model(SMALL), "cuda")
    except NoCudaError:
        return False
    return True


@pytest.mark.parametrize("way", WAYS["cpu"])
@pytest.mark.parametrize("network", [SMALL, MEDIUM, CONV], ids=lambda each: each.name)
def test_every_way_on_the_cpu_answers_the_same(network: Network, way: Way) -> None:
    given = states(network, 3)
    expected = asker(model(network), "cpu", "plain", given)()
    bare = Bare(asker(model(network), "cpu", way, given), 3)
    np.testing.assert_allclose(bare.warm(), expected, rtol=1e-5)
    assert bare.measure(0.0) > 0


def test_a_kept_answer_is_not_overwritten_by_the_next() -> None:
    given = states(SMALL, 2)
    ask = asker(model(SMALL), "cpu", "bound", given)
    first = ask()
    kept = first.copy()
    given += 1.0
    assert not np.allclose(ask(), kept)
    np.testing.assert_array_equal(first, kept)


def test_that_cuda_is_missing_is_said_and_nothing_falls_back_unnoticed() -> None:
    if cuda():
        pytest.skip("this machine has CUDA")
    with pytest.raises(NoCudaError, match=r"CUDA"):
        open_session(model(SMALL), "cuda")


@pytest.mark.skipif(not cuda(), reason="no usable CUDA device on this machine")
@pytest.mark.parametrize("way", WAYS["cuda"])
@pytest.mark.parametrize("network", [SMALL, MEDIUM, CONV], ids=lambda each: each.name)
def test_every_way_on_cuda_answers_the_same(network: Network, way: Way) -> None:
    given = states(network, 5)
    expected = asker(model(network), "cpu", "plain", given)()
    np.testing.assert_allclose(
        Bare(asker(model(network), "cuda", way, given), 5).warm(), expected, rtol=0.01, atol=0.01
    )


def test_the_services_share_is_of_the_fastest_bare_way() -> None:
    def row(way: str, per_s: float) -> Row:
        return Row(bench_gpu.name("cpu", "small", way, 16), "", [{"per_s": per_s}])

    rows = {row.name: row for row in (row("plain", 400.0), row("bound", 200.0), row("service", 100.0))}
    shown = bench_gpu.tables(["cpu"], ["small", "medium"], [16, 64], rows)
    assert shown.splitlines()[-1].split() == ["16", "400", "200", "100", "0.25"]
    assert "medium" not in shown


def test_the_command_runs_to_its_end_without_a_gpu(tmp_path: Path) -> None:
    written = tmp_path / "gpu.json"
    command = [sys.executable, "-m", "loadtests.bench_gpu", "--cpu", "--quick", "--only", "small", "--only", "conv"]
    done = subprocess.run(
        [*command, "--size", "4", "--seconds", "0.1", f"--folder={tmp_path}", f"--json={written}"],
        cwd=ROOT, capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    document = json.loads(written.read_text())
    names = {f"cpu-{network}/{way}/4" for network in ("small", "conv") for way in (*WAYS["cpu"], "service")}
    assert {row["name"] for row in document["rows"]} == names
    assert {"gpu", "onnxruntime", "processor"} <= set(document["machine"])
    assert all(row["repetitions"][0]["per_s"] > 0 for row in document["rows"])
