"""What exploring costs, and which rows may: held against a slow, literal re-implementation."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from policies.types import Floats
from safety.budget import (
    CHEAPEST,
    NOTHING,
    UNLIMITED,
    Left,
    Pace,
    allot,
    expected_point_price,
    expected_price,
    millionths,
    paid_price,
    point_prices,
    prices,
    worst_point_price,
    worst_price,
)
from safety.exploration import MICRO

UNIT = st.floats(0, 1)
ANY = st.floats(allow_nan=True, allow_infinity=True)
AMOUNT = st.one_of(st.integers(0, 12), st.just(UNLIMITED))
REGRET = st.one_of(st.integers(0, 5 * MICRO), st.just(UNLIMITED))


def row(values: list[float]) -> Floats:
    return np.array(values, dtype=np.float64)


@st.composite
def batches(draw: st.DrawFn) -> tuple[Floats, Floats, Floats, Floats]:
    """Wanted ε, first uniforms, worst and expected prices of up to 30 rows."""
    n = draw(st.integers(0, 30))
    wanted, u0, worst, part = (row(draw(st.lists(UNIT, min_size=n, max_size=n))) for _ in range(4))
    return wanted, u0 * 0.999_999, worst, worst * part


# Which rows may explore


@given(batches(), st.builds(Left, AMOUNT, AMOUNT, REGRET), st.builds(Pace, UNIT, UNIT, st.floats(0, 2e6)))
def test_rows_are_settled_in_order_each_from_what_the_rows_before_it_left(
    batch: tuple[Floats, Floats, Floats, Floats], left: Left, pace: Pace
) -> None:
    wanted, u0, worst, expected = batch
    found = allot(*batch, left, pace)
    rate, share, regret = left.rate, left.share, left.regret
    for i in range(len(wanted)):
        strength = min(wanted[i], pace.rate, pace.share, pace.regret / (MICRO * min(1.0, max(0.01, expected[i]))))
        price = math.ceil(Fraction(max(0.01, worst[i])) * MICRO - Fraction(1, 10**6))
        if rate < 1 or share < 1 or regret < price:
            strength = 0.0
        assert found.epsilon[i] == pytest.approx(min(1.0, strength))
        assert bool(found.reserved[i]) == (u0[i] < found.epsilon[i])
        if found.reserved[i]:
            rate, share, regret = rate - 1, share - 1, regret - price
    assert found.count == found.reserved.sum()
    if left.regret < UNLIMITED:
        assert found.regret == left.regret - regret


@given(batches(), st.builds(Left, AMOUNT, AMOUNT, REGRET), st.randoms())
def test_whatever_is_drawn_no_more_is_taken_than_was_left(
    batch: tuple[Floats, Floats, Floats, Floats], left: Left, chance: object
) -> None:
    wanted, _, worst, expected = batch
    for u0 in (batch[1], np.zeros(len(wanted))):
        found = allot(wanted, u0, worst, expected, left, Pace())
        explored = u0 < found.epsilon
        assert explored.sum() <= min(left.rate, left.share)
        assert millionths(worst)[explored].sum() <= left.regret


@given(batches(), st.builds(Left, AMOUNT, AMOUNT, REGRET))
def test_a_rows_strength_does_not_depend_on_its_own_uniforms(
    batch: tuple[Floats, Floats, Floats, Floats], left: Left
) -> None:
    wanted, u0, worst, expected = batch
    before = allot(wanted, u0, worst, expected, left, Pace())
    for i in range(len(wanted)):
        for other in (0.0, 0.999):
            changed = u0.copy()
            changed[i] = other
            assert allot(wanted, changed, worst, expected, left, Pace()).epsilon[i] == before.epsilon[i]


@given(
    arrays.arrays(np.float64, (5, 3), elements=ANY),
    arrays.arrays(np.float64, 5, elements=st.floats(0, 1, exclude_max=True)),
    st.builds(Left, AMOUNT, AMOUNT, REGRET),
    st.builds(Pace, ANY, ANY, ANY),
)
def test_it_is_total(table: Floats, u0: Floats, left: Left, pace: Pace) -> None:
    found = allot(table[:, 0], u0, table[:, 1], table[:, 2], left, pace)
    assert ((found.epsilon >= 0.0) & (found.epsilon <= 1.0)).all()
    assert found.regret <= left.regret
    assert found.count <= min(left.rate, left.share)


def test_nothing_left_is_nothing_explored_and_no_caps_are_no_limits() -> None:
    ones = np.ones(1_000)
    assert allot(ones, ones * 0, ones, ones, NOTHING, Pace()).epsilon.max() == 0.0
    assert allot(ones, ones * 0, ones, ones, Left(), Pace()).count == 1_000


def test_a_dear_row_that_does_not_fit_leaves_the_cheap_one_behind_it_room() -> None:
    found = allot(np.ones(4), np.zeros(4), row([0.5, 0.6, 0.3, 0.3]), np.ones(4), Left(regret=800_000), Pace())
    assert found.epsilon.tolist() == [1.0, 0.0, 1.0, 0.0]


# Prices


def test_values_are_priced_by_their_distance_from_the_best_allowed() -> None:
    scores = np.array([[5.0, 4.0, 3.0, -100.0, 9.0]])
    mask = np.array([[True, True, True, True, False]])
    found = prices(scores, mask, 10.0, greedy=True)
    assert found[0, :4] == pytest.approx([0.01, 0.1, 0.2, 1.0])
    assert worst_price(found, mask) == 1.0
    assert worst_price(found, np.array([[False, True, True, False, False]])) == pytest.approx(0.2)  # explore_only
    assert expected_price(found, np.array([[0.25, 0.25, 0.5, 0.0, 0.0]])) == pytest.approx(0.1275)
    assert paid_price(found, np.array([[2]])) == pytest.approx(0.2)


@pytest.mark.parametrize("scale", [None, 0.0, -1.0, math.nan, math.inf])
def test_values_without_a_scale_cost_the_most(scale: float | None) -> None:
    assert (prices(np.zeros((2, 3)), np.ones((2, 3), np.bool_), scale, greedy=True) == 1.0).all()


def test_probabilities_are_priced_by_their_distance_from_the_likeliest_allowed() -> None:
    scores = np.array([[0.6, 0.3, 0.1]])
    mask = np.array([[False, True, True]])
    assert prices(scores, mask, 5.0, greedy=False)[0, 1:] == pytest.approx([0.01, 0.2])


def test_a_collapsed_network_does_not_explore_for_nothing() -> None:
    scores, mask = np.full((1, 4), 2.5), np.ones((1, 4), np.bool_)
    assert (prices(scores, mask, 1.0, greedy=True) == CHEAPEST).all()
    assert (prices(scores, mask, 0.0, greedy=True) == 1.0).all()


def test_factors_add_up_to_the_worst_of_a_single_choice() -> None:
    scores = np.array([[1.0, 0.8, 5.0, 4.6, 1.0]])
    mask = np.ones((1, 5), np.bool_)
    nvec = (2, 3)
    found = prices(scores, mask, 1.0, greedy=True, nvec=nvec)
    assert found[0] == pytest.approx([0.01, 0.2, 0.01, 0.4, 1.0])
    assert worst_price(found, mask, nvec) == 1.0
    assert paid_price(found, np.array([[1, 1]]), nvec) == pytest.approx(0.6)
    assert expected_price(found, np.full((1, 5), 0.5), nvec) == pytest.approx(0.81)


@given(
    arrays.arrays(np.float64, (3, 5), elements=ANY),
    arrays.arrays(np.bool_, (3, 5)),
    st.one_of(st.none(), ANY),
    st.booleans(),
)
def test_every_price_is_between_the_cheapest_and_one(
    scores: Floats, mask: np.ndarray, scale: float | None, greedy: bool
) -> None:
    found = prices(scores, mask, scale, greedy)
    for values in (found, worst_price(found, mask), expected_price(found, mask * 0.2)):
        assert ((values >= CHEAPEST) & (values <= 1.0)).all()
    assert (worst_price(found, np.ones_like(mask)) >= paid_price(found, np.array([[0], [4], [2]]))).all()


def test_points_are_priced_by_their_distance_as_a_part_of_the_box() -> None:
    low, high = row([0.0, -1.0]), row([10.0, 1.0])
    centre = np.array([[5.0, 0.0], [0.0, 1.0]])
    box = np.tile(low, (2, 1)), np.tile(high, (2, 1))
    assert point_prices(np.array([[6.0, 0.0], [0.0, 1.0]]), centre, low, high) == pytest.approx([0.05, 0.01])
    assert worst_point_price(centre, box, low, high) == pytest.approx([0.5, 1.0])
    worst = worst_point_price(centre, box, low, high)
    expected = expected_point_price(centre, row([1.0, 0.2]), worst, low, high)
    assert expected == pytest.approx([0.0798, 0.0798], abs=1e-4)


def test_a_side_without_end_costs_the_most_and_one_without_width_nothing() -> None:
    centre = np.zeros((1, 2))
    low, high = row([-math.inf, 3.0]), row([math.inf, 3.0])
    assert point_prices(centre + 1.0, centre, low, high) == pytest.approx([0.5])
    open_box = np.full((1, 2), -math.inf), np.full((1, 2), math.inf)
    assert worst_point_price(centre, open_box, low, high) == pytest.approx([0.5])
    assert point_prices(np.full((1, 2), math.nan), centre, row([0.0, 0.0]), row([1.0, 1.0])) == 1.0


@given(st.lists(st.floats(-0.9, 0.9), min_size=2, max_size=2), st.lists(st.floats(-1, 1), min_size=2, max_size=2))
def test_no_point_of_the_box_costs_more_than_the_worst(centre: list[float], point: list[float]) -> None:
    low, high = row([-1.0, -1.0]), row([1.0, 1.0])
    middle = np.array([centre])
    worst = worst_point_price(middle, (low[None], high[None]), low, high)
    assert point_prices(np.array([point]), middle, low, high) <= worst + 1e-12


def test_millionths_are_rounded_up() -> None:
    assert millionths(row([0.01, 0.0100001, 1.0, 7.0, math.nan, -1.0])).tolist() == [
        10_000,
        10_001,
        MICRO,
        MICRO,
        MICRO,
        10_000,
    ]
