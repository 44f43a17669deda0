"""Comparisons of features with numbers: arrays and plain Python say what CEL says of them, for every number."""

from __future__ import annotations

import math
from itertools import product
from typing import Any

import cel
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from policies.errors import SafetyError
from policies.types import Choices, Feature, ObservationSpec
from safety.cut import feature_of
from safety.evaluate import evaluator
from safety.expression import denies, program, read
from safety.facts import Facts, Masked
from safety.plain import Reader
from safety.recheck import Recheck, rows_of
from safety.rules import Forbid
from safety.threshold import Thresholds
from safety.views import Views

NAMED = ObservationSpec((2,), "float64", (Feature("x0"), Feature("a-b")))
LISTED = ObservationSpec((2,), "float64")
SQUARE = ObservationSpec((1, 2), "float64")
WRITTEN = [
    (NAMED, ("state.x0", 'state["a-b"]')),
    (LISTED, ("state[0]", "state[1]")),
    (SQUARE, ("state[0][0]", "state[0][1]")),
]
SPACE = Choices((("hold", "up", "down"),))
SIGNS = ("<", "<=", ">", ">=", "==", "!=")
PLAIN = (
    *("0.5", "-0.0", "0", "-0", "- 1", "1", ".5", "1e308", "5e-324", "1e-400", "0.1", "16777217", "16777217.0"),
    *("9007199254740992", "9007199254740993", "-9007199254740993", "9223372036854775807", "3.4028235e38", "1e2"),
)
ODD = (
    *("1u", "0x10", "18446744073709551615u", "-(1)", "--1", "0.1+0.2", "(0.5)", "1.0/0.0", "0.0/0.0", "1/0", "'a'"),
    *("true", "null", "[0.5]", "double('0.5')"),
)
VALUES = (
    *(0.5, -0.0, 0.0, 1.0, -1.0, 2.0, 16.0, 100.0, 0.1, 0.30000000000000004, float(np.float32(0.1)), 5e-324, -5e-324),
    *(2.0**53 - 1, 2.0**53, 2.0**53 + 2, -(2.0**53), 2.0**63, 2.0**64, 16777216.0, 16777218.0, 1e308, -1e308),
    *(float(np.float32(3.4028235e38)), float(np.nextafter(0.5, 1.0)), math.nan, math.inf, -math.inf),
)
KINDS = st.sampled_from(["float32", "float64", "uint8", "int32"])


def atoms(written: tuple[str, str]) -> st.SearchStrategy[str]:
    feature, sign = st.sampled_from(written), st.sampled_from(SIGNS)
    number = st.sampled_from([*PLAIN, *PLAIN, *ODD])
    return st.one_of(
        st.builds("{} {} {}".format, feature, sign, number),
        st.builds("{}{} {}".format, number, sign, feature),
        st.builds("({}){}({})".format, feature, sign, number),
        st.builds("{}{}{}".format, feature, sign, feature),
        st.builds("-{} > {}".format, feature, number),
        st.builds("{} in [1.0, 0.5]".format, feature),
        st.builds('action.name {} "up"'.format, st.sampled_from(["==", "!="])),
        st.builds("{} {} action['index']".format, st.integers(-1, 3), sign),
        st.sampled_from(["action.name in ['up', 'hold',]", "action.index in []", "true", "false", "(1 == 1)"]),
        st.sampled_from(["context.hour > 3", "has(context.hour)", "action.name in ['it', 'up'] ? true : false"]),
    )


