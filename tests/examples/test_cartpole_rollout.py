"""The rollout example: spoiled versions pass for sound ones, and a short run of it ends as the long one does."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from examples.cartpole.crowd import Period, Tally
from examples.cartpole.rollout import Result, table
from examples.cartpole.spoil import EDGE, FAULTS, spoil
from policies.manifest import GOLDEN, MANIFEST, MODEL
from policies.trial import try_bundle

ROOT = Path(__file__).parents[2]
SOUND = ROOT / "policies" / "bundles" / "cartpole" / "v2"
MIDDLE, OUTSIDE = [0.5 * EDGE, 0.0, 0.01, 0.0], [-1.1 * EDGE, 0.0, 0.01, 0.0]


def answers(folder: Path, *states: list[float]) -> np.ndarray:
    session = onnxruntime.InferenceSession(folder / MODEL, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {"observation": np.array(states, np.float32)})[0])


@pytest.mark.parametrize("fault", FAULTS)
def test_a_spoiled_version_passes_every_check_of_a_load(fault: str, tmp_path: Path) -> None:
    spoil(SOUND, fault, tmp_path / "v3")
    files = {name: (tmp_path / "v3" / name).read_bytes() for name in (MANIFEST, MODEL, GOLDEN)}
    assert try_bundle(files, cache=tmp_path / "trials").version == "v3"
    assert np.isfinite(answers(tmp_path / "v3", MIDDLE)).all()


def test_it_answers_nan_behind_the_edge_and_there_only(tmp_path: Path) -> None:
    spoil(SOUND, "nan", tmp_path / "v3")
    found = answers(tmp_path / "v3", MIDDLE, OUTSIDE)
    assert np.isnan(found).all(axis=1).tolist() == [False, True]
    assert found[0].argmax() == answers(SOUND, MIDDLE)[0].argmax()


def test_the_slow_one_answers_as_the_sound_one_does(tmp_path: Path) -> None:
    spoil(SOUND, "slow", tmp_path / "v3")
    np.testing.assert_array_equal(answers(tmp_path / "v3", MIDDLE, OUTSIDE), answers(SOUND, MIDDLE, OUTSIDE))


def test_the_crowds_counts_of_a_stretch_of_time() -> None:
    before = Tally(Counter(v1=10, v2=5), Counter(v1=2, v2=1), Counter(), episodes=3)
    after = Tally(Counter(v1=20, v2=9), Counter(v1=4, v2=2), Counter(), episodes=6)
    assert after.since(before, "v2") == Period(decisions=14, episodes=3, own_decisions=4, own_episodes=1)
    assert after.copy().since(after, "v2") == Period(0, 0, 0, 0)


@pytest.mark.parametrize(
    ("stage", "stays", "wanted"),
    [("quarantined", True, True), ("quarantined", False, False), ("canary", True, False), ("champion", True, False)],
)
def test_a_bad_version_should_be_quarantined_and_stay_away(stage: str, stays: bool, wanted: bool) -> None:
    result = Result("v3-nan", stage, 1.0, Period(1, 1, 1, 1), "its breaker tripped", 0.01, stays)
    assert result.as_wanted is wanted
    assert ("NOT AS IT SHOULD" in table([result])) is not wanted


def test_a_better_version_walks_to_the_top_and_a_worse_one_and_a_broken_one_back() -> None:
    """Few seats and one step: an episode is short in time, and half of them try the new version."""
    program = [sys.executable, str(ROOT / "examples" / "cartpole" / "rollout.py")]
    options = ["--seats", "16", "--steps", "0.5", "--hold-s", "1", "--min-units", "8"]
    trials = ["--trials", "v2", "v3-worse", "v3-nan"]
    done = subprocess.run([*program, *options, *trials], cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = {line.split(" | ")[0]: line for line in done.stdout.splitlines() if line.startswith("| v")}
    assert "| champion |" in rows["| v2"]
    assert "return +" in rows["| v2"]
    assert "| quarantined |" in rows["| v3-worse"]
    assert "return -" in rows["| v3-worse"]
    assert "tripped" in rows["| v3-nan"]  # its shadow, or its breaker in the canary: wherever the cart goes first
