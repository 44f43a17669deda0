"""Observation and action specs check what they are given, and name what is wrong."""

from __future__ import annotations

import numpy as np
import pytest

from policies.errors import BundleError, InvalidField, MissingField, SurefootError, UnknownAction, UnknownField
from policies.types import Choices, Feature, ObservationSpec, Target

NAMED = ObservationSpec((2,), features=(Feature("cpu"), Feature("rps")))
IMAGE = ObservationSpec((2, 3))
ACTIONS = Choices((("hold", "up"),))


def test_an_object_is_put_into_the_features_order() -> None:
    assert NAMED.order({"rps": 2.0, "cpu": 1.0}) == [1.0, 2.0]


@pytest.mark.parametrize(
    ("state", "error", "field"),
    [
        ({"cpu": 1.0}, MissingField, "state.rps"),
        ({"cpu": 1.0, "rps": 2.0, "ram": 3.0}, UnknownField, "state.ram"),
    ],
)
def test_a_wrong_object_is_refused_by_feature(state: dict[str, float], error: type[SurefootError], field: str) -> None:
    with pytest.raises(error) as caught:
        NAMED.order(state)
    assert caught.value.field == field


def test_features_without_names_cannot_be_sent_by_name() -> None:
    with pytest.raises(InvalidField, match="send a list"):
        IMAGE.order({"x": 1.0})


def test_elements_that_are_not_finite_are_named_as_the_caller_wrote_them() -> None:
    states = NAMED.array([[1.0, 2.0], [3.0, 1e300]])
    assert NAMED.first_not_finite(states[:1]) is None
    assert NAMED.first_not_finite(states) == 1
    assert NAMED.refuse_not_finite(states[1]).field == "state.rps"
    pixels = IMAGE.array([[[1, 2, 3], [4, 5, np.inf]]])
    assert IMAGE.refuse_not_finite(pixels[0]).field == "state[1][2]"


def test_sizes_and_dtypes() -> None:
    assert (IMAGE.size, IMAGE.wire_dtype, IMAGE.array([[[0] * 3] * 2]).shape) == (6, "<f4", (1, 2, 3))
    assert ObservationSpec((1,), "float64").wire_dtype == "<f8"


def test_actions_are_found_by_name_and_index() -> None:
    assert (ACTIONS.index("up"), ACTIONS.index(0)) == (1, 0)
    assert [ACTIONS.validate((a,)) for a in (-1, 0, 1, 2)] == [False, True, True, False]
    for wrong in ("down", 2, -1):
        with pytest.raises(UnknownAction) as caught:
            ACTIONS.index(wrong, "allowed_actions[0]")
        assert caught.value.field == "allowed_actions[0]"


def test_an_action_space_has_as_many_names_as_actions() -> None:
    for names, factors in (((), ()), (((),), ()), ((("a", "a"),), ()), ((("a",),), ("x", "y"))):
        with pytest.raises(BundleError):
            Choices(names, factors)


def test_a_target_distribution_puts_a_greedy_row_on_its_best_action_and_a_faulty_row_nowhere() -> None:
    greedy = Target(np.array([[1.0, 2.0], [0.0, 0.0]]), greedy=True, faulty=np.array([False, True]), nvec=(2,))
    assert greedy.distribution.tolist() == [[0.0, 1.0], [0.0, 0.0]]


def test_errors_of_a_batch_say_which_element() -> None:
    assert MissingField("x", "reward").within("rewards[2]").field == "rewards[2].reward"
    assert MissingField("x", "[1]").within("state").field == "state[1]"
    assert MissingField("x").within("rewards[0]").field == "rewards[0]"


def test_observations_are_within_the_features_bounds_or_merely_finite() -> None:
    bounded = ObservationSpec((2,), features=(Feature("cpu", 0.0, 1.0), Feature("rps", low=0.0)))
    states = bounded.array([[0.5, 9.0], [1.5, 9.0], [0.5, -1.0], [0.5, np.inf]])
    assert bounded.within(states).tolist() == [True, False, False, False]
    assert IMAGE.within(IMAGE.array([[[1, 2, 3], [4, 5, 6]], [[1, 2, 3], [4, 5, np.nan]]])).tolist() == [True, False]
