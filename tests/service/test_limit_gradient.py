"""The gradient limit on simulated servers: bounds, growth under a pace that stays, retreat from one that does not."""

from __future__ import annotations

from collections.abc import Callable

from hypothesis import given
from hypothesis import strategies as st

from service.limit_gradient import LEAST, WINDOW, GradientLimit

Server = Callable[[int], float]  # so many at once -> how long each takes


def batching(alone_s: float = 0.0003, row_s: float = 0.00006) -> Server:
    """As a worker is: what is there is decided together."""
    return lambda inside: alone_s + row_s * inside


def drive(limit: GradientLimit, server: Server, demand: int, windows: int) -> list[int]:
    """So many callers at once, as far as the limit lets them in. Gives the limit after each window."""
    found = []
    for _ in range(windows):
        for _ in range(WINDOW):
            inside = min(demand, limit.limit)
            limit.note(server(inside), inside)
        found.append(limit.limit)
    return found


def test_it_begins_at_its_most_unless_told_otherwise() -> None:
    assert GradientLimit(256).limit == 256
    assert GradientLimit(256, first=100).limit == 100
    assert GradientLimit(8).limit == 8, "least is no more than most"


def test_it_grows_while_the_pace_stays() -> None:
    limit = GradientLimit(256, first=LEAST)
    found = drive(limit, batching(), demand=1000, windows=400)
    assert found == sorted(found)
    assert found[-1] == 256


def test_it_does_not_move_while_little_of_it_is_used() -> None:
    limit = GradientLimit(256, first=100)
    assert {*drive(limit, batching(), demand=49, windows=50)} == {100}
    assert limit.long_s > 0.0, "what decisions take is learnt all the same"


def test_it_falls_when_decisions_take_longer_and_comes_back_when_they_do_not() -> None:
    limit = GradientLimit(256)
    drive(limit, batching(), demand=1000, windows=50)
    slow = drive(limit, batching(0.05, 0.002), demand=1000, windows=20)
    assert slow == sorted(slow, reverse=True)
    assert slow[-1] < 100
    back = drive(limit, batching(), demand=1000, windows=200)
    assert back[-1] == 256


def test_a_slowness_that_stays_is_the_pace_after_a_while() -> None:
    limit = GradientLimit(256)
    drive(limit, batching(), demand=1000, windows=50)
    found = drive(limit, batching(0.05, 0.0), demand=1000, windows=2_000)
    assert min(found) < 100
    assert found[-1] == 256


def test_a_clock_that_stands_still_tells_it_nothing() -> None:
    limit = GradientLimit(256, first=100)
    assert {*drive(limit, lambda _: 0.0, demand=1000, windows=10)} == {100}
    assert limit.long_s == 0.0


def test_one_slow_window_costs_little() -> None:
    limit = GradientLimit(256)
    drive(limit, batching(), demand=1000, windows=50)
    (after,) = drive(limit, lambda _: 1.0, demand=1000, windows=1)
    assert after >= 0.9 * 256


@given(st.lists(st.tuples(st.floats(allow_nan=True), st.integers(0, 1000)), max_size=2_000), st.integers(1, 400))
def test_whatever_it_is_told_it_keeps_its_bounds(told: list[tuple[float, int]], most: int) -> None:
    limit = GradientLimit(most)
    for took_s, inside in told:
        limit.note(took_s, inside)
        assert min(LEAST, most) <= limit.limit <= most
