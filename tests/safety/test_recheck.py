"""The last look at a batch says what it says of each row, and is no part of what it looks at."""

from __future__ import annotations

import ast
import math
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import safety.recheck
from policies.errors import SafetyError
from policies.types import ActionSpec, Box, Choices
from safety.facts import Facts
from safety.recheck import MOST_PLANS, Recheck, rows_of
from safety.rules import Bounds, Confidence, ExploreOnly, Forbid, MaxStep, NeverExplore, Rule, Support
from tests.safety.oracle import Seen
from tests.safety.worlds import OBSERVATION, ONE, POINTS, TWO, about, about_rows, facts_of, seen


def forbid(when: str, name: str = "rule", **said: Any) -> Forbid:
    return Forbid(name=name, when=when, **said)


def looked(look: Recheck, facts: Facts, actions: Any, explored: Any = None, fallen: Any = None) -> list[bool]:
    none = np.zeros(len(facts.states), dtype=np.bool_)
    by_chance, fell = (none if each is None else np.array(each) for each in (explored, fallen))
    return [bool(each) for each in look.broken_rows(facts, np.array(actions), by_chance, fell)]


def one_by_one(look: Recheck, facts: Facts, actions: Any, explored: Any, fallen: Any) -> list[bool]:
    rows = zip(rows_of(facts), actions, explored, fallen, strict=True)
    return [not fell and look.broken(row, tuple(action), by_chance) != () for row, action, by_chance, fell in rows]


def rules_over(data: Any, space: ActionSpec) -> list[Rule]:
    rules: list[Rule] = []
    for index in range(data.draw(st.integers(0, 3))):
        if isinstance(space, Box):
            when = data.draw(st.one_of(st.none(), about_rows()))
            rules.append(Bounds(name=f"r{index}", low=[-0.5, None], when=None if when is None else when[0]))
            rules.append(forbid(data.draw(about_rows())[0], f"f{index}"))
        else:
            factor = data.draw(st.sampled_from([None, *space.factors]))
            rules.append(forbid(data.draw(about(space, factor))[0], f"r{index}", factor=factor))
    if isinstance(space, Choices) and data.draw(st.booleans()):
        first = space.factors[0] if space.factors else None
        rules.append(MaxStep(name="step", limit=1.0, values=list(range(space.nvec[0])), initial=0, factor=first))
        rules.append(ExploreOnly(name="only", actions=[0, 1], factor=first))
        rules.append(NeverExplore(name="never", actions=[1], factor=first))
    if isinstance(space, Choices) and data.draw(st.booleans()):
        rules.append(Confidence(name="sure", min_gap=0.5))
    return rules


@settings(deadline=None, max_examples=150)
@given(st.data())
def test_a_batch_is_looked_at_as_its_rows_are(data: Any) -> None:
    space = data.draw(st.sampled_from([ONE, TWO, POINTS]))
    rules = rules_over(data, space)
    try:
        look = Recheck(rules, space, OBSERVATION)
    except SafetyError:
        return
    last = None if isinstance(space, Box) else st.tuples(*(st.integers(0, n - 1) for n in space.nvec))
    count = data.draw(st.integers(1, 4))
    facts = facts_of(data.draw(st.lists(seen(last), min_size=count, max_size=count)))
    if data.draw(st.booleans()):
        facts.states[0, 1] = data.draw(st.sampled_from([math.nan, math.inf]))
    one = st.sampled_from(
        [(-1.0, 0.5), (0.5, 0.0)] if isinstance(space, Box) else list(product(*map(range, space.nvec)))
    )
    actions = data.draw(st.lists(one, min_size=count, max_size=count))
    explored, fallen = (data.draw(st.lists(st.booleans(), min_size=count, max_size=count)) for _ in range(2))
    assert looked(look, facts, actions, explored, fallen) == one_by_one(look, facts, actions, explored, fallen)


def test_what_is_kept_of_actions_has_a_bound() -> None:
    wide = Choices((tuple(f"a{i}" for i in range(MOST_PLANS + 2)),))
    look = Recheck([forbid("action.index == 3")], wide, OBSERVATION)
    count = MOST_PLANS + 2
    facts = facts_of([Seen({"cpu": 0.0, "rps": 0.0, "replicas": 0.0})] * count)
    found = looked(look, facts, [[i] for i in range(count)])
    assert [i for i, broken in enumerate(found) if broken] == [3]
    assert looked(look, facts, [[3]] * count) == [True] * count


def test_what_is_no_action_breaks_every_rule() -> None:
    look = Recheck([forbid("action.index == 3")], ONE, OBSERVATION)
    facts = facts_of([Seen({"cpu": 0.0, "rps": 0.0, "replicas": 0.0})] * 2)
    assert looked(look, facts, [[0], [4]]) == [False, True]
    assert look.broken(rows_of(facts)[0], (4,)) == ("rule",)


def test_a_context_that_is_not_small_is_left_to_cel() -> None:
    look = Recheck([forbid("action.name == 'hold' && context.hour > 3")], ONE, OBSERVATION)
    state = {"cpu": 0.0, "rps": 0.0, "replicas": 0.0}
    contexts: list[dict[str, Any] | None] = [None, {"hour": 4}, {"hour": list(range(2_000))}, {"hour": {"a": 1}}]
    facts = facts_of([Seen(state, context) for context in contexts])
    assert looked(look, facts, [[0]] * 4) == [True] * 4
    assert looked(look, facts, [[1]] * 4) == [False, False, True, False]


@pytest.mark.parametrize("name", ["plain", "recheck", "recheck_expression", "recheck_kinds", "drawn"])
def test_it_imports_nothing_of_what_it_looks_at(name: str) -> None:
    source = Path(safety.recheck.__file__).with_name(f"{name}.py").read_text()
    imported = {node.module for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ImportFrom)}
    evaluating = {"condition", "cut", "parts", "views", "threshold", "forbid", "bounds", "step", "support", "exploring"}
    judging = {"confidence", "combine", "evaluate", "tokens", "chain", "mask", "joint", "types"}
    assert not imported & {f"safety.{each}" for each in evaluating | judging}


def test_support_is_looked_at_too() -> None:
    from policies.types import Feature, ObservationSpec

    spec = ObservationSpec((1,), "float64", (Feature("x", 0.0, 1.0),))
    look = Recheck([Support(name="rule")], ONE, spec)
    facts = facts_of([Seen({"x": 0.5}), Seen({"x": 2.0})], ("x",))
    assert looked(look, facts, [[0], [0]]) == [False, True]
