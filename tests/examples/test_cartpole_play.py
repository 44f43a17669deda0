"""What `play.py` counts, writes and refuses, apart from the service it plays against."""

from __future__ import annotations

import io
import json
from collections import Counter

import pytest

from examples.cartpole.play import Episode, Journal, parse, report


def test_the_report_gives_the_mean_return_by_version_and_the_totals() -> None:
    episodes = [
        Episode("a", 0, total=500, steps=500, explored=9, versions=Counter(v2=500)),
        Episode("b", 1, total=400, steps=400, explored=0, versions=Counter(v2=400)),
        Episode("c", 2, total=100, steps=100, explored=1, fallbacks=3, versions=Counter(v2=40, v1=60)),
    ]
    assert report(episodes).splitlines() == [
        "v1+v2: mean return 100.0 over 1 episodes (least 100, most 100)",
        "v2: mean return 450.0 over 2 episodes (least 400, most 500)",
        "1000 steps, 10 explored (1.00%), 3 fallbacks",
    ]


def test_the_journal_writes_a_whole_json_line_at_once() -> None:
    file = io.StringIO()
    Journal(file).write("act", "issued", episode="e", step=0, state=[0.1, -0.2, 0.0, 1.0])
    assert file.getvalue().endswith("\n")
    assert json.loads(file.getvalue()) == {
        "call": "act",
        "event": "issued",
        "episode": "e",
        "step": 0,
        "state": [0.1, -0.2, 0.0, 1.0],
    }


def test_without_a_file_nothing_is_written() -> None:
    Journal().write("act", "issued", state=object())


@pytest.mark.parametrize("option", ["--episodes", "--concurrency"])
def test_numbers_below_one_are_refused(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse([option, "0"])
    assert "at least 1" in capsys.readouterr().err
