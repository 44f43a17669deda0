"""Every kind of rule says what the oracle says, and so does the last look; whatever cannot be known denies."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from policies.errors import SafetyError
from policies.types import ActionSpec, Box, Choices, Feature, ObservationSpec
from safety.evaluate import Filter, denial, evaluator
from safety.facts import Boxed, Masked, Replaced, Verdict
from safety.recheck import Recheck, rows_of
from safety.rules import (  # fmt: skip
    Bounds,
    Confidence,
    Cooldown,
    Cost,
    ExploreOnly,
    Forbid,
    MaxStep,
    NeverExplore,
    Rate,
    Rule,
    Support,
)
from safety.step import around
from tests.safety import oracle
from tests.safety.oracle import Seen
from tests.safety.worlds import FEATURES, OBSERVATION, ONE, POINTS, TWO, about_rows, factors, facts_of, seen

NOWHERE = {"cpu": 0.0, "rps": 0.0, "replicas": 0.0}
floats = st.floats(-1e300, 1e300)
sizes = st.sampled_from([1e-300, 0.1, 0.5, 1.5, 1e16, 1e308, math.inf])


def judged(
    rule: Rule, space: ActionSpec, rows: list[Seen], observation: ObservationSpec = OBSERVATION
) -> Verdict | None:
    return evaluator(rule, space, observation).judge(facts_of(rows))


def mask(rule: Rule, space: ActionSpec, *rows: Seen) -> list[list[bool]]:
    verdict = judged(rule, space, list(rows))
    assert isinstance(verdict, Masked)
    return [[bool(each) for each in allowed] for allowed in verdict.allowed]


def taken(rule: Rule, space: ActionSpec, rows: list[Seen], observation: ObservationSpec = OBSERVATION) -> list[bool]:
    verdict = judged(rule, space, rows, observation)
    assert isinstance(verdict, Replaced)
    return [bool(each) for each in verdict.rows]


def refused(rule: Rule, space: ActionSpec, observation: ObservationSpec = OBSERVATION) -> str | None:
    with pytest.raises(SafetyError) as error:
        evaluator(rule, space, observation)
    return error.value.field


# bounds


@settings(deadline=None)
@given(
    st.lists(st.one_of(st.none(), st.sampled_from([-1.0, 0.0])), min_size=2, max_size=2),
    st.lists(st.one_of(st.none(), st.sampled_from([0.0, 0.5])), min_size=2, max_size=2),
    st.one_of(st.none(), about_rows()),
    st.lists(seen(), min_size=1, max_size=4),
    st.lists(st.tuples(floats, st.sampled_from([-1.0, -0.5, 0.0, 0.5, 1.0])), min_size=3, max_size=6),
)
def test_bounds_say_what_the_oracle_says(low: Any, high: Any, when: Any, rows: list[Seen], points: list[Any]) -> None:
    rule = Bounds(name="rule", low=low, high=high, when=None if when is None else when[0])
    try:
        verdict = judged(rule, POINTS, rows)
    except SafetyError:
        return
    look = Recheck([rule], POINTS, OBSERVATION)
    for index, again in enumerate(rows_of(facts_of(rows))):
        for point in points:
            expected = oracle.allows(rule, 2, rows[index], point, None if when is None else when[1])
            assert inside(verdict, index, point) == expected
            assert (look.broken(again, point) == ()) == expected


def inside(verdict: Verdict | None, row: int, point: tuple[float, ...]) -> bool:
    if verdict is None:
        return True
    assert isinstance(verdict, Boxed)
    return bool(((verdict.low[row] <= point) & (point <= verdict.high[row])).all())


def test_bounds_of_one_side_leave_the_other_open() -> None:
    for rule, point, expected in [
        (Bounds(name="r", low=[0.0, None]), (5.0, -5.0), True),
        (Bounds(name="r", high=[0.0, None]), (5.0, -5.0), False),
    ]:
        assert inside(judged(rule, POINTS, [Seen(NOWHERE)]), 0, point) is expected
        (again,) = rows_of(facts_of([Seen(NOWHERE)]))
        assert (Recheck([rule], POINTS, OBSERVATION).broken(again, point) == ()) is expected


@pytest.mark.parametrize(
    ("rule", "space", "field"),
    [
        (Bounds(name="r", low=[0.0]), ONE, "kind"),
        (Bounds(name="r"), POINTS, "low"),
        (Bounds(name="r", low=[0.0]), POINTS, "low"),
        (Bounds(name="r", high=[0.0, math.nan]), POINTS, "high"),
        (Bounds(name="r", low=[0.0, 0.5], high=[1.0, 0.0]), POINTS, "low"),
        (Bounds(name="r", low=[0.0, 0.0], when="action.index > 1"), POINTS, "when"),
        (MaxStep(name="r", limit=1.0, factor="f"), POINTS, "factor"),
        (MaxStep(name="r", limit=1.0, values=[1.0]), POINTS, "values"),
        (MaxStep(name="r", limit=[1.0]), POINTS, "limit"),
        (MaxStep(name="r", limit=1.0, initial=[0.0]), POINTS, "initial"),
        (MaxStep(name="r", limit=1.0, initial="hold"), POINTS, "initial"),
        (MaxStep(name="r", limit=1.0, initial=[0.0, math.nan]), POINTS, "initial"),
        (MaxStep(name="r", limit=1.0), ONE, "values"),
        (MaxStep(name="r", limit=[1.0], values=[1, 2, 3, 4]), ONE, "limit"),
        (MaxStep(name="r", limit=1.0, values=[1, 2, 3]), ONE, "values"),
        (MaxStep(name="r", limit=1.0, values=[1, 2, 3, math.inf]), ONE, "values"),
        (MaxStep(name="r", limit=1.0, values={"hold": 1.0}), ONE, "values"),
        (MaxStep(name="r", limit=1.0, values=dict.fromkeys([*ONE.names[0], "zz"], 1.0)), ONE, "values"),
        (MaxStep(name="r", limit=1.0, values=[1, 2, 3, 4], initial="nowhere"), ONE, "initial"),
        (MaxStep(name="r", limit=1.0, values=[1, 2], factor=None), TWO, "factor"),
        (MaxStep(name="r", limit=1.0, values=[1, 2], factor="nowhere"), TWO, "factor"),
        (MaxStep(name="r", limit=1.0, values=[1, 2], factor="speed"), ONE, "factor"),
        (Support(name="r"), ONE, "by"),
        (Support(name="r", by="quantiles"), ONE, "by"),
        (Confidence(name="r", min_gap=1.0), POINTS, "kind"),
        (Confidence(name="r"), ONE, "min_gap"),
        (ExploreOnly(name="r", actions=["hold"]), POINTS, "kind"),
        (ExploreOnly(name="r", actions=["hold", "nowhere"]), ONE, "actions[1]"),
        (NeverExplore(name="r", actions=["hold"]), TWO, "factor"),
        (Rate(name="r", actions=["hold"], limit=1, window_s=1.0), ONE, "kind"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_with_its_field(rule: Rule, space: ActionSpec, field: str) -> None:
    assert refused(rule, space) == field


def test_a_distance_needs_features_with_both_ends() -> None:
    half_open = ObservationSpec((3,), features=tuple(Feature(name, low=0.0) for name in FEATURES))
    assert refused(Support(name="r", max_distance=1.0), ONE, half_open) == "max_distance"
    assert evaluator(Support(name="r"), ONE, half_open)


# max_step


@settings(deadline=None)
@given(
    st.data(),
    st.one_of(sizes, st.lists(sizes, min_size=2, max_size=2)),
    st.one_of(st.none(), st.lists(st.sampled_from([-1.0, 0.3]), min_size=2, max_size=2)),
    st.lists(seen(st.tuples(floats, floats)), min_size=1, max_size=4),
)
def test_a_step_in_a_box_is_what_the_oracle_says_at_its_very_ends(
    data: Any, limit: Any, initial: Any, rows: list[Seen]
) -> None:
    rule = MaxStep(name="rule", limit=limit, initial=initial)
    verdict = judged(rule, POINTS, rows)
    assert isinstance(verdict, Boxed)
    look = Recheck([rule], POINTS, OBSERVATION)
    for index, again in enumerate(rows_of(facts_of(rows))):
        low, high = verdict.low[index], verdict.high[index]
        if (low > high).any():
            assert not oracle.allows(rule, 2, rows[index], rows[index].previous or (0.0, 0.0))
            continue
        middle = tuple(data.draw(st.floats(*ends)) for ends in zip(low.tolist(), high.tolist(), strict=True))
        for point in (tuple(low.tolist()), tuple(high.tolist()), middle):
            if all(map(math.isfinite, point)):
                assert oracle.allows(rule, 2, rows[index], point)
                assert look.broken(again, point) == ()


@given(st.floats(-1e300, 1e300), st.floats(1e-300, 1e300))
def test_the_ends_of_a_step_are_as_wide_as_they_may_be(last: float, limit: float) -> None:
    low, high = around(np.array([[last]]), np.array([limit]))
    assert abs(low[0, 0] - last) <= limit
    assert abs(high[0, 0] - last) <= limit
    for end, outward in ((low, -math.inf), (high, math.inf)):
        beyond = np.nextafter(np.nextafter(end, outward), outward)
        assert abs(beyond[0, 0] - last) >= limit


def test_rounding_never_widens_a_step() -> None:
    # 0.1 + 0.7 rounds to 0.7999…, and 1e16 + 1.5 to 1e16 + 2, which is 2 away.
    low, high = around(np.array([[1e16, 0.1]]), np.array([1.5, 0.7]))
    assert high[0].tolist() == [1e16, 0.1 + 0.7]
    assert low[0].tolist() == [1e16 - 1, 0.1 - 0.7] or (1e16 - low[0, 0] <= 1.5)


@settings(deadline=None)
@given(
    st.sampled_from([(ONE, None), (TWO, "speed"), (TWO, "zone")]),
    st.lists(st.sampled_from([0.0, 0.1, 0.2, 0.3, 0.4, 1e308, -1e308]), min_size=4, max_size=4),
    st.sampled_from([0.1, 0.2, 5.0, math.inf]),
    st.booleans(),
    st.sampled_from([None, 0, 1, "name"]),
    st.data(),
)
def test_a_step_over_choices_is_what_the_oracle_says(
    where: Any, worth: list[float], limit: float, by_name: bool, initial: Any, data: Any
) -> None:
    space, factor = where
    names = space.names[space.factors.index(factor) if factor else 0]
    worth = worth[: len(names)]
    rule = MaxStep(
        name="rule",
        limit=limit,
        values=dict(zip(names, worth, strict=True)) if by_name else worth,
        initial=names[-1] if initial == "name" else initial,
        factor=factor,
    )
    last = st.tuples(*(st.integers(0, n - 1).map(float) for n in space.nvec))
    rows = data.draw(st.lists(seen(last), min_size=1, max_size=4))
    verdict = judged(rule, space, rows)
    assert isinstance(verdict, Masked)
    look = Recheck([rule], space, OBSERVATION)
    for index, again in enumerate(rows_of(facts_of(rows))):
        for action in product(*map(range, space.nvec)):
            expected = oracle.allows(rule, factors(space), rows[index], action)
            at = [start + choice for start, choice in zip(space.starts, action, strict=True)]
            assert bool(verdict.allowed[index, at].all()) == expected
            assert (look.broken(again, action) == ()) == expected


@pytest.mark.parametrize("last", [(), (1.0, 1.0), (-1.0,), (4.0,), (0.5,), (math.nan,), (math.inf,)])
def test_a_last_choice_that_is_none_denies(last: tuple[float, ...]) -> None:
    rule = MaxStep(name="rule", limit=9.0, values=[1, 2, 3, 4], initial=0)
    row = Seen(NOWHERE, previous=last)
    assert mask(rule, ONE, row) == [[False] * 4]
    assert Recheck([rule], ONE, OBSERVATION).broken(rows_of(facts_of([row]))[0], (0,)) == ("rule",)


@pytest.mark.parametrize("last", [(), (1.0,), (math.nan, 0.0), (math.inf, 0.0)])
def test_a_last_point_that_is_none_denies(last: tuple[float, ...]) -> None:
    rule = MaxStep(name="rule", limit=9.0)
    row = Seen(NOWHERE, previous=last)
    assert not inside(judged(rule, POINTS, [row]), 0, (1.0, 0.0))
    assert Recheck([rule], POINTS, OBSERVATION).broken(rows_of(facts_of([row]))[0], (1.0, 0.0)) == ("rule",)


def test_one_number_is_a_point_of_one_coordinate() -> None:
    line = Box((-1.0,), (1.0,))
    rule = MaxStep(name="rule", limit=0.25, initial=0.5)
    assert inside(judged(rule, line, [Seen(NOWHERE)]), 0, (0.75,))
    assert not inside(judged(rule, line, [Seen(NOWHERE)]), 0, (0.8,))
    look = Recheck([rule], line, OBSERVATION)
    (again,) = rows_of(facts_of([Seen(NOWHERE)]))
    assert look.broken(again, (0.75,)) == ()
    assert look.broken(again, (0.8,)) == ("rule",)


# support and confidence

ends = st.sampled_from([(None, None), (None, 1.0), (0.0, None), (0.1, 0.7), (0.5, 0.5), (-1e308, 1e308)])
values = st.sampled_from([-3.0, -0.5, 0.1, 0.3, 0.5, 0.7, 1.0, 1.3, math.nan, math.inf])
quantiles = st.lists(st.sampled_from([-0.5, 0.1, 0.3, 0.7, 1.0]), max_size=3)


@settings(deadline=None)
@given(
    st.lists(st.tuples(ends, quantiles), min_size=3, max_size=3),
    st.sampled_from(["range", "quantiles"]),
    st.sampled_from([0.0, 0.1, 0.5, 2.0]),
    st.integers(0, 2),
    st.one_of(st.none(), st.sampled_from([0.53, 1.07, 2.51])),  # of no mean that these states have
    st.sampled_from(["float32", "float64"]),
    st.lists(st.lists(values, min_size=3, max_size=3), min_size=1, max_size=4),
)
def test_support_is_what_the_oracle_says(
    known: Any, by: Any, margin: float, most: int, distance: float | None, dtype: Any, states: list[list[float]]
) -> None:
    spec = ObservationSpec(
        (3,),
        dtype,
        tuple(
            Feature(name, low, high, {f"p{i}": value for i, value in enumerate(seen_in_training)})
            for name, ((low, high), seen_in_training) in zip(FEATURES, known, strict=True)
        ),
    )
    rule = Support(name="rule", by=by, margin=margin, max_outside=most, max_distance=distance)
    try:
        built = evaluator(rule, ONE, spec)
    except SafetyError:
        return  # nothing to go by
    states = np.array(states, dtype=dtype).tolist()  # as the network gets them
    rows = [Seen(dict(zip(FEATURES, state, strict=True))) for state in states]
    facts = facts_of(rows, dtype=dtype)
    verdict = built.judge(facts)
    assert isinstance(verdict, Replaced)
    features = [
        oracle.Feature(name, low, high, tuple(seen_in_training))
        for name, ((low, high), seen_in_training) in zip(FEATURES, known, strict=True)
    ]
    look = Recheck([rule], ONE, spec)
    for index, again in enumerate(rows_of(facts)):
        expected = oracle.replaces(rule, factors(ONE), features, rows[index], dtype)
        assert bool(verdict.rows[index]) == expected
        assert (look.broken(again, (0,)) == ("rule",)) == expected


def test_a_state_exactly_at_an_end_lies_inside_whatever_the_dtype() -> None:
    for dtype in ("float32", "float64"):
        spec = ObservationSpec((1,), dtype, (Feature("x", 0.1, 0.7),))
        for value in (0.1, 0.7):
            facts = facts_of([Seen({"x": value})], ("x",), dtype)
            verdict = evaluator(Support(name="r"), ONE, spec).judge(facts)
            assert isinstance(verdict, Replaced)
            assert not verdict.rows[0]


@settings(deadline=None)
@given(
    st.sampled_from([ONE, TWO, Choices((("only",),))]),
    st.one_of(st.none(), st.sampled_from([0.1, 0.5, 2.0])),
    st.one_of(st.none(), st.sampled_from([0.3, 0.9, 1.5])),
    st.booleans(),
    st.data(),
)
def test_confidence_is_what_the_oracle_says(
    space: Choices, gap: float | None, entropy: float | None, greedy: bool, data: Any
) -> None:
    if gap is None and entropy is None:
        return
    rule = Confidence(name="rule", min_gap=gap, max_entropy=entropy)
    scores = st.lists(st.sampled_from([-1.0, 0.0, 0.4, 1.0, 1.5]), min_size=space.size, max_size=space.size)
    rows = []
    for values, faulty in data.draw(st.lists(st.tuples(scores, st.booleans()), min_size=1, max_size=4)):
        if not greedy:
            values = [p for part in parts(values, space) for p in normalised(part)]
        rows.append(Seen(NOWHERE, scores=tuple(values), greedy=greedy, faulty=faulty))
    found = taken(rule, space, rows)
    look = Recheck([rule], space, OBSERVATION)
    for index, again in enumerate(rows_of(facts_of(rows))):
        expected = oracle.replaces(rule, factors(space), [], rows[index])
        assert found[index] == expected
        assert (look.broken(again, (0,) * len(space.nvec)) == ("rule",)) == expected


def parts(values: list[float], space: Choices) -> list[list[float]]:
    return [values[start : start + n] for start, n in zip(space.starts, space.nvec, strict=True)]


def normalised(values: list[float]) -> list[float]:
    weights = [abs(value) + 0.25 for value in values]
    return [weight / math.fsum(weights) for weight in weights]


def test_scores_that_are_none_or_nan_are_not_confident() -> None:
    rule = Confidence(name="r", min_gap=0.5)
    assert taken(rule, ONE, [Seen(NOWHERE)]) == [True]
    rows = [Seen(NOWHERE, scores=(math.nan, 0.0, 1.0, 2.0)), Seen(NOWHERE, scores=(math.inf, math.inf, 0.0, 0.0))]
    assert taken(rule, ONE, rows) == [True, True]
    nothing = Seen(NOWHERE, scores=(math.nan,) * 4, greedy=False)
    assert taken(Confidence(name="r", max_entropy=9.0), ONE, [nothing]) == [True]
    for row in (Seen(NOWHERE), *rows):
        assert Recheck([rule], ONE, OBSERVATION).broken(rows_of(facts_of([row]))[0], (0,)) == ("r",)


# explore_only and never_explore


@pytest.mark.parametrize("kind", [ExploreOnly, NeverExplore])
@pytest.mark.parametrize(
    ("space", "factor", "actions"), [(ONE, None, ["hold", 2]), (TWO, "zone", ["y"]), (TWO, "speed", [1])]
)
def test_what_may_be_explored_is_what_the_oracle_says(kind: Any, space: Choices, factor: Any, actions: Any) -> None:
    rule = kind(name="rule", actions=actions, factor=factor)
    (allowed,) = mask(rule, space, Seen(NOWHERE))
    look = Recheck([rule], space, OBSERVATION)
    (again,) = rows_of(facts_of([Seen(NOWHERE)]))
    for action in product(*map(range, space.nvec)):
        expected = oracle.explorable(rule, factors(space), action)
        at = [start + choice for start, choice in zip(space.starts, action, strict=True)]
        assert all(allowed[column] for column in at) == expected
        assert (look.broken(again, action, explored=True) == ()) == expected
        assert look.broken(again, action, explored=False) == ()


# all together

FORBIDS = Forbid(name="forbids", when="state.cpu > 0.5 && action.index == 1")
LIMITS = (
    Rate(name="rate", actions=["hold"], limit=1, window_s=1.0),
    Cooldown(name="cooldown", actions=["hold"], seconds=1.0),
    Cost(name="cost", costs={"hold": 1.0}, cap=1.0, window_s=1.0),
)


def test_a_filter_asks_every_rule_and_leaves_out_those_that_say_nothing() -> None:
    chain = Filter([FORBIDS, Forbid(name="never", when="false")], ONE, OBSERVATION)
    assert not chain.joint
    said = chain.judge(facts_of([Seen({**NOWHERE, "cpu": 1.0}), Seen(NOWHERE)]))
    assert [(rule.name, verdict.name) for rule, verdict in said.pairs if verdict] == [("forbids", "forbids")]
    assert said.failed == ()


def test_rules_that_are_judged_elsewhere_wait_for_their_verdict() -> None:
    said = Filter([FORBIDS, *LIMITS], ONE, OBSERVATION).judge(facts_of([Seen({**NOWHERE, "cpu": 1.0})]))
    assert [rule.name for rule, verdict in said.pairs if verdict is None] == ["rate", "cooldown", "cost"]
    assert [rule.name for rule, _ in said.answered] == ["forbids"]
    allowed = Masked("rate", np.ones((1, 4), dtype=np.bool_))
    told = said.with_verdicts({"rate": allowed, "cost": None, "forbids": None})
    assert [(rule.name, verdict is None) for rule, verdict in told.pairs] == [
        ("forbids", False),
        ("rate", False),
        ("cooldown", True),
    ]


def test_a_rule_that_cannot_be_evaluated_denies_everything_and_is_named() -> None:
    spec = ObservationSpec((3,), features=tuple(Feature(name, 0.0, 1.0) for name in FEATURES))
    rules: list[Rule] = [
        MaxStep(name="step", limit=1.0, values=[1, 2, 3, 4]),
        Support(name="support"),
        Confidence(name="confidence", min_gap=0.1),
    ]
    facts = replace(facts_of([Seen(NOWHERE, scores=(1.0,)), Seen(NOWHERE, scores=(2.0,))]), previous=None)  # type: ignore[arg-type]
    facts = replace(
        facts, states=np.zeros((2, 7)), scores=np.zeros((2, 0))
    )  # nothing has the shape that it should have
    said = Filter(rules, ONE, spec).judge(facts)
    assert said.failed == ("step", "support", "confidence")
    step, support, confidence = (verdict for _, verdict in said.pairs)
    assert isinstance(step, Masked)
    assert not step.allowed.any()
    assert isinstance(support, Replaced)
    assert isinstance(confidence, Replaced)
    assert support.rows.all()
    assert confidence.rows.all()
    box = denial(Bounds(name="bounds"), POINTS, 2)
    assert isinstance(box, Boxed)
    assert (box.low > box.high).all()


def test_joint_is_said_of_rules_in_force_only() -> None:
    when = "action.speed.index == 0 && action.zone.index == 0"
    assert Filter([Forbid(name="r", when=when)], TWO, OBSERVATION).joint
    assert not Filter([Forbid(name="r", when=when, mode="monitor")], TWO, OBSERVATION).joint
    assert not Filter(LIMITS, ONE, OBSERVATION).joint


def test_a_filter_without_expressions_loads_no_expressions() -> None:
    import subprocess
    import sys

    code = """
import sys
from policies.types import Choices, ObservationSpec, Box
from safety.evaluate import Filter
from safety.recheck import Recheck
from safety.rules import *
rules = [Bounds(name="b", low=[0.0])]
for bind in (Filter, Recheck):
    bind(rules, Box((0.0,), (1.0,)), ObservationSpec((1,)))
assert "cel" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_last_look_leaves_monitors_and_limits_alone() -> None:
    rules: list[Rule] = [Forbid(name="r", when="true", mode="monitor"), *LIMITS]
    (again,) = rows_of(facts_of([Seen(NOWHERE)]))
    assert Recheck(rules, ONE, OBSERVATION).broken(again, (0,)) == ()


def test_a_drawn_action_that_is_none_breaks_what_looks_at_it() -> None:
    (again,) = rows_of(facts_of([Seen(NOWHERE)]))
    look = Recheck([FORBIDS, Forbid(name="names", when="action.name == 'hold'")], ONE, OBSERVATION)
    assert look.broken(again, (17,)) == ("forbids", "names")
    assert look.broken(again, (0, 0)) == ("forbids", "names")
