"""The commands for rollouts and shadows, over a socket: what they ask, what they print, how they end."""

from __future__ import annotations

import contextlib
import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from policies.errors import SafetyError
from service.rollout_plan_file import plan_text, read_plan
from shadow.rollout_plan import MEASURES, GuardPlan, RolloutPlan
from tests.service.commands import Done, Run, running
from tests.service.rollout_server import TOKEN, RolloutServer, answering
from tests.service.rollout_views import CANARY, NOTHING, PLAN

ROLLOUT = "/admin/policies/cartpole/rollout"


@pytest.fixture
def server() -> Iterator[RolloutServer]:
    with answering(copy.deepcopy(CANARY)) as mine:
        yield mine


@pytest.fixture
def run(server: RolloutServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """The command in the environment of someone who runs the service here."""
    monkeypatch.setenv("SUREFOOT_PORT", str(server.server_port))
    monkeypatch.setenv("SUREFOOT_ADMIN_TOKEN", TOKEN)
    return running(monkeypatch, capsys)


# -- Showing ----------------------------------------------------------------------------------------------------------


def test_show_prints_the_rollout_and_its_plan(run: Run, server: RolloutServer) -> None:
    done = run("rollout", "show", "cartpole")
    assert (done.code, done.err) == (0, "")
    assert done.out.startswith("cartpole                                            generation 12   15:48:40 UTC\n")
    assert "\nguard      return: margin 25, rollback, must prove\n" in done.out
    assert "\x1b" not in done.out
    assert json.loads(run("rollout", "show", "cartpole", "--json").out) == server.view


def test_one_frame_of_the_live_view(run: Run, server: RolloutServer) -> None:
    done = run("rollout", "watch", "cartpole", "--once")
    assert (done.code, done.out.count("cartpole  "), "\x1b" in done.out) == (0, 1, False)
    assert server.asked == [("GET", ROLLOUT, None, {})]


# -- Moving -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "body", "says"),
    [
        (["begin", "v4"], {"version": "v4"}, "v4 is a shadow"),
        (["advance"], {}, "v2 has 5 %, step 3 of 5"),
        (["promote", "--reason", "it is good"], {"reason": "it is good"}, "v2 is champion"),
        (["rollback", "--reason", "it is bad"], {"reason": "it is bad"}, "v2 is quarantined"),
        (["withdraw"], {}, "v2 is registered"),
        (["pause", "--reason", "a holiday"], {"reason": "a holiday"}, "paused: a holiday"),
        (["resume"], {}, "v2 has 5 %"),
        (["weight", "0.2"], {"weight": 0.2}, "v2 has 20 %"),
        (["quarantine", "v1"], {"version": "v1"}, "v1 is quarantine"),
        (["release", "v3", "--reason", "mended"], {"version": "v3", "reason": "mended"}, "v3 is release: mended"),
    ],
)
def test_a_move_is_one_call(run: Run, server: RolloutServer, arguments: list[str], body: Any, says: str) -> None:
    what, *rest = arguments
    done = run("rollout", what, "cartpole", *rest)
    assert done.code == 0, done.err
    assert server.asked == [("POST", f"{ROLLOUT}/{what}", None, body)]
    assert done.out.startswith("cartpole: ")
    assert says in done.out
    assert "generation 13" in done.out


def test_a_move_may_be_held_to_the_state_that_was_looked_at(run: Run, server: RolloutServer) -> None:
    assert run("rollout", "advance", "cartpole", "--generation", 12, "--json").code == 0
    assert server.asked[-1][2] == '"12"'
    late = run("rollout", "advance", "cartpole", "--generation", 12)
    assert (late.code, late.out) == (1, "")
    assert late.err == f"surefoot: refused (stale): so the service said of {ROLLOUT}/advance\n"
    assert server.view["standing"]["step"] == 2


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["rollback", "cartpole"], f"refused (move_refused): so the service said of {ROLLOUT}/rollback"),
        (["show", "elsewhere"], "refused (unknown_policy): so the service said of /admin/policies/elsewhere/rollout"),
        (["show", "a/../b"], "refused (unknown_policy): so the service said of /admin/policies/a%2F..%2Fb/rollout"),
        (["show", "cartpole", "--token", "x"], "the token is not the service's: give --token or SUREFOOT_ADMIN_TOKEN"),
        (["watch", "cartpole", "--token", "x"], "the token is not the service's: give --token or SUREFOOT_ADMIN_TOKEN"),
    ],
)
def test_a_refusal_is_one_line_and_exit_code_1(
    run: Run, server: RolloutServer, arguments: list[str], says: str
) -> None:
    server.view["standing"]["stage"] = "quarantined"
    assert run("rollout", *arguments) == Done(1, "", f"surefoot: {says}\n")


