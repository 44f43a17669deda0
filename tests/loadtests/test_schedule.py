"""A schedule is one formula read in two directions, and both agree."""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from loadtests.schedule import Schedule

schedules = st.builds(
    Schedule,
    start_s=st.floats(0.0, 1e6),
    rate=st.floats(0.5, 1e5),
    count=st.integers(1, 10_000),
)


@given(schedules, st.floats(-1.0, 100.0))
def test_due_are_those_whose_time_has_come_and_no_others(schedule: Schedule, after_s: float) -> None:
    now_s = schedule.start_s + after_s
    due = schedule.due(now_s)
    assert 0 <= due <= schedule.count
    assert due == 0 or schedule.intended_s(due - 1) <= now_s
    assert due == schedule.count or schedule.intended_s(due) > now_s


@given(schedules, st.floats(0.0, 100.0), st.floats(0.0, 10.0))
def test_given_up_are_those_that_waited_longer_than_their_callers_patience(
    schedule: Schedule, after_s: float, patience_s: float
) -> None:
    now_s = schedule.start_s + after_s
    gone = schedule.given_up(now_s, patience_s)
    assert gone <= schedule.due(now_s)
    assert gone == 0 or schedule.intended_s(gone - 1) <= now_s - patience_s
    assert gone == schedule.count or schedule.intended_s(gone) > now_s - patience_s


def test_the_rate_is_constant_whatever_happens_meanwhile() -> None:
    schedule = Schedule.lasting(10.0, rate=500.0, seconds=2.0)
    assert schedule.count == 1000
    assert all(
        math.isclose(schedule.intended_s(i + 1) - schedule.intended_s(i), 0.002, abs_tol=1e-9) for i in range(999)
    )
    assert [schedule.due(at) for at in (9.0, 10.0, 11.0, 99.0)] == [0, 1, 501, 1000]


def test_a_schedule_has_one_request_at_least() -> None:
    assert Schedule.lasting(0.0, rate=1.0, seconds=0.1).count == 1


@given(st.floats(0.0, 1e6), st.floats(0.5, 1e5), st.integers(0, 9_999))
def test_a_request_is_due_at_the_very_moment_it_is_meant_to_leave(start_s: float, rate: float, index: int) -> None:
    schedule = Schedule(start_s, rate, 10_000)
    intended_s = schedule.intended_s(index)
    assert schedule.due(intended_s) > index
    assert schedule.intended_s(schedule.due(intended_s) - 1) <= intended_s
