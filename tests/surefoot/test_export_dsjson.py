"""dsjson files of a real stream, read by Vowpal Wabbit."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import redis
import vowpalwabbit

from surefoot.export import ExportError, Report, export_transitions
from tests.surefoot.stream_entries import MULTI, POINT, add
from tests.surefoot.valkey import Valkey


def export(valkey: Valkey, policy: str, out: Path, **options: Any) -> Report:
    return export_transitions(policy, "dsjson", out, redis_url=valkey.url, **options)


def lines(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in out.read_text().splitlines()]


def learn(arguments: str) -> str:
    """Run Vowpal Wabbit, and give what it said."""
    workspace = vowpalwabbit.Workspace(arguments, enable_logging=True)
    workspace.finish()
    return "\n".join(workspace.get_log())


def test_a_line_holds_the_decision_as_the_format_has_it(
    valkey: Valkey, store: redis.Redis, policy: str, tmp_path: Path
) -> None:
    three = {
        "target": np.array([0.0, 0.5, 0.25, 0.25]).tobytes(),
        "behaviour": np.array([0.0, 0.7, 0.1, 0.2]).tobytes(),
        "propensity": 0.2,
        "context": {"hour": 10, "user": {"plan": "pro", "tags": ["x"]}, "_multi": 1, "none": None},
    }
    add(store, policy, [3], a=3, t=1_700_000_000_123, m=b"\0\1\1\1", nm=b"", r="0.5", record=three)
    report = export(valkey, policy, tmp_path / "x.dsjson")
    assert (report.read, report.written) == (1, 1)
    (line,) = lines(tmp_path / "x.dsjson")
    assert line["_label_cost"] == -0.5
    assert line["_label_probability"] == 0.2
    assert (line["_label_Action"], line["_labelIndex"]) == (3, 2)  # the third of those allowed
    assert (line["a"], line["p"]) == ([3, 1, 2], [0.2, 0.7, 0.1])
    assert line["c"]["_multi"] == [{"A": {"action": name}} for name in "123"]
    assert line["c"]["S"] == [3.0, 4.0, 5.0, 6.0]
    assert line["c"]["C"] == {"hour": 10, "user.plan": "pro", "user.tags.0": "x", "·multi": 1}
    assert line["o"] == [{"v": 0.5, "EventId": f"{3:060x}", "ActionTaken": True}]
    assert (line["Timestamp"], line["Version"], line["VWState"]) == ("2023-11-14T22:13:20.123Z", "1", {"m": "v2"})
    assert line["EventId"] == f"{3:060x}"
    assert "warn" not in learn(f"--dsjson --cb_adf -q SA -d {tmp_path / 'x.dsjson'}").lower()


def test_what_cannot_be_learnt_from_is_left_out_with_its_reason(
    valkey: Valkey, store: redis.Redis, policy: str, tmp_path: Path
) -> None:
    add(store, policy, [0])
    add(store, policy, [1], j="void", r="")
    add(store, policy, [2], j="quarantined", r="")
    add(store, policy, [3], record={"fallback": "not_finite", "propensity": 1.0})
    add(store, policy, [4], record={"propensity": None, "propensity_reason": "check_failed"})
    add(store, policy, [5], record={"propensity": None})
    add(store, policy, [6], m=b"\0\1")
    add(store, policy, [7], j="defaulted", r="-1", at="")
    report = export(valkey, policy, tmp_path / "x")
    assert [line["EventId"] for line in lines(tmp_path / "x")] == [f"{n:060x}" for n in (0, 7)]
    assert report.left_out == {
        "void": 1,
        "quarantined": 1,
        "fallback": 1,
        "check_failed": 1,
        "no propensity": 1,
        "action not allowed": 1,
    }
    assert report.read == report.written + sum(report.left_out.values())


@pytest.mark.parametrize("kind", [MULTI, POINT])
def test_what_is_no_single_choice_is_refused(
    valkey: Valkey, store: redis.Redis, policy: str, tmp_path: Path, kind: Any
) -> None:
    add(store, policy, [0], **kind)
    with pytest.raises(ExportError, match="one choice of several"):
        export(valkey, policy, tmp_path / "x")
    assert list(tmp_path.iterdir()) == []


def test_vowpal_wabbit_learns_the_better_action(
    valkey: Valkey, store: redis.Redis, policy: str, tmp_path: Path
) -> None:
    """Action 2 is right where the first feature is positive, action 0 where it is negative."""
    chance = random.Random(5)
    for n in range(600):
        side, favourite = chance.choice([-1.0, 1.0]), chance.randrange(3)
        behaviour = [0.8 if each == favourite else 0.1 for each in range(3)]
        (action,) = chance.choices(range(3), behaviour)
        record = {
            "target": np.eye(3)[favourite].tobytes(),
            "behaviour": np.array(behaviour).tobytes(),
            "propensity": behaviour[action],
        }
        seen = np.array([side, 0.5, 0.0, 1.0], "<f4").tobytes()
        good = action == (2 if side > 0 else 0)
        add(store, policy, [n], a=action, s=seen, m=b"\1\1\1", nm=b"", r=repr(float(good)), record=record)
    out = tmp_path / "train.dsjson"
    assert export(valkey, policy, out).written == 600
    said = learn(f"--dsjson --cb_adf -q SA -d {out} -f {tmp_path}/model")
    assert "number of examples = 600" in said
    assert not re.search("warn|error|malformed", said, re.IGNORECASE)
    with out.open() as file, (tmp_path / "test.dsjson").open("w") as few:
        for line in list(file)[:50]:
            few.write(line)
    learn(f"--dsjson --cb_adf -q SA -t -i {tmp_path}/model -d {tmp_path}/test.dsjson -p {tmp_path}/scores")
    found = [line.split(",")[0].split(":")[0] for line in (tmp_path / "scores").read_text().splitlines() if line]
    wanted = ["2" if line["c"]["S"][0] > 0 else "0" for line in lines(tmp_path / "test.dsjson")]
    assert found == wanted


def test_append_goes_on_behind_the_last_line_and_mends_a_torn_one(
    valkey: Valkey, store: redis.Redis, policy: str, tmp_path: Path
) -> None:
    out = tmp_path / "x.dsjson"
    add(store, policy, range(4))
    export(valkey, policy, out, append=True)
    with out.open("ab") as file:
        file.write(b'{"_label_cost":-1.0,"_lab')
    add(store, policy, range(4, 6))
    report = export(valkey, policy, out, append=True, from_="0")
    assert (report.read, report.written) == (2, 2)
    assert [line["EventId"] for line in lines(out)] == [f"{n:060x}" for n in range(6)]
    with pytest.raises(ExportError, match="append"):
        export(valkey, policy, out)


@pytest.mark.parametrize("content", [b"somebody's notes", b"a line\n", b'{"a": 1}\n'])
def test_a_file_of_somebody_else_is_left_alone(
    valkey: Valkey, store: redis.Redis, policy: str, tmp_path: Path, content: bytes
) -> None:
    out = tmp_path / "x"
    out.write_bytes(content)
    add(store, policy, [0])
    with pytest.raises(ExportError, match="none of our"):
        export(valkey, policy, out, append=True)
    assert out.read_bytes() == content


def test_long_lines_are_found_whole(
    valkey: Valkey, store: redis.Redis, policy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("surefoot.export_dsjson._TAIL_BYTES", 7)
    out = tmp_path / "x.dsjson"
    for end in (1, 2, 4):
        add(store, policy, range(end // 2 if end > 1 else 0, end))
        export(valkey, policy, out, append=True)
    assert [line["EventId"] for line in lines(out)] == [f"{n:060x}" for n in (0, 1, 2, 3)]