@pytest.mark.parametrize("command", ["show", "watch", "rollback"])
def test_nobody_there_is_one_line_and_exit_code_1(run: Run, command: str) -> None:
    done = run("rollout", command, "cartpole", "--url", "http://127.0.0.1:9")
    assert (done.code, done.out, done.err.count("\n")) == (1, "", 1)
    assert done.err.endswith("is the service running?\n")


def test_what_is_no_rollout_is_named_so(run: Run, server: RolloutServer) -> None:
    server.view["standing"]["step"] = "two"
    assert "no rollout: Expected `int`, got `str` - at `$.standing.step`" in run("rollout", "show", "cartpole").err
    server.view["standing"]["step"] = 2
    server.date = "no date"
    assert run("rollout", "show", "cartpole").code == 0, "this machine's time will do"
    server.broken = "<html>"
    assert "answered 502, and not like a Surefoot service" in run("rollout", "advance", "cartpole").err
    server.broken_status = 200
    assert "answered no JSON, and not like a Surefoot service" in run("rollout", "advance", "cartpole").err


# -- Plans ------------------------------------------------------------------------------------------------------------


def test_a_plan_is_printed_edited_and_sent_back(run: Run, server: RolloutServer, tmp_path: Path) -> None:
    printed = run("rollout", "plan", "cartpole").out
    assert printed.startswith("# The plan: rollouts of cartpole, generation 12. Edit it, and send it back:\n")
    assert yaml.safe_load(printed) == PLAN
    file = tmp_path / "plan.yaml"
    file.write_text(printed.replace("hold_s: 3600.0", "hold_s: 60"))
    done = run("rollout", "plan", "cartpole", file)
    assert (done.code, done.out.splitlines()[0]) == (0, "cartpole: v2 has 5 %, step 2 of 5; generation 13")
    assert [each[:3] for each in server.asked[-2:]] == [("GET", ROLLOUT, None), ("PUT", ROLLOUT, '"12"')]
    assert server.view["plan"] == PLAN | {"hold_s": 60.0}


def test_a_plan_for_a_state_that_is_gone_is_refused(run: Run, server: RolloutServer, tmp_path: Path) -> None:
    (tmp_path / "plan.yaml").write_text("alpha: 0.05\n")
    done = run("rollout", "plan", "cartpole", tmp_path / "plan.yaml", "--generation", 11)
    assert (done.code, done.err) == (1, f"surefoot: refused (stale): so the service said of {ROLLOUT}\n")
    assert [each[0] for each in server.asked] == ["PUT"]


def test_a_policy_without_a_plan_gets_the_defaults_to_edit(run: Run, server: RolloutServer) -> None:
    server.view |= copy.deepcopy(NOTHING)
    printed = run("rollout", "plan", "cartpole").out
    assert printed.startswith("# No plan is set; these are the defaults: rollouts of cartpole, generation 3. Edit")
    assert read_plan(printed.encode(), "x") == RolloutPlan()


def test_what_the_service_refuses_of_a_plan_names_the_field(run: Run, tmp_path: Path) -> None:
    (tmp_path / "plan.yaml").write_text("alpha: 0.9\n")
    done = run("rollout", "plan", "cartpole", tmp_path / "plan.yaml")
    assert (done.code, "field: alpha" in done.err) == (1, True)


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("steps: [0.1, 1.5]\n", ["1:14: steps[1]: Expected `float` < 1.0"]),
        ("guards:\n  return: {margin: -1}\n", ["2:20: guards.return.margin: Expected `float` >= 0.0"]),
        ("guards:\n  retrun: {}\n", ["2:3: guards.retrun: there is no such guard: give one of return, override, "]),
        (
            "alpha: 7\nguards:\n  void: {margin: 1, actoin: pause}\n  error: 3\n",
            [
                "1:8: alpha: Expected `float` < 1.0",
                "3:21: guards.void.actoin: Object contains unknown field `actoin`",
                "4:10: guards.error: Expected `object`, got `int`",
            ],
        ),
        ("steps: [0.5, 0.1]\n", ["1:1: rollout.steps must rise"]),
        ("mode: on\n", ["1:7: mode: "]),
        ("[]\n", ["1:1: Expected `object`, got `array`"]),
        ("# nothing\n---\n", ["1:1: the file holds no plan"]),
        ("hold_s: 1\nhold_s: 2\n", ["2:1: hold_s: "]),
    ],
)
def test_a_plan_that_is_wrong_is_told_before_anything_is_sent(
    run: Run, server: RolloutServer, tmp_path: Path, text: str, lines: list[str]
) -> None:
    file = tmp_path / "plan.yaml"
    file.write_text(text)
    done = run("rollout", "plan", "cartpole", file)
    assert (done.code, done.out, server.asked) == (1, "", [])
    told = done.err.splitlines()
    assert len(told) == len(lines)
    for said, line in zip(told, lines, strict=True):
        assert said.startswith(f"{file}:{line}")


