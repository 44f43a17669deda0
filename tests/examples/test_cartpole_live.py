"""Real episodes through a real service: what is streamed is what was played, even when the service is killed."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from surefoot.streams import tail
from tests.conftest import Server, new_server
from tests.waiting import until

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture
def fresh(tmp_path: Path) -> Iterator[Server]:
    mine = new_server(tmp_path)
    mine.start()
    yield mine
    if mine.process is not None and mine.process.poll() is None:
        mine.stop()


def play(server: Server, journal: Path, episodes: int) -> subprocess.Popen[str]:
    program = [sys.executable, str(ROOT / "examples" / "cartpole" / "play.py")]
    options = ["--url", server.url, "--episodes", str(episodes), "--journal", str(journal), "--no-progress"]
    return subprocess.Popen([*program, *options], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def lines(journal: Path, call: str, event: str) -> list[dict[str, Any]]:
    read = [json.loads(line) for line in journal.read_text().splitlines()]
    return [line for line in read if (line["call"], line["event"]) == (call, event)]


def streamed(server: Server) -> list[dict[str, Any]]:
    return list(tail("cartpole", server.redis_url))


def test_the_stream_holds_exactly_the_episodes_that_were_played(fresh: Server, tmp_path: Path) -> None:
    journal = tmp_path / "journal.jsonl"
    with play(fresh, journal, episodes=4) as player:
        output, errors = player.communicate(timeout=120)
    assert player.returncode == 0, errors
    found = re.search(r"^v2: mean return ([\d.]+) over 4 episodes", output, re.MULTILINE)
    assert found, output
    assert float(found[1]) >= 450
    acted = lines(journal, "act", "acked")
    until(lambda: len(streamed(fresh)) >= len(acted))
    transitions = {each["id"]: each for each in streamed(fresh)}
    assert len(streamed(fresh)) == len(transitions) == len(acted)
    states = {(line["episode"], line["step"]): line["state"] for line in lines(journal, "act", "issued")}
    ends = {(line["episode"], line["step"]): line for line in lines(journal, "reward", "issued")}
    steps: dict[str, set[int]] = defaultdict(set)
    for line in acted:
        each, place = transitions[line["decision_id"]], (line["episode"], line["step"])
        steps[line["episode"]].add(line["step"])
        assert (each["episode"], each["step"], each["action"]) == (*place, line["action"])
        assert (
            each["propensity"]
            == line["propensity"]
            == pytest.approx(0.01 if each["action"] != each["proposed"] else 0.99)
        )
        np.testing.assert_array_equal(np.float32(each["state"]), np.float32(states[place]))
        sent = ends[place]
        assert (each["reward"], each["terminated"], each["truncated"]) == (1.0, sent["terminated"], sent["truncated"])
        follower = states.get((place[0], place[1] + 1), sent["next_state"])
        if sent["terminated"]:
            assert (each["end"], each["bootstrap"], each["next_state"]) == ("terminated", False, None)
        else:
            assert (each["end"], each["bootstrap"]) == ("truncated" if sent["truncated"] else "none", True)
            np.testing.assert_array_equal(np.float32(each["next_state"]), np.float32(follower))
    assert all(played == set(range(len(played))) for played in steps.values())


def test_episodes_ride_through_a_sigkill_and_nothing_acknowledged_is_lost(fresh: Server, tmp_path: Path) -> None:
    journal = tmp_path / "journal.jsonl"
    with play(fresh, journal, episodes=4) as player:
        until(lambda: journal.exists() and len(lines(journal, "reward", "acked")) > 300)
        fresh.kill()
        fresh.start()
        output, errors = player.communicate(timeout=180)
    assert player.returncode == 0, errors
    acted = {line["decision_id"] for line in lines(journal, "act", "acked")}
    rewarded = {line["decision_id"] for line in lines(journal, "reward", "acked")}
    assert acted == rewarded
    until(lambda: {each["id"] for each in streamed(fresh)} >= acted)
    transitions = [each for each in streamed(fresh) if each["id"] in acted]
    assert len(transitions) == len(acted)
    assert {each["join"] for each in transitions} == {"joined"}
    assert "0 fallbacks" in output
