"""What recurrent versions remember: by episode and step, bounded, forgotten in time, and honest about what it lacks."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from policies.route import Assignment
from service.memory import OVERHEAD_BYTES, Kept, Memories, decode, encode

BEGAN = Assignment("v1", "champion", 0.9)


def row(value: float) -> np.ndarray:
    return np.array([value], dtype=np.float32)


def kept(episode: str, step: int | None, before: float = 0.0, after: float | None = None) -> Kept:
    last = None if after is None else row(after)
    return Kept(BEGAN, "v1", "d", step, f"{episode}-{step}", row(before), last)


def stepped(memories: Memories, episode: str, step: int, now_s: float = 0.0) -> None:
    memories.keep(episode, kept(episode, step, step, step + 1), now_s)


def recalled(memories: Memories, *asked: object) -> tuple[float | None, bool]:
    found = memories.recall(*asked)  # type: ignore[arg-type]
    return (None if found.row is None else float(found.row[0])), found.reset


@dataclass
class Told:
    """What was said to the other workers, in its order."""

    said: list[tuple[str, ...]] = field(default_factory=list)

    def put_nowait(self, episode: str, kept: Kept) -> None:
        self.said.append(("put", episode, kept.decision_id))

    def forget_nowait(self, episode: str, decision_id: str) -> None:
        self.said.append(("forget", episode, decision_id))

    def ended_nowait(self, decision_id: str) -> None:
        self.said.append(("ended", decision_id))


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
    memories.keep("e", kept("e", 5, 1), 0.0)
    assert recalled(memories, "e", 6, "d", 0.0) == (None, True), "the step before failed"
    memories.keep("e", kept("e", 6, 1, np.nan), 0.0)
    assert recalled(memories, "e", 7, "d", 0.0) == (None, True), "NaN is no memory"
    memories.keep("e", kept("e", None, 1, 2), 0.0)
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


def test_a_step_is_looked_for_elsewhere_only_where_nothing_here_comes_before_it() -> None:
    memories = Memories(10_000, 60.0)
    assert not memories.lacks("e", 0, 0.0), "a first step has nothing before it"
    assert memories.lacks("e", 1, 0.0)
    assert memories.lacks("e", None, 0.0)
    stepped(memories, "e", 4)
    assert [step for step in (None, 3, 4, 5, 6) if memories.lacks("e", step, 0.0)] == [3, 6]
    memories.keep("e", kept("e", 5, 5), 0.0)
    assert [step for step in (None, 5, 6) if memories.lacks("e", step, 0.0)] == [None, 6], "step 5 failed"
    assert memories.lacks("e", 5, 61.0), "forgotten"


def test_what_another_worker_kept_is_taken_over_whole_if_the_step_follows() -> None:
    memories = Memories(10_000, 60.0)
    stepped(memories, "e", 4)
    theirs = kept("e", 7, 70, 80)
    assert not memories.adopt("e", theirs, 10, 0.0), "it does not follow there either"
    assert not memories.adopt("e", theirs, 5, 0.0), "nor here, where 4 is"
    assert recalled(memories, "e", 5, "d", 0.0) == (5.0, False)
    assert memories.adopt("e", theirs, 8, 0.0)
    assert recalled(memories, "e", 8, "d", 0.0) == (80.0, False)
    assert recalled(memories, "e", 7, "d", 0.0) == (70.0, False), "a step that is asked again, at another worker"
    assert not memories.adopt("e", kept("e", 7, 0, 0), 8, 0.0), "by now something here follows"
    memories.ended("e-7")
    assert len(memories) == 0, "its last decision came along"


def test_whether_an_unnumbered_step_is_a_first_one_must_have_been_found_out() -> None:
    memories = Memories(10_000, 60.0)
    memories.doubt({"e"})
    assert recalled(memories, "e", None, "d", 0.0) == (None, True)
    assert recalled(memories, "e", 0, "d", 0.0) == (None, False)
    memories.doubt(())
    assert recalled(memories, "e", None, "d", 0.0) == (None, False)


def test_others_are_told_of_steps_that_succeeded_and_of_what_is_forgotten_here() -> None:
    told = Told()
    memories = Memories(2 * (OVERHEAD_BYTES + 8), 60.0, told)
    stepped(memories, "a", 0)
    memories.keep("a", kept("a", 1, 1), 0.0)
    assert told.said == [("put", "a", "a-0")], "after a failed step the one before it still stands elsewhere"
    stepped(memories, "b", 0)
    stepped(memories, "c", 0)
    assert told.said[1:] == [("put", "b", "b-0"), ("forget", "a", "a-1"), ("put", "c", "c-0")], "no room for three"
    assert memories.adopt("d", kept("d", 3, 3, 4), 4, 0.0)
    assert told.said[4:] == [("forget", "b", "b-0")], "what came from there need not be told"
    memories.ended("c-0")
    memories.ended("a decision of another worker")
    assert told.said[5:] == [("forget", "c", "c-0"), ("ended", "a decision of another worker")]


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


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("step", [None, 0, 2**40])
def test_what_is_kept_is_written_and_read_to_the_last_bit(dtype: type[np.floating], step: int | None) -> None:
    before, after = np.array([0.1, -0.0, 1e-40], dtype), np.array([np.pi, 1e30, -7], dtype)
    whole = Kept(Assignment("v3", "challenger", 0.05), "v2", "digest", step, "id", before, after)
    read = decode(encode(whole, after))
    assert read is not None
    assert read.after is not None
    assert (read.before.dtype, read.after.dtype) == (before.dtype, after.dtype)
    assert (read.before.tobytes(), read.after.tobytes()) == (before.tobytes(), after.tobytes())
    assert replace(read, before=before, after=after) == whole


def test_what_cannot_be_read_is_nothing() -> None:
    raw = encode(kept("e", 3, 3, 4), row(4))
    fields = msgspec.msgpack.decode(raw)
    assert fields[1] == "e-3", "scripts look for the decision in front"
    for place, odd in ((0, 2), (8, "<f2"), (9, b"\0" * 5), (6, "janitor"), (1, None)):
        other = [*fields[:place], odd, *fields[place + 1 :]]
        assert decode(msgspec.msgpack.encode(other)) is None, (place, odd)
    for raw_other in (b"", raw[:-1], raw[:20], b"\xc1", msgspec.msgpack.encode(fields[:-2])):
        assert decode(raw_other) is None
    from_before = decode(msgspec.msgpack.encode(fields[:-1]))
    assert from_before is not None
    assert from_before.assignment.generation == 0, "an earlier release did not say when"
