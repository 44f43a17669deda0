"""Steps that follow each other, out of the transitions of many episodes: the rules of the Minari export. Pure.

Duty: which transitions make a stretch of an episode without a hole, and why one ends or is left out. It knows neither
files nor Minari.
Strategy: steps come sorted by episode and place. A stretch goes on as long as each step's next state *is* the state of
the next, as the service linked them; anything else ends it, as an episode cut short (`truncated`) where it stands.
Promise: nothing is bridged or made up, but for the last observation of an end that has none (see `Stretch.last`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import msgspec

from surefoot.entries import Row
from surefoot.rows import has_reward

_ENDS = ("terminated", "truncated", "single")
_STRETCH_BYTES = 64 << 20  # of states: a longer stretch is cut, so that memory is bounded


class Step(msgspec.Struct, frozen=True, array_like=True):
    """What an episode needs of a transition."""

    id: str
    episode: str
    step: int
    state: bytes
    next_state: bytes
    next_id: str
    action: int | tuple[int | float, ...]
    reward: float
    end: str
    unusable: str | None  # why it can be no step of an episode, told by the transition alone
    switched: bool
    propensity: float | None
    log_propensity: float
    explored: bool
    epsilon: float
    version: str

    @classmethod
    def of(cls, row: Row) -> Step:
        record = row.record
        return cls(
            id=row.id,
            episode=row.episode,
            step=row.step,
            state=row.state,
            next_state=row.next_state,
            next_id=row.next_id,
            action=row.action,
            reward=row.reward if has_reward(row) else 0.0,
            end=row.end,
            unusable=_unusable(row),
            switched=record.switched,
            propensity=record.propensity,
            log_propensity=row.log_propensity,
            explored=record.explored,
            epsilon=record.epsilon,
            version=record.version,
        )


@dataclass(frozen=True, slots=True)
class Stretch:
    """Steps of one episode, each the successor of the one before."""

    steps: list[Step]
    terminated: bool  # the environment ended it here; otherwise it was cut, and the value of `last` goes on from here
    cut: str | None  # why it was cut, where neither the environment nor its limit did

    @property
    def last(self) -> bytes:
        """The observation behind the last step; the step's own where it ended and nobody told of another."""
        return self.steps[-1].next_state or self.steps[-1].state


def _unusable(row: Row) -> str | None:
    if not has_reward(row):
        return row.join
    return None if row.end in ("none", *_ENDS) else row.end


def stretches(steps: Iterable[Step], left_out: Counter[str]) -> Iterator[Stretch]:
    """Cut steps, sorted by episode and place in it, into stretches. Counts what is left out by reason."""
    begun: list[Step] = []
    missing: str | None = None  # why a step was left out since the last one
    for step in steps:
        why = _apart(begun, step, missing)
        if why == "long":
            begun[-1] = msgspec.structs.replace(begun[-1], next_state=step.state)
        if why is not None:
            yield from _ended(begun, why, left_out)
            begun = []
        if step.unusable:
            left_out[step.unusable] += 1
            missing = step.unusable
            continue
        begun.append(step)
        missing = None
        if step.end in _ENDS:
            yield from _ended(begun, "end", left_out)
            begun = []
    if begun:
        yield from _ended(begun, missing or "open", left_out)


def _apart(begun: Sequence[Step], step: Step, missing: str | None) -> str | None:
    """Why a stretch does not go on with a step, or None. A step that is left out does not by itself part two others."""
    if not begun:
        return None
    before = begun[-1]
    if step.episode != before.episode or (step.step < 0) != (before.step < 0):
        return missing or "open"
    if step.unusable:
        return None
    if step.switched:
        return "switched"
    if not _follows(before, step):
        return missing or "hole"
    if before.next_state not in (b"", step.state):
        return "next_state"
    return "long" if len(begun) * len(step.state) >= _STRETCH_BYTES else None


def _follows(before: Step, step: Step) -> bool:
    """Whether the service linked them; where it named nobody, by number, or without numbers by time."""
    if before.next_id:
        return step.id == before.next_id
    return step.step < 0 or step.step == before.step + 1


def _ended(steps: list[Step], why: str, left_out: Counter[str]) -> Iterator[Stretch]:
    """End a stretch with its last step that can be one: unless the environment ended there, it needs a next state."""
    last = steps[-1]
    if last.next_state or last.end in ("terminated", "single"):
        yield Stretch(steps, last.end in ("terminated", "single"), None if last.end in _ENDS else why)
        return
    left_out["no_next_state"] += 1
    if len(steps) > 1:
        yield Stretch([*steps[:-2], msgspec.structs.replace(steps[-2], next_state=last.state)], False, why)
