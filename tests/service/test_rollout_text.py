"""What a terminal shows of a rollout: exact for the views of a rollout's life, and never too wide for any other."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from msgspec import inspect

from service.columns import cells
from service.rollout_evidence_text import interval
from service.rollout_text import frame, ladder, summary
from service.rollout_view import Guard, Plan, Standing, View, read_view
from service.shadow_text import shadows_text
from shadow.estimate import Estimates
from shadow.rollout import Stage
from shadow.rollout import Standing as Stands
from shadow.rollout_plan import RolloutPlan
from shadow.verdicts import Reading
from tests.service.rollout_views import CANARY, EVIDENCE, NOTHING, NOW_MS, PLAN, canary, estimate, guard
from tests.service.test_columns import CONTROL


def text_of(view: dict[str, Any], width: int = 80, **options: Any) -> str:
    return "\n".join(line.text for line in frame(read_view(view), NOW_MS, width, **options)) + "\n"


def test_a_canary_at_80_columns() -> None:
    assert (
        text_of(CANARY, planned=True)
        == """\
cartpole                                            generation 12   15:48:40 UTC
rollout    v2 against champion v1 (r-1); objective episode, mode auto
stage      registered > shadow > canary 1 [5] 10 25 50 % > champion
now        v2 has 5 %, step 2 of 5, for 2 min of at least 1 h, at most 7 d
waits for  held for 120 of 3600 s

units      v2 30 of at least 30; v1 1,200; open 12; left out: 3 before
ratio      5.1 % of 1,232 units went to v2, meant 5 %
evidence   3 s old; of all that happened until 25 s ago
verdict    pause
warning    this step expects fewer than 30 units

guard        estim.   lower   upper -margin worse  0 better if worse  so far
return         -0.1     -33      28     -25 ....[!-o--].... rollback  unproven
override     -0.001  -0.015   0.013   -0.02 .....!-o-]..... rollback  not worse
latency       -0.09    -0.2   -0.03   -0.02 <---]!.|....... pause     worse

gate       passes

estimates  of a version's worth, by recursive_dr
version    unsupp.          mean weight   lower   upper   value  eff. n matched
v2           0.004    1.02 [0.91, 1.13]   401.3     498   460.2   412.7     118

last move  the gate before the canary passes
mark       v3 quarantined 2 h 46 min ago: return: the upper bound -31 is below
           -25

plan       shadow, the gate required, then canary 1 5 10 25 50 %; mode auto,
           alpha 1 %
each step  at least 1 h and 30 units, at most 7 d
a unit     episode, of the first 1 min, worth 0 to 500
guard      return: margin 25, rollback, must prove
"""
    )


def test_the_page_shows_the_live_view_as_it_prints() -> None:
    page = (Path(__file__).parents[2] / "docs" / "rollout-cli.md").read_text()
    assert f"```\n{text_of(CANARY)}```\n" in page


def test_guards_at_120_columns_and_no_wider() -> None:
    lines = text_of(CANARY, 120).splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith("guard"))
    assert lines[at : at + 4] == [
        "guard                 estim.   lower   upper -margin worse          0         better if worse  so far",
        "return                  -0.1     -33      28     -25 ........[-!----o-----]......... rollback  unproven",
        "override              -0.001  -0.015   0.013   -0.02 ..........![---o--]............ rollback  not worse",
        "latency                -0.09    -0.2   -0.03   -0.02 <-------].!....|............... pause     worse",
    ]
    assert text_of(CANARY, 500) == text_of(CANARY, 120)


def test_a_narrow_terminal_cuts_lines_and_none_breaks() -> None:
    whole, narrow = text_of(CANARY).splitlines(), text_of(CANARY, 38).splitlines()
    assert len(narrow) == len(whole)
    assert narrow[2] == "stage      registered > shadow > can.."


def test_a_policy_without_a_rollout_says_how_one_begins() -> None:
    assert (
        text_of(NOTHING)
        == """\
