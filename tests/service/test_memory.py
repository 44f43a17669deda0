"""What recurrent versions remember: by episode and step, bounded, forgotten in time, and honest about what it lacks."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from service.memory import OVERHEAD_BYTES, Memories


def row(value: float) -> np.ndarray:
    return np.array([value], dtype=np.float32)


def stepped(memories: Memories, episode: str, step: int | None, now_s: float = 0.0) -> None:
    memories.keep(episode, step, "d", f"{episode}-{step}", row(step or 0), row((step or 0) + 1), now_s)


def recalled(memories: Memories, *asked: object) -> tuple[float | None, bool]:
    found = memories.recall(*asked)  # type: ignore[arg-type]
    return (None if found.row is None else float(found.row[0])), found.reset


def test_an_episode_goes_on_where_its_last_step_left_it() -> None:
    memories = Memories(10_000, 60.0)
    assert recalled(memories, "e", 0, "d", 0.0) == (None, False)
    stepped(memories, "e", 0)
    assert recalled(memories, "e", 1, "d", 0.0) == (1.0, False)
    assert recalled(memories, "e", None, "d", 0.0) == (1.0, False)
    assert recalled(memories, "e", 0, "d", 0.0) == (None, False), "an episode that begins again begins anew"


def test_the_same_step_asked_again_starts_from_the_same_memory() -> None:
    memories = Memories(10_000, 60.0)
    stepped(memories, "e", 4)
    assert recalled(memories, "e", 4, "d", 0.0) == (4.0, False)


def test_what_does_not_fit_starts_anew_and_says_so() -> None:
    memories = Memories(10_000, 60.0)
    assert recalled(memories, "unknown", 3, "d", 0.0) == (None, True)
    assert recalled(memories, "unknown", None, "d", 0.0) == (None, False), "without a step nobody can know"
    stepped(memories, "e", 4)
    assert recalled(memories, "e", 7, "d", 0.0) == (None, True), "a hole"
    assert recalled(memories, "e", 5, "other version", 0.0) == (None, True)
    memories.keep("e", 5, "d", "id", row(1), None, 0.0)
    assert recalled(memories, "e", 6, "d", 0.0) == (None, True), "the step before failed"
    memories.keep("e", 6, "d", "id", row(1), row(np.nan), 0.0)
    assert recalled(memories, "e", 7, "d", 0.0) == (None, True), "NaN is no memory"
    memories.keep("e", None, "d", "id", row(1), row(2), 0.0)
    assert recalled(memories, "e", 8, "d", 0.0) == (2.0, False)


def test_an_ended_episode_is_forgotten_and_so_is_one_left_alone() -> None:
    memories = Memories(10_000, 60.0)
    stepped(memories, "e", 0)
    stepped(memories, "e", 1)
    memories.ended("e-0")  # not the last decision
    assert len(memories) == 1
    memories.ended("e-1")
    memories.ended("never")
    assert memories.statistics() == {"episodes": 0, "bytes": 0}
    stepped(memories, "old", 0)
    assert recalled(memories, "old", 1, "d", 61.0) == (None, True)
    stepped(memories, "older", 0)
    stepped(memories, "new", 0, 100.0)
    assert len(memories) == 1


@given(st.lists(st.tuples(st.integers(0, 20), st.integers(0, 5)), max_size=60))
def test_memory_is_bounded_and_counted(steps: list[tuple[int, int]]) -> None:
    most = 5 * (OVERHEAD_BYTES + 8)
    memories = Memories(most, 1e9)
    for episode, step in steps:
        stepped(memories, str(episode), step)
        held = memories.statistics()
        assert held["bytes"] == held["episodes"] * (OVERHEAD_BYTES + 8) <= most
    if steps:
        assert recalled(memories, str(steps[-1][0]), steps[-1][1] + 1, "d", 0.0)[0] is not None, "the newest stays"
