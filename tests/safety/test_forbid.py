"""`forbid` says what CEL says, evaluated for each row and choice; whatever fails denies."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from policies.errors import SafetyError
from policies.types import ActionSpec, Box, Choices, Feature, ObservationSpec
from safety.evaluate import evaluator
from safety.expression import NOTHING, Program, denies, program
from safety.facts import Boxed, Masked, MaskedJointly, Verdict
from safety.forbid import ForbidEvaluator
from safety.recheck import Recheck, rows_of
from safety.rules import Forbid
from safety.tokens import split, tokenize, unwrap
from safety.views import Views
from tests.safety.oracle import Seen, allows
from tests.safety.worlds import OBSERVATION, ONE, POINTS, TWO, Expression, about, factors, facts_of, seen


def forbid(when: str, factor: str | None = None) -> Forbid:
    return Forbid(name="rule", when=when, factor=factor)


def bound(
    when: str, space: ActionSpec = ONE, factor: str | None = None, observation: ObservationSpec = OBSERVATION
) -> ForbidEvaluator:
    found = evaluator(forbid(when, factor), space, observation)
    assert isinstance(found, ForbidEvaluator)
    return found


def row(context: dict[str, Any] | None = None, **state: float) -> Seen:
    return Seen({"cpu": 0.0, "rps": 0.0, "replicas": 0.0} | state, context)


def said(when: str, *rows: Seen, space: ActionSpec = ONE, factor: str | None = None) -> list[list[bool]] | None:
    """What is allowed, as lists."""
    verdict = bound(when, space, factor).judge(facts_of(rows))
    if verdict is None:
        return None
    assert isinstance(verdict, Masked | MaskedJointly)
    return [[bool(each) for each in allowed] for allowed in verdict.allowed]


def permits(verdict: Verdict | None, space: ActionSpec, row: int, action: tuple[int, ...]) -> bool:
    if verdict is None:
        return True
    if isinstance(verdict, Boxed):
        return bool((verdict.low[row] <= verdict.high[row]).all())
    assert isinstance(space, Choices)
    if isinstance(verdict, MaskedJointly):
        return bool(verdict.allowed[row, list(product(*map(range, space.nvec))).index(action)])
    assert isinstance(verdict, Masked)
    return all(verdict.allowed[row, start + choice] for start, choice in zip(space.starts, action, strict=True))


@pytest.mark.parametrize(("space", "factor"), [(ONE, None), (TWO, None), (TWO, "speed"), (TWO, "zone"), (POINTS, None)])
def test_it_says_what_the_oracle_says_for_every_row_and_action(space: ActionSpec, factor: str | None) -> None:
    @settings(deadline=None, max_examples=100)
    @given(about(space, factor), st.lists(seen(), min_size=1, max_size=4))
    def holds(expression: Expression, rows: list[Seen]) -> None:
        rule = forbid(expression[0], factor)
        try:
            built = evaluator(rule, space, OBSERVATION)
        except SafetyError:
            return  # a part that never says true or false
        facts = facts_of(rows)
        verdict = built.judge(facts)
        look = Recheck([rule], space, OBSERVATION)
        actions = [()] if isinstance(space, Box) else list(product(*map(range, space.nvec)))
        known = space.size if isinstance(space, Box) else factors(space)
        for index, (one, again) in enumerate(zip(rows, rows_of(facts), strict=True)):
            for action in actions:
                expected = allows(rule, known, one, action, expression[1])
                assert permits(verdict, space, index, action) == expected, expression[0]
                assert (look.broken(again, action) == ()) == expected, expression[0]

    holds()


@pytest.mark.parametrize(
    "when",
    [
        "context.nowhere > 1",  # a missing field
        "context.hour > 'a'",  # no such overload
        "context.hour / 0 > 1",
        "9223372036854775807 + context.hour > 0",
        "context.name",  # no bool
        "context.name.matches('(')",
        "[1, 2][context.hour] == 1",
        "timestamp(context.name) > timestamp('2020-01-01T00:00:00Z')",
        "state.cpu / state.rps > 1.0",  # NaN
    ],
)
def test_whatever_fails_denies(when: str) -> None:
    assert said(when, row({"hour": 7, "name": "x"})) == [[False] * 4]


def test_a_failure_that_the_language_absorbs_is_none() -> None:
    assert said("context.nowhere > 1 && action.name == 'hold'", row()) == [[False, True, True, True]]
    assert said("context.nowhere > 1 || state.cpu < 1.0", row()) == [[False] * 4]


def test_a_row_that_cannot_be_shown_is_denied_and_no_other() -> None:
    rows = [row(cpu=0.1), row(cpu=float("nan")), row(cpu=float("inf")), row(rps=float("nan"))]
    assert said("state.cpu > 0.5", *rows) == [[True] * 4, [False] * 4, [False] * 4, [True] * 4]
    look = Recheck([forbid("state.cpu > 0.5")], ONE, OBSERVATION)
    assert [look.broken(again, (0,)) for again in rows_of(facts_of(rows))] == [(), ("rule",), ("rule",), ()]


@pytest.mark.parametrize(
    "value",
    [
        list(range(1_001)),
        "x" * 65_537,
        {"a": ["x" * 65_537]},
        float("nan"),
        {"a": [float("inf")]},
        "\ud800",
        object(),
    ],
)
def test_a_context_that_cannot_be_shown_denies_where_it_is_named(value: object) -> None:
    assert said("context.hour == 7", row({"hour": 6, "list": value})) is None
    for when in ("context.list == 7", "size(context) == 7"):
        assert said(when, row({"hour": 6, "list": value})) == [[False] * 4]
        look = Recheck([forbid(when)], ONE, OBSERVATION)
        (shown,) = rows_of(facts_of([row({"list": value})]))
        assert look.broken(shown, (0,)) == ("rule",)


def test_every_set_of_choices_may_be_forbidden() -> None:
    seven = Choices((tuple("abcdefg"),))
    rule = bound("context.list.exists(y, y == action.index)", seven)
    for chosen in range(128):
        among = [index for index in range(7) if chosen >> index & 1]
        verdict = rule.judge(facts_of([row({"list": among})]))
        assert (verdict is None) == (not among)
        assert verdict is None or [permits(verdict, seven, 0, (i,)) for i in range(7)] == [
            i not in among for i in range(7)
        ]
    both = rule.judge(facts_of([row({"list": [0]}), row({"list": [1]}), row({"list": []})]))
    assert isinstance(both, Masked)
    assert both.allowed[:, :3].tolist() == [[False, True, True], [True, False, True], [True, True, True]]


def test_rows_that_comparisons_decide_ask_no_program() -> None:
    when = "state.cpu > 0.5 && state.cpu < 0.3 && context.nowhere"
    assert said(when, row(cpu=0.9), row(cpu=0.1)) is None
    assert said(when.replace("0.3", "0.8"), row(cpu=0.9), row(cpu=0.7)) == [[True] * 4, [False] * 4]


def test_a_context_of_many_keys_is_shown_too() -> None:
    many = {f"k{i}": i for i in range(100)}
    assert said("context.k7 == 7 && action.index == 0", row(many), row({"k7": 8})) == [[False, *[True] * 3], [True] * 4]


def test_a_context_too_deep_denies() -> None:
    deep: list[Any] = []
    for _ in range(50_000):  # the library would convert it by recursion, and crash
        deep = [deep]
    assert said("size(context.list) == 0", row({"list": deep})) == [[False] * 4]
    while deep:  # taken apart by hand: nor can the interpreter free it by recursion everywhere
        deep = deep.pop()


def test_one_rule_s_large_context_is_not_another_s() -> None:
    views = Views(OBSERVATION)
    one = ForbidEvaluator(forbid("context.hour == 7"), ONE, OBSERVATION, views)
    two = ForbidEvaluator(forbid("context.list == 7"), ONE, OBSERVATION, views)
    facts = facts_of([row({"hour": 6, "list": list(range(2_000))}), row({"hour": 6, "list": 1})])
    assert one.judge(facts) is None
    verdict = two.judge(facts)
    assert isinstance(verdict, Masked)
    assert verdict.allowed.tolist() == [[False] * 4, [True] * 4]


def test_states_without_names_are_lists() -> None:
    picture = ObservationSpec((2, 2), "float32")
    shown = np.array([[[0.0, 1.0], [2.0, 3.0]]], dtype=np.float32)
    facts = replace(facts_of([row()]), states=shown)
    assert bound("state[1][0] > 1.5", observation=picture).judge(facts) is not None
    assert bound("state[1][0] > 2.5", observation=picture).judge(facts) is None
    assert Recheck([forbid("state[1][0] > 1.5")], ONE, picture).broken(rows_of(facts)[0], (0,)) == ("rule",)
    assert Recheck([forbid("state[1][0] > 2.5")], ONE, picture).broken(rows_of(facts)[0], (0,)) == ()
    with pytest.raises(SafetyError, match="have no names"):
        bound("state.cpu > 1.0", observation=picture)


def test_an_empty_batch_is_judged_too() -> None:
    assert bound("state.cpu > 0.5").judge(facts_of([])) is None


def test_a_rule_over_several_factors_speaks_of_tuples_only_if_it_names_several() -> None:
    assert not bound("state.cpu > 0.5", TWO).joint
    assert not bound("action.zone.name == 'x'", TWO).joint
    assert bound("action.zone.name == 'x' && action.speed.index == 1", TWO).joint
    assert said("action.zone.name == 'y'", row(), space=TWO) == [[True, True, True, False, True]]
    assert said("action.name == 'up'", row(), space=TWO, factor="speed") == [[True, False, True, True, True]]
    # A rule about one factor that does not name it forbids all of it.
    assert said("true", row(), space=TWO, factor="speed") == [[False, False, True, True, True]]


@pytest.mark.parametrize(
    ("when", "space", "complaint"),
    [
        ("1 +", ONE, "not CEL"),
        ("action.name # 'hold'", ONE, "no part of an expression"),
        ("(" * 3_000, ONE, "not CEL"),
        ("true " * 1_000, ONE, "at most 4096"),
        ("action == 'hold'", ONE, "read as action.name or action.index"),
        ("action.nome == 'hold'", ONE, "read as"),
        ("action.name.first == 'hold'", ONE, "read as"),
        ("action.name == 'holt'", ONE, "no action 'holt'"),
        ("'holt' != action.name", ONE, "no action 'holt'"),
        ("action.name in ['hold', 'holt']", ONE, "no action 'holt'"),
        ("action.nowhere.name == 'x'", TWO, "read as action.speed.name or action.zone.name"),
        ("action.name == 'x'", TWO, "read as action.speed.name"),
        ("action.size() == 2", TWO, "read as"),
        ("action.index > 0", POINTS, "cannot name a continuous"),
        ("nowhere > 1", ONE, "no 'nowhere'"),
        ("state.cpus > 1.0", ONE, "no feature 'cpus'; known: cpu"),
        ("state[0] > 1.0", ONE, "write state.cpu"),
        ("now() > 1", ONE, "no function 'now'"),
        ("state.cpu.abs() > 1.0", ONE, "no function 'abs'"),
        ("state.cpu + 1 > 1.0", ONE, "cannot be decided"),  # a double and an int
        ("state.cpu", ONE, "neither true nor false"),
        ("action.name && state.cpu > 1.0", ONE, "neither true nor false"),
        ("'a'.matches('(')", ONE, "cannot be decided"),
        ("context.a.all(x, context.b.exists(y, x == y))", ONE, "macro within a macro"),
        ("context.a.all(state, state > 1)", ONE, "variable of a macro"),
    ],
)  # fmt: skip
def test_what_could_not_mean_anything_is_refused_at_load(when: str, space: ActionSpec, complaint: str) -> None:
    with pytest.raises(SafetyError, match=complaint) as refused:
        bound(when, space)
    assert refused.value.field == "when"


@pytest.mark.parametrize(
    ("space", "complaint"), [(ONE, "is one choice"), (TWO, "known: speed"), (POINTS, "no factors")]
)
def test_a_factor_that_does_not_exist_is_refused(space: ActionSpec, complaint: str) -> None:
    with pytest.raises(SafetyError, match=complaint) as refused:
        bound("true", space, "nowhere")
    assert refused.value.field == "factor"


PIECES = [
    *(
        "state",
        "action",
        ".cpu",
        ".name",
        "['a']",
        "[0]",
        "(",
        ")",
        "&&",
        "||",
        "!",
        "-",
        "+",
        "==",
        "<",
        "in",
        "?",
        ":",
    ),
    *(
        "'a'",
        '"b"',
        r"r'\'",
        "'''q'''",
        "b'x'",
        "R'''a'''",
        '"""m\nn"""',
        "'\\''",
        "1",
        "1.5",
        "2u",
        ".5",
        "1e3",
        "0x1F",
    ),
    *("true", "null", "// c && d\n", "\n", "\f", "é", "$", "#", "&", "|", "{'a':1}", "[1,2].all(x, x > 1)", "size("),
]


@settings(deadline=None, max_examples=2_000)
@given(st.lists(st.sampled_from(PIECES), max_size=7), st.sampled_from(["", " "]))
def test_every_part_of_what_the_library_accepts_is_accepted(pieces: list[str], between: str) -> None:
    source = between.join(pieces)
    try:
        program(source)
    except SafetyError:
        return
    waiting = [tuple(tokenize(source))]
    while waiting:
        tokens = tuple(unwrap(waiting.pop()))
        program(source[tokens[0].start : tokens[-1].end])
        for operator in ("||", "&&"):
            parts = split(tokens, operator)
            if len(split(tokens, "?")) == 1 and len(parts) > 1:
                waiting += map(tuple, parts)
                break


def test_what_depends_on_the_values_is_no_complaint() -> None:
    assert said("1 / int(state.cpu - state.cpu) > 0", row()) == [[False] * 4]


@pytest.mark.parametrize(
    ("when", "allowed"),
    [
        (r"""r'\' == '\\' && action.name == "hold" """, [False, True, True, True]),
        ("'''it's''' == \"it's\" && action.index in [0]", [False, True, True, True]),
        ("'a && b' == \"a && b\" // && false", [False] * 4),
        ("0x1F == 31 && 1e3 > .5 && 2u == 2u && action.index==3", [True, True, True, False]),
        ("[1, 2].map(x, x * 2).exists(x, x == 4) && {'a': 1}.a == 1", [False] * 4),
        ("action.name == 'da' + '\"y'", [True, True, True, False]),
        ("'up' + '_1' == action.name", [True, False, True, True]),
        ("context.size() == 0 && ((action.name == 'hold'))", [False, True, True, True]),
        ("(action.index == 0) || (action.index == 1)", [False, False, True, True]),
        ("action.index == 0 ? false : true && action.index > 1", [True, True, False, False]),
        ("type(action.index) == int && action.index == 2", [True, True, False, True]),
    ],
)
def test_text_is_cut_where_the_language_cuts_it(when: str, allowed: list[bool]) -> None:
    assert said(when, row()) == [allowed]
    look = Recheck([forbid(when)], ONE, OBSERVATION)
    (again,) = rows_of(facts_of([row()]))
    assert [look.broken(again, (choice,)) == () for choice in range(4)] == allowed