def test_a_plan_that_is_not_there_is_one_line(run: Run, tmp_path: Path) -> None:
    done = run("rollout", "plan", "cartpole", tmp_path / "none.yaml")
    assert done == Done(
        1, "", f"surefoot: {tmp_path / 'none.yaml'}: No such file or directory; give the path of a plan\n"
    )


SHARES = st.floats(1e-9, 0.999)
PLANS = st.builds(
    RolloutPlan,
    objective=st.sampled_from(["episode", "step"]),
    return_range=st.none() | st.tuples(st.floats(-1e6, 0), st.floats(1, 1e300)),
    steps=st.lists(SHARES, min_size=1, max_size=32, unique=True).map(lambda steps: tuple(sorted(steps))),
    shadow=st.booleans(),
    hold_s=st.floats(0, 1e5),
    min_units=st.integers(1, 2**53),
    alpha=SHARES,
    guards=st.dictionaries(
        st.sampled_from(MEASURES),
        st.builds(GuardPlan, margin=st.none() | st.floats(0, 1e300), must_prove=st.none() | st.booleans()),
        max_size=3,
    ),
)


@settings(deadline=None)
@given(PLANS)
def test_a_plan_that_was_written_is_read_as_the_same(plan: RolloutPlan) -> None:
    text = plan_text("cartpole", json.loads(msgspec.json.encode(plan)), 3)
    assert read_plan(text.encode(), "plan.yaml") == plan


@settings(deadline=None)
@given(st.binary(max_size=60) | st.text(max_size=60).map(str.encode))
def test_whatever_a_file_holds_it_is_a_plan_or_refused_in_words(raw: bytes) -> None:
    with contextlib.suppress(SafetyError):
        assert isinstance(read_plan(raw, "plan.yaml"), RolloutPlan)


# -- Shadows ----------------------------------------------------------------------------------------------------------

SHADOW = {
    "version": "v2", "digest": "ab" * 32, "status": "tripped", "reason": "5 faults in a row", "waiting": 0,
    "in_hand": 0, "share": 0.5, "lag_s": 0.0, "busy_s": 0.0, "scored": 123_456, "agreement": 0.98765,
    "override_rate": 0.0, "fallback_rate": 0.01, "fault_rate": 0.001, "divergence": 0.0234, "kl": None, "calls": 99,
    "latency_ms": {"p50": 0.2, "p99": 1.25}, "dropped": {"shed": 7},
}  # fmt: skip


def test_a_version_watches_and_watches_no_more(run: Run, server: RolloutServer) -> None:
    assert run("shadow", "watch", "cartpole", "v2").out == "cartpole: v2 watching; generation 13\n"
    assert run("shadow", "show", "cartpole").out == "v2: not watching on this replica yet\n"
    assert run("shadow", "unwatch", "cartpole", "v2").out == "cartpole: no version watching; generation 13\n"
    assert run("shadow", "show", "cartpole").out == "no version watches cartpole\n"
    path = "/admin/policies/cartpole/shadows"
    asked = [("PUT", f"{path}/v2"), ("GET", path), ("DELETE", f"{path}/v2"), ("GET", path)]
    assert [each[:2] for each in server.asked] == asked


def test_shadows_are_a_table_and_one_is_all_its_figures(run: Run, server: RolloutServer) -> None:
    server.shadows |= {"shadows": ["v2"], "here": [SHADOW]}
    assert (
        run("shadow", "show", "cartpole").out
        == """\
shadow     status      scored agrees differ  rules  falls faults   kept p99 ms
v2         tripped     123456 0.9877 0.0234      0   0.01  0.001    0.5   1.25
  v2: 5 faults in a row
"""
    )
    whole = run("shadow", "show", "cartpole", "v2").out.splitlines()
    assert [whole[i] for i in (0, 2, 15, 17)] == [
        "version          v2",
        "status           tripped",
        "kl               -",
        "latency_ms       p50 0.2, p99 1.25",
    ]
    assert json.loads(run("shadow", "show", "cartpole", "v2", "--json").out)["here"] == [SHADOW]


def test_a_shadow_that_is_none_is_named_so(run: Run) -> None:
    done = run("shadow", "show", "cartpole", "v9")
    assert done == Done(1, "", "surefoot: 'v9' does not watch cartpole: `surefoot shadow watch cartpole v9`\n")