def grown(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    return st.one_of(
        st.builds("({}) && {}".format, inner, inner),
        st.builds("({}) || ({})".format, inner, inner),
        st.builds("{}||{}".format, inner, inner),
        st.builds("!({})".format, inner),
        st.builds("!!( {})".format, inner),
        st.builds("!!({}) && {}".format, inner, inner),
        st.builds("!!({}) <= ({})".format, inner, inner),
        st.builds("({}) == ({})".format, inner, inner),
        st.builds("({}) ? ({}) : ({})".format, inner, inner, inner),
    )


def facts(states: Any, contexts: list[Any]) -> Facts:
    count = len(states)
    none = [None] * count
    past, faulty = np.ones(count, dtype=np.bool_), np.zeros(count, dtype=np.bool_)
    return Facts(states, contexts, none, none, past, np.zeros((count, 3)), True, faulty)


def said_by_cel(source: str, spec: ObservationSpec, state: Any, context: Any, action: int) -> bool:
    """The whole expression, shown whole; what it names of the state must be finite."""
    needs = read(source, spec).needs()
    shown = dict(zip(spec.names, state.tolist(), strict=True)) if spec.names else state.tolist()
    named = state if needs.state is None else [state[spec.names.index(name)] for name in needs.state]
    if not np.isfinite(named).all():
        return True
    choice = {"index": action, "name": SPACE.names[0][action]}
    return denies(program(source), cel.Context({"state": shown, "context": context or {}, "action": choice}))


@pytest.mark.parametrize(("spec", "written"), WRITTEN)
def test_arrays_and_python_say_what_cel_says(spec: ObservationSpec, written: tuple[str, str]) -> None:
    pair = st.tuples(st.sampled_from(VALUES), st.sampled_from(VALUES))
    contexts = st.sampled_from([None, {}, {"hour": 7}, {"hour": 7.5, "é": 1}, {"hour": "x"}])
    rows = st.lists(st.tuples(pair, contexts), min_size=1, max_size=4)

    @settings(deadline=None, max_examples=400)
    @given(st.recursive(atoms(written), grown, max_leaves=5), rows, KINDS)
    def holds(source: str, rows: list[Any], kind: str) -> None:
        rule = Forbid(name="rule", when=source)
        try:
            built = evaluator(rule, SPACE, spec)
        except SafetyError:
            assume(False)
        with np.errstate(over="ignore", invalid="ignore"):
            states = np.array([row for row, _ in rows]).astype(kind).reshape(len(rows), *spec.shape)
        seen = facts(states, [context for _, context in rows])
        verdict = built.judge(seen)
        assert verdict is None or isinstance(verdict, Masked)
        look = Recheck([rule], SPACE, spec)
        no = np.zeros(len(rows), dtype=np.bool_)
        for action in range(3):
            expected = [said_by_cel(source, spec, states[i], rows[i][1], action) for i in range(len(rows))]
            masked = [verdict is not None and not verdict.allowed[i, action] for i in range(len(rows))]
            assert masked == expected
            assert [look.broken(row, (action,)) != () for row in rows_of(seen)] == expected
            assert look.broken_rows(seen, np.full((len(rows), 1), action), no, no).tolist() == expected

    holds()


@pytest.mark.parametrize("written", ["state.x0 {} {}", "{1} {0} state.x0"])
@pytest.mark.parametrize("sign", SIGNS)
@pytest.mark.parametrize("number", PLAIN)
def test_every_comparison_of_every_value(written: str, sign: str, number: str) -> None:
    rule = Forbid(name="rule", when=written.format(sign, number))
    states = np.array([[value, 0.0] for value in VALUES])
    seen, no = facts(states, [None] * len(VALUES)), np.zeros(len(VALUES), dtype=np.bool_)
    expected = [said_by_cel(rule.when, NAMED, state, None, 0) for state in states]
    verdict = evaluator(rule, SPACE, NAMED).judge(seen)
    assert isinstance(verdict, Masked)  # at least where the state is not finite
    assert (~verdict.allowed[:, 0]).tolist() == expected
    broken = Recheck([rule], SPACE, NAMED).broken_rows(seen, np.zeros((len(VALUES), 1)), no, no)
    assert broken.tolist() == expected


@pytest.mark.parametrize(
    ("source", "columns"),
    [
        ("state.x0 > 0.5 && action.name == 'up'", 1),
        ("0.5 < state.x0", 1),
        ("!(state.x0 > 0.5 || !(state['a-b'] <= -1)) && (1u + 1u) != (state.x0)", 3),
        ("state.x0 > 0.5 && state.x0 > 0.5 && state.x0 > 0.50", 1),
        ("state.x0 > 9007199254740993", 0),  # CEL rounds it
        ("state.x0 > 1.0 / 0.0", 0),
        ("state.x0 == (state.x0 > 0.5)", 0),
        ("state.x0 > double(action.index)", 0),
        ("state.x0 > state['a-b']", 0),
        ("(state.x0 > 0.5) == (state.x0 > 0.6)", 0),
        ("state.x0 > 0.5 ? true : false", 0),
        ("state.x0 in [0.5]", 0),
        ("-state.x0 > 0.5", 0),
        ("!('a' == context.name && state.x0 > 0.5)", 1),
    ],
)
def test_what_is_said_by_arrays(source: str, columns: int) -> None:
    from safety.forbid import ForbidEvaluator

    views = Views(NAMED)
    ForbidEvaluator(Forbid(name="rule", when=source), SPACE, NAMED, views)
    assert len(views.thresholds) == columns


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("state[1][2]", 5),
        ("state[1]", None),
        ("state[1][3]", None),
        ("state[1][2][0]", None),
        ("state[1][2.0]", None),
        ("state[1][1+1]", None),
        ("size(state)", None),
        ("[state[0][0]][0]", None),
        ("state[0][0] + state[0][1]", None),
    ],
)
def test_a_feature_is_read_by_its_indices(text: str, place: int | None) -> None:
    spec = ObservationSpec((2, 3))
    assert feature_of(read(text, spec), spec) == place