def test_programs_and_tuples_have_bounds() -> None:
    wide = Choices((tuple(f"a{i}" for i in range(5_000)),))
    assert said("action.index == 4999", row(), space=wide) == [[True] * 4_999 + [False]]
    with pytest.raises(SafetyError, match="takes too long"):
        bound("context.hour == action.index", wide)
    square = Choices((wide.names[0][:100], wide.names[0][:100]), ("f", "g"))
    with pytest.raises(SafetyError, match="there are 10000"):
        bound("action.f.index == action.g.index", square)


def test_a_panic_denies_and_an_interrupt_interrupts() -> None:
    class Raises:
        """The library panics by a BaseException; no expression is known that makes it."""

        def __init__(self, error: type[BaseException]) -> None:
            self.error = error

        def execute(self, view: object) -> object:
            raise self.error

    assert denies(cast(Program, Raises(BaseException)), NOTHING)
    with pytest.raises(KeyboardInterrupt):
        denies(cast(Program, Raises(KeyboardInterrupt)), NOTHING)


def test_names_are_written_so_that_cel_reads_them() -> None:
    odd = Choices((('"', "\\", "é", "😀", "\n", "a b", "}"),))
    for index, name in enumerate(odd.names[0]):
        (allowed,) = said("action.name == context.name", row({"name": name}), space=odd) or [[]]
        assert allowed == [other != index for other in range(7)]


def test_features_are_read_by_name() -> None:
    spec = ObservationSpec((2,), features=(Feature("a-b"), Feature("size")))
    facts = facts_of([Seen({"a-b": 1.0, "size": 2.0})], ("a-b", "size"), "float32")
    assert bound("state['a-b'] > 0.5 && state.size > 1.5", observation=spec).judge(facts) is not None
    assert bound("state['a-b'] > 1.5 || state.size > 2.5", observation=spec).judge(facts) is None
