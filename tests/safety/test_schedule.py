"""Schedules: where they begin, where they end, and that they stay between."""

from __future__ import annotations

import math

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from safety.schedule import Constant, Exponential, Linear, Schedule, Span, ends, strength

ENDS = st.floats(0, 1)
SPANS = st.one_of(st.builds(Span, decisions=st.integers(1, 10**9)), st.builds(Span, seconds=st.floats(1e-3, 1e8)))
SCHEDULES = st.one_of(
    st.builds(Constant, value=ENDS),
    st.builds(Linear, start=ENDS, end=ENDS, over=SPANS),
    st.builds(Exponential, start=ENDS, end=ENDS, half_life=SPANS),
)


def test_a_number_and_a_constant_stay_what_they_are() -> None:
    assert strength(0.3, 10**9, 1e9) == strength(Constant(0.3), 10**9, 1e9) == 0.3
    assert ends(0.3) == ends(Constant(0.3)) == (0.3, 0.3)


def test_a_line_goes_from_start_to_end_and_stays_there() -> None:
    schedule = Linear(0.5, 0.1, Span(decisions=100))
    assert [strength(schedule, n, 1e9) for n in (0, 50, 100, 1_000)] == [0.5, pytest.approx(0.3), 0.1, 0.1]
    by_time = Linear(0.5, 0.1, Span(seconds=10.0))
    assert strength(by_time, 10**9, 2.5) == pytest.approx(0.4)


def test_what_is_left_halves_in_each_half_life() -> None:
    schedule = Exponential(0.9, 0.1, Span(seconds=60.0))
    found = [strength(schedule, 10**9, s) for s in (0, 60, 120, 180, 1e9)]
    assert found == [0.9, pytest.approx(0.5), pytest.approx(0.3), pytest.approx(0.2), pytest.approx(0.1)]


@given(SCHEDULES, st.floats(allow_nan=True), st.floats(allow_nan=True))
def test_whatever_the_progress_is_the_strength_lies_between_its_ends(
    schedule: Schedule, decisions: float, elapsed_s: float
) -> None:
    low, high = sorted(ends(schedule))
    assert low <= strength(schedule, decisions, elapsed_s) <= high


@given(SCHEDULES, st.floats(0, 1e12), st.floats(0, 1e12))
def test_a_schedule_moves_towards_its_end_only(schedule: Schedule, one: float, two: float) -> None:
    first, last = ends(schedule)
    earlier, later = (strength(schedule, at, at) for at in sorted((one, two)))
    assert abs(later - last) <= abs(earlier - last) + 1e-12
    assert strength(schedule, 0, 0.0) == first


def test_before_its_beginning_and_without_a_number_it_has_not_begun() -> None:
    schedule = Linear(0.5, 0.1, Span(decisions=100))
    assert strength(schedule, -5) == strength(schedule, math.nan) == 0.5


@pytest.mark.parametrize("span", [{}, {"decisions": 5, "seconds": 1.0}, {"decisions": 0}, {"seconds": 0}, {"hours": 1}])
def test_a_span_is_one_positive_length(span: dict[str, float]) -> None:
    document = {"kind": "linear", "start": 1.0, "end": 0.0, "over": span}
    with pytest.raises(msgspec.ValidationError) as refused:
        msgspec.convert(document, Schedule)
    assert "$.over" in str(refused.value)


def test_the_kinds_are_told_apart_by_their_tag() -> None:
    for schedule in (Constant(1.0), Linear(1.0, 0.0, Span(decisions=3)), Exponential(1.0, 0.0, Span(seconds=3.0))):
        raw = msgspec.json.encode(schedule)
        found: Schedule = msgspec.json.decode(raw, type=Schedule)
        assert found == schedule
