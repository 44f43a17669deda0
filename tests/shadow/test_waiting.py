"""What waits for a shadow is bounded, and what is kept of it is a fair sample that says how fair."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shadow.shown import OVERHEAD_BYTES
from shadow.waiting import LEAST_SHARE, Waiting, heights
from tests.service.watching import many


def test_everything_is_kept_while_there_is_room_and_comes_out_in_order() -> None:
    waiting = Waiting(most_rows=100)
    assert [waiting.put(many(30, f"{batch}-")) for batch in "abc"] == [0, 0, 0]
    assert (waiting.rows, waiting.share) == (90, 1.0)
    first = waiting.take(64)
    assert [part.ids[0] for part in first] == ["a-0", "b-0"]
    assert all((part.share == 1.0).all() for part in first)
    assert [part.ids[0] for part in waiting.take(1)] == ["c-0"], "one batch at least"
    assert waiting.take(64) == []
    assert (waiting.rows, waiting.bytes, waiting.oldest_s) == (0, 0, None)


def test_the_age_is_that_of_the_oldest() -> None:
    waiting = Waiting()
    waiting.put(many(1, offered_s=np.array([3.0])))
    waiting.put(many(1, offered_s=np.array([9.0])))
    assert waiting.oldest_s == 3.0


def test_what_does_not_fit_halves_the_share_and_an_empty_queue_doubles_it() -> None:
    waiting = Waiting(most_rows=100)
    dropped = waiting.put(many(150))
    assert waiting.share == 0.5
    assert waiting.rows == 150 - dropped == int((heights([f"d{i}" for i in range(150)]) < 0.5).sum())
    assert all((part.share == 0.5).all() for part in waiting.take(1000))
    waiting.put(many(1, "e"))
    assert waiting.share == 1.0


def test_a_batch_larger_than_the_queue_leaves_a_sample() -> None:
    waiting = Waiting(most_rows=16)
    dropped = waiting.put(many(1000))
    assert 0 < waiting.rows <= 16
    assert dropped == 1000 - waiting.rows


def test_bytes_are_bounded_as_rows_are() -> None:
    wide = many(64, states=np.zeros((64, 1000), dtype=np.float32))
    waiting = Waiting(most_bytes=100_000)
    waiting.put(wide)
    assert waiting.bytes <= 100_000
    assert waiting.bytes == sum(part.nbytes for part in waiting.take(64))
    assert wide.nbytes > 64 * (4000 + OVERHEAD_BYTES)


def test_rows_that_no_share_makes_fit_are_dropped_all() -> None:
    episode = ["e"] * 50
    waiting = Waiting(most_rows=10)
    assert waiting.put(many(50, episodes=episode)) == 50
    assert waiting.rows == 0
    assert waiting.share < 1.0
    for i in range(100):  # it recovers
        waiting.put(many(1, f"x{i}"))
        waiting.take(10)
    assert waiting.share == 1.0
    assert LEAST_SHARE > 0.0


def test_an_empty_batch_is_none() -> None:
    waiting = Waiting()
    assert waiting.put(many(0)) == 0
    assert waiting.take(1) == []


def test_an_episode_is_kept_or_dropped_as_a_whole() -> None:
    waiting = Waiting(most_rows=200)
    for step in range(20):
        waiting.put(many(50, f"{step}-", episodes=[f"e{i}" for i in range(50)], steps=[step] * 50))
    kept: Counter[str | None] = Counter()
    for part in waiting.take(1000):
        kept.update(part.episodes)
    assert waiting.share < 1.0
    # The share only fell: whatever is left of an episode is all of it.
    assert set(kept.values()) == {20}


@given(
    st.lists(st.tuples(st.integers(1, 40), st.integers(0, 60)), min_size=1, max_size=30),
    st.integers(1, 50),
)
def test_bounds_hold_and_nothing_is_lost_uncounted(turns: list[tuple[int, int]], most: int) -> None:
    waiting = Waiting(most_rows=most)
    offered = dropped = taken = 0
    for turn, (rows, take) in enumerate(turns):
        dropped += waiting.put(many(rows, f"{turn}-"))
        offered += rows
        assert waiting.rows <= most
        for part in waiting.take(take):
            taken += len(part)
            assert (heights(part.units) < part.share).all()
            assert set(part.share) == {part.share[0]}
    left = waiting.rows
    assert waiting.clear() == left
    assert offered == dropped + taken + left


def test_each_kept_decision_stands_for_exactly_one_over_its_share() -> None:
    """Horvitz-Thompson totals of a queue under changing load, against the truth: the mean error is chance alone."""
    errors = []
    for run in range(300):
        waiting, truth, estimate = Waiting(most_rows=20), 0.0, 0.0
        random = np.random.default_rng(run)
        for turn in range(40):
            rows = int(random.integers(1, 12)) if turn % 10 < 7 else 1
            values = random.uniform(0.5, 1.5, size=rows)
            truth += values.sum()
            # The value travels in the state: it has nothing to do with the hash.
            waiting.put(many(rows, f"{run}-{turn}-", states=values[:, None]))
            for part in waiting.take(4) if turn % 3 == 0 else []:
                estimate += float((part.states[:, 0] / part.share).sum())
        while parts := waiting.take(20):
            estimate += sum(float((part.states[:, 0] / part.share).sum()) for part in parts)
        errors.append(estimate / truth - 1.0)
    spread = np.std(errors) / np.sqrt(len(errors))
    assert abs(np.mean(errors)) < 4 * spread
    assert np.std(errors) > 0.02, "nothing was shed"


def test_what_never_fits_is_dropped_whatever_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch beyond the bound, whose rows have the very lowest places: no share would thin it."""
    monkeypatch.setattr("shadow.waiting.heights", lambda units: np.zeros(len(units)))
    waiting = Waiting(most_rows=10)
    assert waiting.put(many(11)) == 11
    assert (waiting.rows, waiting.bytes) == (0, 0)
    assert waiting.share < LEAST_SHARE
