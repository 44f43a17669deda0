"""The safety filter is total, and the last look shares no code with it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from policies.types import Box, Choices
from safety.chain import check, check_box, constrain, constrain_box
from safety.fallback import reason
from safety.types import Constraint, FallbackReason


def choices(n: int) -> Choices:
    return Choices((tuple(f"a{i}" for i in range(n)),))


allowed = st.lists(st.one_of(st.none(), st.lists(st.integers(-2, 6), max_size=5)), min_size=1, max_size=4)


@given(allowed, st.integers(1, 5))
def test_constrain_and_check_agree_on_every_action(rows: list[list[int] | None], n: int) -> None:
    mask = constrain(rows, choices(n)).mask
    for action in range(n):
        looked = check([(action,)] * len(rows), [False] * len(rows), rows, [n])
        assert looked.tolist() == mask[:, action].tolist()


@given(
    st.lists(st.one_of(st.none(), st.tuples(*[st.tuples(*[st.sampled_from([-1.0, 0.0, 0.5])] * 2)] * 2)), min_size=1),
    st.tuples(*[st.sampled_from([-3.0, -1.0, 0.0, 0.25, 1.0])] * 2),
)
def test_constrain_and_check_agree_on_every_point(rows: list[Any], point: tuple[float, float]) -> None:
    space = Box((-2.0, -1.0), (2.0, 0.5))
    constraint = constrain_box(rows, space)
    inside = ((constraint.low <= point) & (point <= constraint.high)).all(axis=1)
    assert check_box([point] * len(rows), [False] * len(rows), rows, space).tolist() == inside.tolist()
    assert check_box([point] * len(rows), [True] * len(rows), rows, space).tolist() == [space.validate(point)] * len(
        rows
    )


def test_without_allowed_actions_everything_is_allowed_and_no_rule_speaks() -> None:
    assert constrain([None, None], choices(3)).mask.all()
    assert constrain([None], choices(3)).by_rule == ()


def test_the_request_is_the_rule_that_forbade() -> None:
    constraint = constrain([[0], None], choices(2))
    assert constraint.rules_against(0, (1,)) == ("request",)
    assert constraint.rules_against(0, (0,)) == ()
    assert constraint.rules_against(1, (1,)) == ()


def test_rules_are_named_one_by_one() -> None:
    one, two = np.array([[True, False]]), np.array([[False, False]])
    constraint = Constraint(one & two, (2,), (("a", one), ("b", two)))
    assert constraint.rules_against(0, (0,)) == ("b",)
    assert constraint.rules_against(0, (1,)) == ("a", "b")


def test_a_fallback_passes_the_last_look_only_if_it_exists() -> None:
    assert check([(1,), (2,), (-1,)], [True, True, True], [[0], [0], [0]], [2]).tolist() == [True, False, False]
    assert check([(2,)], [False], [None], [2]).tolist() == [False]


def test_what_is_no_action_of_the_space_does_not_leave() -> None:
    assert check([(0, 0)], [True], [None], [2]).tolist() == [False]
    assert check_box([(0.0, 0.0)], [True], [None], Box((0.0,), (1.0,))).tolist() == [False]
    assert check([(1, 2), (1, 0)], [False, False], [[1, 4], [1, 4]], [2, 3]).tolist() == [True, False]


@pytest.mark.parametrize(
    ("failure", "finite", "left", "expected"),
    [
        ("inference_failed", False, 0, "inference_failed"),
        ("inference_timeout", True, 3, "inference_timeout"),
        (None, False, 0, "not_finite"),
        (None, True, 0, "nothing_allowed"),
        (None, True, 3, "no_mass_allowed"),
    ],
)
def test_the_first_thing_that_went_wrong_is_the_reason(
    failure: FallbackReason | None, finite: bool, left: int, expected: FallbackReason
) -> None:
    assert reason(failure=failure, finite=finite, nothing_left=left == 0) == expected