cartpole                                             generation 3   15:48:40 UTC
champion   v1
rollout    none: `surefoot rollout begin cartpole VERSION` begins one
plan       none: `surefoot rollout plan cartpole` prints one to begin with
"""
    )


def test_a_pause_and_a_proposal_say_what_a_person_can_do() -> None:
    shown = text_of(canary(paused="the sample ratio is off", proposal="promote"))
    assert "PAUSED     the sample ratio is off; `surefoot rollout resume cartpole` goes on\n" in shown
    assert "proposed   promote, which waits for a person: `surefoot rollout promote\n" in shown
    assert "`surefoot rollout advance" in text_of(canary(stage="shadow", weight=0.0, proposal="try"))


def test_the_plan_of_a_rollout_is_that_which_it_goes_by() -> None:
    other = PLAN | {"objective": "step", "return_range": None, "shadow": False, "steps": [0.3], "guards": {"void": {}}}
    told = "the next rollout goes by another: `surefoot rollout plan cartpole`"
    shown = text_of(CANARY | {"plan": other}, planned=True)
    assert "plan       shadow, the gate required, then canary 1 5 10 25 50 %" in shown
    assert shown.endswith(f"           {told}\n           prints it\n")
    ended = text_of(canary(stage="champion", weight=0.0) | {"plan": other}, planned=True)
    assert (
        ended.split("\n\n")[-1]
        == """\
