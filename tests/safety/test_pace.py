"""The meter of decisions per second, and the pace that follows."""

from __future__ import annotations

import pytest

from safety.pace import LEAST_S, MOST_S, Meter, memory_s, pace


def test_a_meter_measures_from_the_first_moment_on() -> None:
    meter = Meter(10.0)
    assert meter.rate(5.0) == 0.0
    for n in range(1, 2_000):
        meter.add(1, 100.0 + n / 20)
        if n > 100:
            assert meter.rate(100.0 + n / 20) == pytest.approx(20.0, rel=0.1)


def test_a_meter_forgets() -> None:
    meter = Meter(10.0)
    for n in range(1_000):
        meter.add(1, n / 10)
    assert meter.rate(200.0) < 0.01


def test_a_clock_that_is_set_back_wakes_nothing() -> None:
    meter = Meter(10.0)
    meter.add(100, 50.0)
    meter.add(0, 80.0)
    before = meter.rate(80.0)
    assert meter.rate(-1_000.0) == pytest.approx(before)
    assert meter.rate(-990.0) == pytest.approx(before * 0.36, rel=0.05)


def test_memory_follows_the_longest_window_within_limits() -> None:
    assert memory_s([]) == memory_s([1_000]) == LEAST_S
    assert memory_s([600_000, 1_000]) == 30.0
    assert memory_s([86_400_000]) == MOST_S


def test_what_is_left_is_spread_over_the_decisions_that_are_expected() -> None:
    assert pace(own=10, pool=0, own_rate=2.0, fleet_rate=8.0, remaining_s=50) == pytest.approx(0.1)
    assert pace(own=0, pool=80, own_rate=2.0, fleet_rate=8.0, remaining_s=50) == pytest.approx(0.2)
    assert pace(own=10, pool=80, own_rate=2.0, fleet_rate=8.0, remaining_s=50, earns=0.05) == pytest.approx(0.35)


def test_over_all_holders_everything_is_spent_once() -> None:
    rates, owns, pool, remaining_s = (1.0, 3.0, 6.0), (5, 0, 20), 40, 100.0
    spent = sum(
        pace(own, pool, rate, sum(rates), remaining_s) * rate * remaining_s
        for rate, own in zip(rates, owns, strict=True)
    )
    assert spent == pytest.approx(sum(owns) + pool)


def test_at_the_end_and_without_traffic_one_decision_is_expected() -> None:
    assert pace(own=3, pool=2, own_rate=5.0, fleet_rate=9.0, remaining_s=-1.0) == 5.0
    assert pace(own=3, pool=2, own_rate=0.0, fleet_rate=0.0, remaining_s=60.0) == 5.0
    assert pace(own=0, pool=10, own_rate=5.0, fleet_rate=0.0, remaining_s=2.0) == 1.0  # what the bank says is old