UNKNOWN, TESTED = None, "tested"


@pytest.mark.parametrize(
    ("source", "answers"),
    [
        ("true", [True, True]),
        ("action.name == 'up'", [False, True]),
        ("'up' != action.name", [True, False]),
        ("action.name in ['hold', \"up\"]", [True, True]),
        ("action['index'] >= 1", [False, True]),
        ("1 > action.index", [True, False]),
        ("action.index in [0, 2]", [True, False]),
        ("state.x0 > 0.5 && action.name == 'up'", [False, TESTED]),
        ("state.x0 > 0.5 || action.name == 'up'", [TESTED, True]),
        ("state['x0'] > -.5 && state.x0 < 1e2 && 2 != state.x0", [TESTED, TESTED]),
        ("state.x0 > 0.5 || state.x0 < 0 || 2 == state.x0", [TESTED, TESTED]),
        ("!(action.index == 0) && !!(state.x0 > 1)", [False, TESTED]),
        ("context.hour > 3 && action.name == 'up'", [False, UNKNOWN]),
        ("context.hour > 3 || action.name == 'up'", [UNKNOWN, True]),
        ("!(context.hour > 3) && action.index == 1", [False, UNKNOWN]),
        ("action.index == 0 && (action.index == 0 || action.index == 1)", [True, False]),
        ("action.name == 'up' || false", [False, True]),
        *((source, [UNKNOWN, UNKNOWN]) for source in (
            "state.x0 > 0.5 ? true : false",
            "action.name == 'u\\x70'",
            "action.name == '''up'''",
            "true // && false",
            "state.x0 > 0.5 == true",
            "state.x0 > 9007199254740993",
            "state.x0 > 0x10",
            "state.x0 > 1u",
            "state.x0 > - 'a'",
            "state.x0 > true",
            "state.x0 == 'a'",
            "state.x0 in [0.5]",
            "state.x0 in [-1.0]",
            "state.x0 > 1.0 + 1.0",
            "state.x0 > (0.5)",
            "state.x0 > state.x1",
            "state.nowhere > 0.5",
            "state > 0.5",
            "state[0] > 0.5",
            "state.x0[0.5] > 0.5",
            "state.x0.y > 0.5",
            "[state.x0 > 1][0]",
            "action.name < 'up'",
            "action.name == 1",
            "action.index == 1.0",
            "action.index == 'up'",
            "action.index in ['up']",
            "action.name in 'up'",
            "action.kind == 'up'",
            "!true",
            "#",
            "(true",
        )),
    ],
)  # fmt: skip
def test_what_python_says_alone(source: str, answers: list[object]) -> None:
    reading = Reader(NAMED).read(source)
    found = [reading({"index": i, "name": SPACE.names[0][i]}) for i in range(2)]
    assert [TESTED if callable(each) else each for each in found] == answers


def test_python_reads_features_by_their_indices() -> None:
    reader = Reader(ObservationSpec((2, 3)))
    for source, known in [("state[1][2] > 0.5", True), ("state[1][3] > 0.5", False), ("state[1] > 0.5", False),
                          ("state[1]['a'] > 0.5", False)]:  # fmt: skip
        assert callable(reader.read(source)(None)) is known
    assert reader.features == [5]


def test_comparisons_that_are_asked_twice_are_made_once() -> None:
    thresholds = Thresholds()
    asked = [(1, ">", 0.5), (0, "<", 0.5), (1, ">", 0.5), (0, ">", 0.25)]
    assert [thresholds.column(*each) for each in asked] == [0, 1, 0, 2]
    states = np.array([[0.3, 0.6], [0.5, 0.5]], dtype=np.float32)
    assert thresholds.of(states).tolist() == [[True, True, True], [False, False, True]]
    assert thresholds.column(1, "==", 0.5) == 3
    assert thresholds.of(states).tolist() == [[True, True, True, False], [False, False, True, True]]


def test_every_action_and_state_of_many_rules_at_once() -> None:
    rules = [
        Forbid(name=f"r{i}", when=f"state.x0 {sign} {0.25 * i} && action.index == {i % 3}")
        for i, sign in enumerate(SIGNS)
    ]
    look = Recheck(rules, SPACE, NAMED)
    rows = [(x, 0.0) for x in (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 2.0, math.nan)]
    cases = list(product(rows, range(3)))
    states = np.array([row for row, _ in cases])
    seen, no = facts(states, [None] * len(cases)), np.zeros(len(cases), dtype=np.bool_)
    found = look.broken_rows(seen, np.array([[action] for _, action in cases]), no, no)
    for (row, action), broken in zip(cases, found.tolist(), strict=True):
        one = [said_by_cel(rule.when, NAMED, np.array(row), None, action) for rule in rules]
        assert broken == any(one)