plan       canary 30 %; mode auto, alpha 1 %
each step  at least 1 h and 30 units, at most 7 d
a unit     step, of the first 1 min and 100 decisions, worth what rewards may be
guard      void: as always
"""
    )
    mild = {"error": {"must_prove": False, "action": "pause"}}
    assert text_of(NOTHING | {"plan": other | {"guards": mild}}, planned=True).endswith(
        "error: pause, need not prove\n"
    )


def test_a_plan_by_which_rollouts_begin_by_themselves_says_so() -> None:
    shown = text_of(CANARY | {"standing": None, "plan": PLAN | {"begin": "pushed"}}, planned=True)
    assert "\nbegins     by itself, with the version that was pushed last\n" in shown
    assert "\nbegins" not in text_of(CANARY | {"standing": None, "plan": PLAN}, planned=True)


def test_a_reason_is_told_once() -> None:
    assert "last move" not in text_of(canary(reason=CANARY["marks"]["v3"]["reason"]))
    assert "last move" not in text_of(canary(reason="a holiday", paused="a holiday"))


def test_a_canary_of_which_nothing_is_known() -> None:
    assert "\n\nevidence   none yet\n\n" in text_of(CANARY | {"evidence": None, "standing": CANARY["standing"]})


def test_a_step_of_which_no_time_is_known_is_of_nothing_yet() -> None:
    """So it is for a while after Redis was emptied."""
    for through_ms in (-1, 0):
        shown = text_of(CANARY | {"evidence": EVIDENCE | {"through_ms": through_ms}})
        assert "\nevidence   3 s old; of nothing yet\n" in shown


def test_what_a_shadow_waits_for() -> None:
    view = canary(stage="shadow", step=0, weight=0.0)
    view |= {"evidence": None, "gate": {"outcome": "no_evidence", "reasons": ["12 matched rows, fewer than 50"]}}
    shown = text_of(view)
    assert "stage      registered > [shadow] > canary 1 5 10 25 50 % > champion\n" in shown
    assert "now        v2 is a shadow, for 2 min of at least 1 h, at most 7 d\n" in shown
    assert "gate       no evidence, which is no verdict on the version\n           12 matched rows" in shown


@pytest.mark.parametrize(
    ("stage", "way", "now", "tone"),
    [
        (
            "quarantined",
            "registered > shadow > canary 1 5 10 25 50 % > champion [quarantined]",
            "v2 is quarantined",
            "bad",
        ),
        ("champion", "registered > shadow > canary 1 5 10 25 50 % > [champion]", "v2 is champion, for 2 min", "good"),
        ("registered", "[registered] > shadow > canary 1 5 10 25 50 % > champion", "v2 is registered", "plain"),
    ],
)
def test_a_rollout_that_has_ended(stage: str, way: str, now: str, tone: str) -> None:
    lines = frame(read_view(canary(stage=stage, step=0, weight=0.0)), NOW_MS, 80)
    assert [line.text for line in lines[1:3]] == ["champion   v1", "rollout    none now; the last was of v2 (r-1)"]
    assert (lines[3].text, lines[3].tone) == (f"stage      {way}", tone)
    assert lines[4].text.startswith(f"now        {now}")


def test_every_stage_has_its_place() -> None:
    for stage in Stage:
        way = ladder(Standing("r", "v2", stage.value), Plan(steps=(0.1, 0.5)), 69)
        assert way.count("[") == way.count("]") == 1


def test_of_many_steps_those_near_the_place_are_shown() -> None:
    plan = Plan(steps=tuple(n / 100 for n in range(1, 33)))
    ways = [ladder(Standing("r", "v2", "canary", step=step), plan, 69) for step in (0, 15, 31)]
    assert ways == [
        "registered > shadow > canary [1] 2 3 4 5 6 7 8 9 10 .. % > champion",
        "registered > shadow > canary .. 13 14 15 [16] 17 18 .. % > champion",
        "registered > shadow > canary .. 26 27 28 29 30 31 [32] % > champion",
    ]


@pytest.mark.parametrize(
    ("lower", "estimate", "upper", "margin", "drawn"),
    [
        (-9.0, -8.0, -7.0, 1.0, "<....!.|......."),  # all of it is beyond
        (7.0, 8.0, 9.0, 1.0, ".....!.|......>"),
        (-9.0, 0.0, 9.0, 1.0, "<----!-o------>"),
        (None, None, None, 1.0, "[----!-|------]"),  # nothing known
        (-3.0, -1.0, 3.0, 1.0, "[----!-|------]"),  # an estimate at the margin: the mark stays
        (-0.5, 0.0, 0.5, 0.0, "[------!------]"),  # no margin: as far as the interval reaches
        (0.0, 0.0, 0.0, None, ".......o......."),
        (-1e308, 0.0, 1e308, 1e308, ".....!-o-]....."),
        (float("-inf"), float("nan"), float("inf"), 5e-324, "[----!-|------]"),
    ],
)
def test_intervals(
    lower: float | None, estimate: float | None, upper: float | None, margin: float | None, drawn: str
) -> None:
    assert interval(Guard(estimate=estimate, lower=lower, upper=upper, margin=margin), 15) == drawn


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ({"worse": True, "lost": 3}, "worse"),
        ({"superior": True, "proven": True}, "better"),
        ({"proven": True}, "not worse"),
        ({"lost": 3}, "3 lost"),
        ({}, "unproven"),
        ({"must_prove": False}, "undecided"),
    ],
)
def test_what_is_said_of_a_guard(said: dict[str, Any], words: str) -> None:
    view = CANARY | {"evidence": EVIDENCE | {"guards": {"return": guard(-1.0, 0.0, 1.0, 2.0, **said)}}}
    line = next(line for line in text_of(view).splitlines() if line.startswith("return"))
    assert line.endswith(f"rollback  {words}")


def test_a_ratio_that_is_off_is_loud() -> None:
    view = CANARY | {"evidence": EVIDENCE | {"ratio": EVIDENCE["ratio"] | {"mismatched": True}}}  # type: ignore[operator]
    line = next(line for line in frame(read_view(view), NOW_MS, 80) if "MISMATCHED" in line.text)
    assert line.tone == "bad"


def test_doubts_about_estimates_are_told() -> None:
    methods = [estimate("ips", mean_weight_low=1.1, outside=1)]
    found = {"v2": {"objective": "step", "methods": methods}, "v9": {"objective": "step", "methods": []}}
    shown = text_of(CANARY | {"estimates": found})
    assert "estimates  of a version's worth, by ips\n" in shown
    for line in (
        "v9         nothing yet",
        "           v2: by ips: there is no dr yet",
        "           v2: the mean weight does not cover 1: do not believe the rest",
        "           v2: 1 value outside what is declared: no bound holds",
    ):
        assert line in shown.splitlines()


def test_only_the_newest_marks_are_shown() -> None:
    marks = {f"v{n}": {"stage": "retired", "reason": "", "since_ms": NOW_MS - n * 60_000} for n in range(1, 8)}
    lines = text_of(NOTHING | {"marks": marks}).splitlines()
    assert lines[-6:] == [
        *(f"mark       v{n} retired {n} min ago" for n in range(1, 6)),
        "           and 2 more marked",
    ]


def test_a_move_is_told_in_a_few_lines() -> None:
    assert (
        summary(read_view(CANARY))
        == "cartpole: v2 has 5 %, step 2 of 5; generation 12\nwaits for: held for 120 of 3600 s"
    )
    assert summary(read_view(canary(paused="a person")), "v3").splitlines()[1:] == [
        "paused: a person",
        "v3 is quarantined: return: the upper bound -31 is below -25",
    ]
    assert summary(read_view(NOTHING)) == "cartpole: no rollout; generation 3"


# -- Any view ---------------------------------------------------------------------------------------------------------

TEXTS = st.text(max_size=90) | st.sampled_from([*(stage.value for stage in Stage), "episode", "step", "no_evidence"])
NUMBERS = st.floats(allow_nan=False) | st.floats(-1.0, 1.0)
WHOLE = st.integers(0, 100) | st.integers(-(10**30), 10**30)


def anything(of: inspect.Type) -> st.SearchStrategy[Any]:
    """Values of a type, as JSON has them."""
    match of:
        case inspect.StructType(fields=fields):
            optional = {each.encode_name: anything(each.type) for each in fields if not each.required}
            needed = {each.encode_name: anything(each.type) for each in fields if each.required}
            return st.fixed_dictionaries(needed, optional=optional)
        case inspect.UnionType(types=types):
            return st.one_of(*map(anything, types))
        case inspect.DictType(value_type=value):
            return st.dictionaries(TEXTS, anything(value), max_size=8)
        case inspect.VarTupleType(item_type=item):
            return st.lists(anything(item), max_size=8)
        case inspect.TupleType(item_types=items):
            return st.tuples(*map(anything, items)).map(list)
    simple = {
        inspect.StrType: TEXTS,
        inspect.FloatType: NUMBERS,
        inspect.IntType: WHOLE,
        inspect.BoolType: st.booleans(),
        inspect.NoneType: st.none(),
    }
    return simple[type(of)]


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # views are large
@given(anything(inspect.type_info(View)), WHOLE, st.integers(1, 140))
def test_no_view_breaks_the_frame_or_is_wider(view: dict[str, Any], now_ms: int, width: int) -> None:
    read = read_view(view)
    for line in frame(read, now_ms, width, planned=True):
        assert cells(line.text) <= width
        assert not CONTROL.search(line.text)
    assert not CONTROL.search(summary(read, next(iter(read.marks), None)).replace("\n", ""))


def test_what_is_not_a_view_is_refused_by_field() -> None:
    with pytest.raises(ValueError, match=re.escape("$.standing.step")):
        read_view(canary(step="two"))


@pytest.mark.parametrize(
    ("part", "strict"),
    [
        (CANARY["plan"], RolloutPlan),
        (CANARY["standing"], Stands),
        (EVIDENCE["guards"]["return"], Reading),  # type: ignore[index]
        (CANARY["estimates"]["v2"], Estimates),
    ],
)
def test_the_views_of_these_tests_are_the_services_own(part: Any, strict: Any) -> None:
    """What the service's structs call a field stands in the lenient ones under the same name."""
    whole = json.loads(msgspec.json.encode(msgspec.convert(part, strict)))
    assert whole | part == whole
    if strict is RolloutPlan:
        assert set(part) == set(RolloutPlan.__struct_fields__) == set(Plan.__struct_fields__) == set(PLAN)
    if strict is Reading:
        assert Reading.__struct_fields__ == Guard.__struct_fields__


def test_shadows_that_have_a_reason_say_it_and_others_do_not() -> None:
    well = {"version": "v2", "status": "watching", "scored": 3, "latency_ms": {"p99": 0.5}}
    ill = {"version": "v3", "status": "tripped", "reason": "five calls in a row"}
    text = shadows_text({"policy": "p", "shadows": ["v2", "v3", "v4"], "here": [well, ill]})
    assert [line.split()[0] for line in text.splitlines()] == ["shadow", "v2", "v3", "v3:", "v4:"]
    assert shadows_text({"policy": "p", "here": []}) == "no version watches p"
