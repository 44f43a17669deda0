"""How a strength changes over time: constant, linear, exponential. Pure, total.

Duty: a schedule gives a number; whoever uses it says what the number is: ε, the temperature of a softmax, σ of a
Gaussian. It counts nothing and reads no clock: how far things have come is an argument.
Promise: a strength lies between `start` and `end`, whatever the progress is; without an end it never leaves `value`.
"""

from __future__ import annotations

import math
from typing import Annotated

from msgspec import Meta, Struct

Strength = Annotated[float, Meta(ge=0, le=1_000_000)]
Count = Annotated[int, Meta(ge=1, le=1_000_000_000_000)]
Duration = Annotated[float, Meta(gt=0, le=10 * 366 * 86_400)]


class Span(Struct, forbid_unknown_fields=True, frozen=True):
    """A stretch of progress: so many decisions of the policy, of all replicas together, or so many seconds."""

    decisions: Count | None = None
    seconds: Duration | None = None

    def __post_init__(self) -> None:
        if (self.decisions is None) == (self.seconds is None):
            raise ValueError("give either `decisions` or `seconds`")

    def passed(self, decisions: float, elapsed_s: float) -> float:
        """How many such stretches have passed, at least 0. What is not a number counts as the beginning."""
        gone = decisions / self.decisions if self.decisions is not None else elapsed_s / (self.seconds or 1.0)
        return max(0.0, gone) if not math.isnan(gone) else 0.0


class Constant(Struct, forbid_unknown_fields=True, frozen=True, tag_field="kind", tag="constant"):
    """Always `value`."""

    value: Strength


class Linear(Struct, forbid_unknown_fields=True, frozen=True, tag_field="kind", tag="linear"):
    """From `start` to `end` in a straight line `over` a span, then `end`."""

    start: Strength
    end: Strength
    over: Span


class Exponential(Struct, forbid_unknown_fields=True, frozen=True, tag_field="kind", tag="exponential"):
    """From `start` towards `end`, half of the rest in each `half_life`."""

    start: Strength
    end: Strength
    half_life: Span


Schedule = Constant | Linear | Exponential


def strength(schedule: Schedule | float, decisions: float = 0, elapsed_s: float = 0.0) -> float:
    """Give the strength after so many decisions and seconds since the schedule began. A number is itself."""
    match schedule:
        case Constant():
            return schedule.value
        case Linear():
            part = min(1.0, schedule.over.passed(decisions, elapsed_s))
            return _between(schedule.start, schedule.end, part)
        case Exponential():
            return _between(schedule.start, schedule.end, 1.0 - 0.5 ** schedule.half_life.passed(decisions, elapsed_s))
    return schedule


def ends(schedule: Schedule | float) -> tuple[float, float]:
    """Between which two numbers a strength stays."""
    match schedule:
        case Constant():
            return schedule.value, schedule.value
        case Linear() | Exponential():
            return schedule.start, schedule.end
    return schedule, schedule


def _between(start: float, end: float, part: float) -> float:
    """Mix with weights, so that `part` 0 and 1 give the ends exactly."""
    return min(max(start, end), max(min(start, end), (1.0 - part) * start + part * end))
