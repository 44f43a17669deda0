"""Masks and boxes intersect in any order, monitors change nothing, and what has nothing left is answered safely."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import permutations, product
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from policies.errors import SafetyError
from policies.explore import behave
from policies.heads import target
from policies.types import Bools, Box, Choices
from safety.bounds import request_box
from safety.combine import Pair, combine, combine_box
from safety.evaluate import Filter
from safety.facts import Boxed, Masked, MaskedJointly, Replaced, Verdict
from safety.joint import lift_mask, lift_target, marginals, to_indices, to_tuples, tuples
from safety.rules import Bounds, Confidence, ExploreOnly, Forbid, MaxStep, NeverExplore, Rule, Support
from safety.types import BoxConstraint, Constraint, safest
from tests.safety import oracle
from tests.safety.oracle import Seen
from tests.safety.worlds import OBSERVATION, ONE, POINTS, TWO, about, factors, facts_of, seen

THREE = Choices((("a", "b", "c"),))


def masks(*rows: str) -> Bools:
    """ "1" is allowed, "0" is not."""
    return np.array([[each == "1" for each in row] for row in rows])


def masked(name: str, *rows: str, **said: Any) -> Pair:
    return Forbid(name=name, when="true", **said), Masked(name, masks(*rows))


def taking(name: str, *rows: int, then: Any = "fallback", **said: Any) -> Pair:
    return Support(name=name, then=then, **said), Replaced(name, np.array(rows, dtype=np.bool_))


def boxed(name: str, low: list[list[float]], high: list[list[float]], **said: Any) -> Pair:
    return Bounds(name=name, **said), Boxed(name, np.array(low), np.array(high))


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_all_rules_together_allow_what_the_oracle_allows(data: Any) -> None:
    space = data.draw(st.sampled_from([ONE, TWO]))
    rules: list[Rule] = []
    truths: dict[str, Any] = {}
    for index in range(data.draw(st.integers(0, 4))):
        factor = data.draw(st.sampled_from([None, *space.factors]))
        when, truths[f"r{index}"] = data.draw(about(space, factor))
        mode = data.draw(st.sampled_from(["enforce", "enforce", "monitor"]))
        rules.append(Forbid(name=f"r{index}", when=when, factor=factor, mode=mode))
    first = space.factors[0] if space.factors else None
    rules.append(MaxStep(name="step", limit=1.0, values=list(range(space.nvec[0])), initial=0, factor=first))
    rules.append(ExploreOnly(name="only", actions=[0, 1], factor=first))
    rules.append(NeverExplore(name="never", actions=[1], factor=first))
    last = st.tuples(*(st.integers(0, n - 1) for n in space.nvec))
    rows = data.draw(st.lists(seen(last), min_size=1, max_size=3))
    try:
        chain = Filter(rules, space, OBSERVATION)
    except SafetyError:
        return  # an expression that cannot be decided
    pairs = list(chain.judge(facts_of(rows)).pairs)
    shuffled = data.draw(st.permutations(pairs))
    constraint = combine(shuffled, None, space, len(rows), joint=chain.joint)
    in_force = [rule for rule in rules if rule.mode == "enforce"]
    for index, row in enumerate(rows):
        allowed = [
            all(oracle.allows(rule, factors(space), row, action, truths.get(rule.name)) for rule in in_force)
            for action in product(*map(range, space.nvec))
        ]
        explorable = [
            may and all(oracle.explorable(rule, factors(space), action) for rule in rules[-2:])
            for may, action in zip(allowed, product(*map(range, space.nvec)), strict=True)
        ]
        assert tuples_of(constraint, constraint.mask, space)[index].tolist() == allowed
        assert constraint.explorable is not None
        assert tuples_of(constraint, constraint.explorable, space)[index].tolist() == explorable
        for action in product(*map(range, space.nvec)):
            broken = {r.name for r in in_force if not oracle.allows(r, factors(space), row, action, truths.get(r.name))}
            assert set(constraint.rules_against(index, action)) == broken
            monitors = [rule for rule in rules if rule.mode == "monitor"]
            would = {r.name for r in monitors if not oracle.allows(r, factors(space), row, action, truths[r.name])}
            assert set(constraint.monitors_against(index, action)) == would
            at_once = np.tile(action, (len(rows), 1))
            assert constraint.rules_against_all(at_once)[index] == constraint.rules_against(index, action)
            assert constraint.monitors_against_all(at_once)[index] == constraint.monitors_against(index, action)
        assert constraint.nothing_left(index) == (not any(allowed))
        assert constraint.instead[index] == (None if any(allowed) else "fallback")


def tuples_of(constraint: Constraint, mask: Bools, space: Choices) -> Bools:
    return mask if constraint.factors or not space.factors else lift_mask(mask, space.nvec)


def test_the_order_of_rules_does_not_matter() -> None:
    pairs = [
        masked("a", "110", "111", on_empty="baseline"),
        masked("b", "011", "101", on_empty="baseline"),
        masked("c", "101", "111"),
        masked("d", "000", "000", mode="monitor"),
        taking("e", 0, 1, then="baseline"),
        (ExploreOnly(name="f", actions=["a"]), Masked("f", masks("100", "100"))),
    ]
    found = [combine(order, masks("111", "011"), THREE, 2) for order in permutations(pairs)]
    for each in found:
        assert each.mask.tolist() == found[0].mask.tolist() == [[False] * 3, [False, False, True]]
        assert each.instead == found[0].instead == ("fallback", "baseline")
        assert each.explorable is not None
        assert not each.explorable.any()
        for row, choice in product(range(2), range(3)):
            assert set(each.rules_against(row, (choice,))) == set(found[0].rules_against(row, (choice,)))
            assert each.rules_against_all(np.full((2, 1), choice))[row] == each.rules_against(row, (choice,))


def test_monitors_change_nothing_and_are_kept_apart() -> None:
    monitors: list[Pair] = [
        masked("a", "000", mode="monitor", on_empty="baseline"),
        taking("b", 1, mode="monitor"),
        (Forbid(name="c", when="true", mode="monitor"), None),
        (ExploreOnly(name="d", actions=["a"], mode="monitor"), Masked("d", masks("100"))),
        (Forbid(name="e", when="true", mode="monitor"), Masked("e", masks("00"))),  # of another space
        (Forbid(name="f", when="true", mode="monitor"), Boxed("f", np.zeros((1, 3)), np.ones((1, 3)))),
    ]
    with_them, without = combine(monitors, None, THREE, 1), combine([], None, THREE, 1)
    assert with_them.mask.all()
    assert replace(with_them, mask=without.mask, monitored=()) == without
    assert with_them.monitors_against(0, (0,)) == ("a", "b")
    assert with_them.rules_against(0, (0,)) == ()


def test_a_joint_monitor_does_not_make_the_decision_joint() -> None:
    forbids_x = MaskedJointly("a", masks("011111"))
    found = combine([(Forbid(name="a", when="true", mode="monitor"), forbids_x)], None, TWO, 1)
    assert found.nvec == (2, 3)
    assert found.monitors_against(0, (0, 0)) == ("a",)
    assert found.monitors_against(0, (1, 0)) == ()


def test_a_joint_rule_makes_the_whole_decision_joint() -> None:
    pairs = [(Forbid(name="a", when="true"), MaskedJointly("a", masks("011111"))), masked("b", "11110")]
    found = combine(pairs, masks("11011"), TWO, 1)
    assert found.nvec == (6,)
    assert found.factors == (2, 3)
    assert found.mask.tolist() == masks("010010").tolist()  # neither x, by request, nor z; what is left is y
    assert found.rules_against(0, (0, 0)) == ("request", "a")
    assert found.rules_against(0, (1, 2)) == ("b",)
    assert combine([], None, TWO, 2, joint=True).mask.shape == (2, 6)


def test_what_exploration_may_draw_lies_within_the_mask() -> None:
    only: Pair = (ExploreOnly(name="a", actions=["a", "b"]), Masked("a", masks("110", "110")))
    never: Pair = (NeverExplore(name="b", actions=["a"]), Masked("b", masks("011", "011")))
    found = combine([only, never, masked("c", "111", "101")], None, THREE, 2)
    assert found.mask.tolist() == masks("111", "101").tolist()
    assert found.explorable is not None
    assert found.explorable.tolist() == masks("010", "000").tolist()
    assert found.instead == (None, None)
    assert combine([masked("c", "101")], None, THREE, 1).explorable is None
    wanted = target(np.array([[3.0, 2.0, 1.0]] * 2), "q_values")
    behaviour = behave(wanted, found.mask, np.array([0.5, 0.5]), np.zeros(2, dtype=np.int64), found.explorable)
    assert behaviour.epsilon.tolist() == [0.5, 0.0]  # nothing explorable is left of the second row
    assert behaviour.probabilities.tolist() == [[0.5, 0.5, 0.0], [1.0, 0.0, 0.0]]


@pytest.mark.parametrize(
    ("one", "two", "document", "expected"),
    [
        (None, None, "fallback", "fallback"),
        (None, None, "baseline", "baseline"),
        ("baseline", None, "fallback", "fallback"),
        ("baseline", "baseline", "fallback", "baseline"),
        ("baseline", None, "baseline", "baseline"),
        ("fallback", "baseline", "baseline", "fallback"),
    ],
)
def test_of_rules_that_left_nothing_all_must_say_baseline(one: Any, two: Any, document: Any, expected: str) -> None:
    pairs = [
        masked("a", "100", on_empty=one),
        masked("b", "011", on_empty=two),
        masked("c", "111", on_empty="fallback"),  # allows everything: has no say
    ]
    found = combine(pairs, masks("111"), THREE, 1, on_empty=document)
    assert found.instead == (expected,)


def test_the_factor_that_has_nothing_left_says_who_took_part() -> None:
    pairs = [masked("a", "01111", on_empty="fallback"), masked("b", "11000", on_empty="baseline")]
    found = combine(pairs, None, TWO, 1)
    assert found.instead == ("baseline",)
    # Something is left, yet the network may want none of it: all that forbid anything took part.
    assert combine(pairs[:1], None, TWO, 1).on_empty(0) == "fallback"
    assert combine([masked("a", "01111", on_empty="baseline")], None, TWO, 1).on_empty(0) == "baseline"


def test_a_request_has_no_say_but_the_document_s() -> None:
    for document in ("fallback", "baseline"):
        assert combine([], masks("000"), THREE, 1, on_empty=document).instead == (document,)
    assert combine([masked("a", "110", on_empty="baseline")], masks("001"), THREE, 1).instead == ("baseline",)


def test_rules_that_take_rows_away_are_named_and_the_fallback_wins() -> None:
    pairs = [
        taking("a", 1, 1, 0, then="baseline"),
        (Confidence(name="b", then="fallback"), Replaced("b", np.array([False, True, False]))),
        taking("c", 0, 0, 0),
    ]
    found = combine(pairs, None, THREE, 3)
    assert found.instead == ("baseline", "fallback", None)
    assert found.rules_against(1, (0,)) == ("a", "b")
    assert [each.name for each in found.replaced] == ["a", "b"]
    assert combine([*pairs, masked("d", "000", "111", "111")], None, THREE, 3).instead[0] == "fallback"
    from_elsewhere: Pair = (Forbid(name="e", when="true"), Replaced("e", np.array([True])))
    assert combine([from_elsewhere], None, THREE, 1).instead == ("fallback",)


@pytest.mark.parametrize(
    "verdict",
    [
        None,
        Masked("a", masks("11")),
        Masked("a", masks("111", "111")),
        MaskedJointly("a", masks("1111")),
        Boxed("a", np.zeros((1, 3)), np.ones((1, 3))),
    ],
)
def test_a_verdict_that_is_missing_or_does_not_fit_denies(verdict: Verdict | None) -> None:
    rule = Forbid(name="a", when="true")
    assert not combine([(rule, verdict)], None, THREE, 1).mask.any()
    box = combine_box([(rule, verdict)], None, POINTS, 1)
    assert box.nothing_left(0)
    too_long: Pair = (Support(name="a"), Replaced("a", np.zeros(7, dtype=np.bool_)))
    assert combine([too_long], None, THREE, 1).instead == ("fallback",)


end = st.sampled_from([-math.inf, -1.0, 0.0, 0.5, math.inf])
ends = st.lists(st.lists(end, min_size=2, max_size=2), min_size=2, max_size=2)


@given(st.lists(st.tuples(ends, ends), max_size=3), st.one_of(st.none(), st.tuples(ends, ends)), st.data())
def test_boxes_intersect(sides: list[Any], request_: Any, data: Any) -> None:
    pairs = [boxed(f"r{index}", low, high) for index, (low, high) in enumerate(sides)]
    request = None if request_ is None else (np.array(request_[0]), np.array(request_[1]))
    found = combine_box(data.draw(st.permutations(pairs)), request, POINTS, 2)
    every = [*sides, *([] if request_ is None else [request_]), ([list(POINTS.low)] * 2, [list(POINTS.high)] * 2)]
    for row, point in product(range(2), product([-3.0, -1.0, -0.5, 0.0, 0.5, 1.0, 3.0], repeat=2)):
        inside = [all(low[row][d] <= point[d] <= high[row][d] for d in range(2)) for low, high in every]
        assert bool(((found.low[row] <= point) & (point <= found.high[row])).all()) == all(inside)
        broken = {f"r{index}" for index in range(len(sides)) if not inside[index]}
        if inside[-1]:  # a rule that allows the whole space has nothing to say of points beyond it
            assert set(found.rules_against(row, point)) - {"request"} == broken
        assert found.rules_against_all(np.tile(point, (2, 1)))[row] == found.rules_against(row, point)
    assert found.recorded().shape == (2, 4)


def test_boxes_say_who_answers_by_the_ends_that_cross() -> None:
    pairs = [
        boxed("a", [[0.5, -1.0]], [[2.0, 1.0]], on_empty="baseline"),
        boxed("b", [[-2.0, -1.0]], [[0.0, 1.0]], on_empty="baseline"),
        boxed("c", [[-2.0, 0.5]], [[1.0, 1.0]], on_empty="fallback"),
        boxed("d", [[9.0, 9.0]], [[-9.0, -9.0]], mode="monitor"),
        taking("e", 0),
    ]
    pairs.append(boxed("silent", [[-9.0, -9.0]], [[9.0, 9.0]], on_empty="fallback"))
    found = combine_box(pairs, None, POINTS, 1)
    assert [name for name, *_ in found.by_rule] == ["a", "b", "c"]
    assert found.instead == ("baseline",)
    assert found.nothing_left(0)
    assert found.rules_against(0, (0.25, 0.5)) == ("a", "b")
    assert found.monitors_against(0, (0.0, 0.0)) == ("d",)
    assert found.monitors_against_all(np.zeros((1, 2))) == [("d",)]
    assert combine_box([*pairs, taking("f", 1)], None, POINTS, 1).instead == ("fallback",)
    assert combine_box(pairs[:1], None, POINTS, 1).instead == (None,)
    crossed = np.array([[1.0, 0.0]]), np.array([[0.0, 1.0]])
    assert combine_box([], crossed, POINTS, 1, on_empty="baseline").instead == ("baseline",)


def test_nan_is_no_end() -> None:
    assert combine_box([boxed("a", [[math.nan, 0.0]], [[1.0, 1.0]])], None, POINTS, 1).nothing_left(0)
    assert combine_box([boxed("a", [[0.0, 0.0]], [[1.0, math.nan]])], None, POINTS, 1).nothing_left(0)


def test_constraints_without_rules_need_no_more_than_before() -> None:
    mask = np.ones((1, 2), dtype=np.bool_)
    assert Constraint(mask, (2,)).rules_against(0, (0,)) == ()
    assert Constraint(mask, (2,)).on_empty(0) == "fallback"
    assert Constraint(mask, (2,)).recorded() is mask
    assert BoxConstraint(np.zeros((1, 1)), np.ones((1, 1))).on_empty(0) == "fallback"
    taken = BoxConstraint(np.zeros((1, 1)), np.ones((1, 1)), monitored=(Replaced("a", np.array([True])),))
    assert taken.monitors_against(0, (0.5,)) == ("a",)
    assert taken.monitors_against_all(np.array([[0.5]])) == [("a",)]
    assert Constraint(mask, (2,)).rules_against_all(np.array([[0]])) == [()]
    joint = MaskedJointly("a", np.array([[True, False, True, True, True, True]] * 2))
    watched = Constraint(np.ones((2, 5), dtype=np.bool_), TWO.nvec, monitored=(joint,))
    assert watched.monitors_against_all(np.array([[0, 1], [1, 1]])) == [("a",), ()]
    tuples_too = combine([], None, TWO, 2, joint=True)
    assert (tuples_too.mask.shape, tuples_too.nvec, tuples_too.factors) == ((2, 6), (6,), (2, 3))
    assert tuples_too.mask.all()
    assert safest([]) == "fallback"


# tuples of choices


@given(st.lists(st.integers(1, 4), min_size=1, max_size=4), st.randoms(use_true_random=False))
def test_lifting_agrees_with_every_tuple(sizes: list[int], random: Any) -> None:
    nvec = tuple(sizes)
    every = list(product(*map(range, nvec)))
    assert tuples(nvec).tolist() == [list(each) for each in every]
    assert to_tuples(np.arange(len(every)), nvec).tolist() == tuples(nvec).tolist()
    assert to_indices(tuples(nvec), nvec).tolist() == list(range(len(every)))
    starts = [sum(nvec[:factor]) for factor in range(len(nvec))]
    mask = np.array([[random.random() < 0.6 for _ in range(sum(nvec))] for _ in range(3)])
    for row, lifted in zip(mask, lift_mask(mask, nvec), strict=True):
        assert lifted.tolist() == [all(row[s + c] for s, c in zip(starts, each, strict=True)) for each in every]


@pytest.mark.parametrize("head", ["q_values", "logits", "probabilities"])
def test_a_lifted_target_is_the_same_distribution(head: Any) -> None:
    outputs = np.array([[0.25, 0.75, 0.2, 0.5, 0.3], [0.5, 0.5, 1.0, 0.0, 0.0], [math.nan] * 5])
    wanted = target(outputs, head, nvec=(2, 3))
    lifted = lift_target(wanted)
    mask = masks("11011", "11111", "11111")
    epsilon, fallback = np.array([0.1, 0.2, 0.3]), np.zeros((3, 2), dtype=np.int64)
    apart = behave(wanted, mask, epsilon, fallback)
    together = behave(lifted, lift_mask(mask, (2, 3)), epsilon, np.zeros(3, dtype=np.int64))
    assert marginals(together.probabilities, (2, 3)) == pytest.approx(apart.probabilities)
    for index, (f, z) in enumerate(tuples((2, 3)).tolist()):
        own = apart.own[:, f] * apart.own[:, 2 + z]
        assert together.own[:, index] == pytest.approx(own)


def test_many_factors_of_one_choice_are_still_a_product() -> None:
    nvec = (1,) * 80 + (3,)  # more axes than an array may have
    assert tuples(nvec)[:, -1].tolist() == [0, 1, 2]
    assert lift_mask(np.ones((1, 83), dtype=np.bool_), nvec).tolist() == [[True] * 3]


def test_points_of_a_line_have_boxes_too() -> None:
    line = Box((-1.0,), (1.0,))
    found = combine_box([boxed("a", [[0.0], [-2.0]], [[2.0], [2.0]])], None, line, 2)
    assert found.low.tolist() == [[0.0], [-1.0]]
    assert found.high.tolist() == [[1.0], [1.0]]


def test_seen_rows_stay_as_they_are() -> None:
    facts = facts_of([Seen({"cpu": 0.0, "rps": 0.0, "replicas": 0.0})])
    before = facts.states.copy()
    Filter([Forbid(name="a", when="state.cpu > 0.5")], ONE, OBSERVATION).judge(facts)
    assert (facts.states == before).all()


def test_what_callers_allow_of_a_box_narrows_it() -> None:
    assert request_box([None, None], 2) is None
    request = request_box([None, ((-0.5, math.nan), (math.inf, 0.5))], 2)
    assert request is not None
    found = combine_box([], request, POINTS, 2)
    assert (found.low[0].tolist(), found.high[0].tolist()) == (list(POINTS.low), list(POINTS.high))
    assert found.low[1, 0] == -0.5
    assert [found.nothing_left(row) for row in range(2)] == [False, True]
    assert found.rules_against(1, (0.0, 0.0)) == ("request",)
