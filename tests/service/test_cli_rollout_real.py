"""The commands against a real service: a rollout from its plan to its end, by hand, and what is refused on the way."""

from __future__ import annotations

import json
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import yaml

from service.rollout_view import read_view
from service.rollout_watch import HOME, TO_END
from service.shadow_text import COLUMNS
from shadow.rollout_plan import RolloutPlan
from tests.service.admins import TOKEN, Admin, serving
from tests.service.commands import Done, Run, running
from tests.service.rolling_out import Traffic
from tests.service.terminals import terminal, watching
from tests.waiting import until

PLAN = """\
steps: [0.2, 0.5]
shadow: false
hold_s: 0
min_units: 1000000  # nothing moves by itself but backwards
unit_time_s: 1.0
guards:
  return: {margin: 0.1}
"""


@pytest.fixture(scope="module")
def admin(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Admin]:
    with serving(tmp_path_factory.mktemp("rollout-cli")) as mine:
        yield mine


@pytest.fixture
def policy(admin: Admin, policy: str) -> str:
    """v1 always does 0; v2 always does 1."""
    admin.pushed(policy, "v1", prefers=0)
    admin.pushed(policy, "v2", prefers=1)
    answer = admin.deploy(policy, '"1"', champion="v1", reward={"window_s": 1.0, "range": [0.0, 1.0]})
    assert answer.status_code == 200, answer.text
    return policy


@pytest.fixture
def run(admin: Admin, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    monkeypatch.setenv("SUREFOOT_PORT", str(admin.server.port))
    monkeypatch.setenv("SUREFOOT_ADMIN_TOKEN", TOKEN)
    return running(monkeypatch, capsys)


def view(run: Run, policy: str) -> Any:
    return json.loads(run("rollout", "show", policy, "--json").out)


def done(outcome: Done) -> str:
    assert outcome.code == 0, outcome.err
    return outcome.out


@pytest.fixture
def planned(run: Run, policy: str, tmp_path: Path) -> str:
    (tmp_path / "plan.yaml").write_text(PLAN)
    assert done(run("rollout", "plan", policy, tmp_path / "plan.yaml")) == f"{policy}: no rollout; generation 3\n"
    return policy


def test_a_plan_is_printed_edited_and_sent_back(run: Run, planned: str, tmp_path: Path) -> None:
    printed = done(run("rollout", "plan", planned))
    assert msgspec.convert(yaml.safe_load(printed), RolloutPlan) == msgspec.convert(yaml.safe_load(PLAN), RolloutPlan)
    file = tmp_path / "edited.yaml"
    file.write_text(printed.replace("alpha: 0.01", "alpha: 0.05"))
    generation = re.search(r"--generation (\d+)", printed)
    assert generation
    done(run("rollout", "plan", planned, file, "--generation", generation[1]))
    assert view(run, planned)["plan"]["alpha"] == 0.05
    late = run("rollout", "plan", planned, file, "--generation", generation[1])
    assert (late.code, late.out) == (1, "")
    assert late.err.startswith("surefoot: refused (generation_moved): ")
    file.write_text("objective: episode\n")  # the service alone knows that it lacks something
    refused = run("rollout", "plan", planned, file)
    assert (refused.code, "field: rollout.return_range" in refused.err) == (1, True)


def test_a_rollout_by_hand(run: Run, planned: str) -> None:
    assert "v2 has 20 %, step 1 of 2; generation 4" in done(run("rollout", "begin", planned, "v2"))
    assert "v2 has 50 %, step 2 of 2" in done(run("rollout", "weight", planned, 0.5, "--reason", "in haste"))
    assert done(run("rollout", "pause", planned, "--reason", "a holiday")).splitlines()[1] == "paused: a holiday"
    assert "PAUSED     a holiday" in done(run("rollout", "show", planned))
    done(run("rollout", "resume", planned))
    late = run("rollout", "advance", planned, "--generation", 4)
    assert (late.code, late.out) == (1, "")
    assert late.err.startswith("surefoot: refused (generation_moved): ")
    assert "v2 is champion" in done(run("rollout", "promote", planned, "--reason", "it is good"))
    assert view(run, planned)["champion"] == "v2"
    assert "mark       v1 retired" in done(run("rollout", "watch", planned, "--once"))
    assert "v2 is quarantined" in done(run("rollout", "rollback", planned, "--reason", "it is not"))
    after = view(run, planned)
    assert (after["champion"], after["marks"]["v2"]["reason"]) == ("v1", "it is not")
    assert done(run("rollout", "release", planned, "v2")).startswith(f"{planned}: v2 is registered")
    assert "v2 has 20 %" in done(run("rollout", "begin", planned, "v2"))
    assert "v2 is registered" in done(run("rollout", "withdraw", planned))
    assert "v2 is quarantined: a bad smell" in done(
        run("rollout", "quarantine", planned, "v2", "--reason", "a bad smell")
    )
    refused = run("rollout", "begin", planned, "v2")
    assert (refused.code, refused.out) == (1, "")
    assert refused.err.startswith("surefoot: refused (move_refused): v2 is quarantined (a bad smell): release it first")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["rollback"], "refused (move_refused): there is no rollout: begin one"),
        (["begin", "v9"], "refused (unknown_version): there is no version"),
        (["begin", "v1"], "refused (move_refused): v1 is champion already"),
        (["show", "--token", "wrong"], "the token is not the service's"),
    ],
)
def test_what_is_refused_ends_with_1(run: Run, policy: str, arguments: list[str], says: str) -> None:
    what, *rest = arguments
    refused = run("rollout", what, policy, *rest)
    assert (refused.code, refused.out) == (1, "")
    assert refused.err.startswith(f"surefoot: {says}")


