"""The delays between attempts."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from surefoot.backoff import Backoff


def test_the_bound_doubles_up_to_the_cap() -> None:
    backoff = Backoff(None, base_s=0.1, cap_s=0.5, jitter=lambda: 1.0)
    assert [backoff.delay_s(0.0) for _ in range(5)] == [0.1, 0.2, 0.4, 0.5, 0.5]


def test_what_the_other_side_asked_for_is_the_least() -> None:
    assert Backoff(None, base_s=0.1, jitter=lambda: 0.5).delay_s(0.0, at_least_s=3.0) == pytest.approx(3.05)


def test_no_wait_ends_past_the_deadline() -> None:
    backoff = Backoff(10.0, base_s=1.0, cap_s=1.0, jitter=lambda: 1.0)
    assert backoff.delay_s(8.5) == 1.0
    assert backoff.delay_s(9.0) is None
    assert backoff.delay_s(1.0, at_least_s=9.0) is None


@given(st.floats(0, 1, exclude_max=True))
def test_delays_stay_within_their_bounds_for_ever(draw: float) -> None:
    backoff = Backoff(None, jitter=lambda: draw)
    for _ in range(2000):
        delay_s = backoff.delay_s(0.0)
        assert delay_s is not None
        assert 0 <= delay_s <= backoff.cap_s