def test_the_live_view_of_traffic(run: Run, admin: Admin, planned: str) -> None:
    done(run("rollout", "begin", planned, "v2"))
    with Traffic(admin, planned, worth=lambda action: 0.3 + 0.6 * action):
        until(lambda: ((view(run, planned)["evidence"] or {}).get("units") or {}).get("challenger"), "units")
        frame = done(run("rollout", "watch", planned, "--once"))
    assert max(map(len, frame.splitlines())) <= 80
    lines = frame.splitlines()
    assert lines[1].startswith("rollout    v2 against champion v1 (")
    assert lines[2] == "stage      registered > canary [20] 50 % > champion"
    assert re.fullmatch(r"now        v2 has 20 %, step 1 of 2, for .* of at least 0 s, at most 7 d", lines[3])
    assert re.search(r"^units      v2 [\d,]+ of at least 1,000,000; v1 [\d,]+; open [\d,]+", frame, re.MULTILINE)
    assert re.search(r"^ratio      [\d.]+ % of [\d,]+ units went to v2, meant 20 %$", frame, re.MULTILINE)
    for guard in ("return", "override", "fallback", "error", "latency", "default", "quarantine", "void"):
        row = rf"^{guard} +(\S+ +){{4}}[\[\]<>.|!o-]{{15}} (rollback|pause|inform) +\S.*$"
        assert re.search(row, frame, re.MULTILINE), guard
    assert read_view(view(run, planned)).standing is not None


def test_the_live_view_outlives_the_service(tmp_path: Path) -> None:
    with serving(tmp_path) as admin:
        admin.pushed("toy", "v1")
        with terminal(admin.server.url, watching("toy")) as shown:
            shown.until(lambda text: "generation 1 " in text, "a frame")
            admin.server.kill()
            shown.until(
                lambda text: "AWAY       nothing new for" in text and "generation 1 " in text, "that it is away"
            )
            admin.server.start()
            shown.until(
                lambda text: "AWAY" not in text[text.rfind(HOME) :] and HOME in text and text.endswith(TO_END),
                "the service",
            )
            assert shown.end(signal.SIGINT) == 0
            assert shown.errors == ""


def test_a_rollback_by_a_guard_is_told(run: Run, admin: Admin, planned: str) -> None:
    done(run("rollout", "begin", planned, "v2"))
    with Traffic(admin, planned, worth=lambda action: 0.9 - 0.6 * action):
        until(lambda: view(run, planned)["standing"]["stage"] == "quarantined", "the rollback")
    shown = done(run("rollout", "show", planned))
    assert "\nstage      registered > canary 20 50 % > champion [quarantined]\n" in shown
    assert re.search(r"^mark +v2 quarantined \d+ s ago: return -0\.", shown, re.MULTILINE)


def test_shadows(run: Run, admin: Admin, policy: str) -> None:
    assert done(run("shadow", "watch", policy, "v2")) == f"{policy}: v2 watching; generation 3\n"
    admin.act(policy)
    until(lambda: re.search(r"^v2 +watching +1 +0 +1 ", run("shadow", "show", policy).out, re.MULTILINE), "the score")
    figures = dict(line.split(maxsplit=1) for line in done(run("shadow", "show", policy, "v2")).splitlines())
    assert set(COLUMNS) < set(figures)
    assert (figures["version"], figures["scored"], figures["reason"]) == ("v2", "1", "-")
    assert done(run("shadow", "unwatch", policy, "v2")) == f"{policy}: no version watching; generation 4\n"
    refused = run("shadow", "watch", policy, "v1")
    assert (refused.code, refused.out) == (1, "")
