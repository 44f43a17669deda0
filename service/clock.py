"""Time as an argument: everything that needs a clock is given one.

Two kinds, never mixed: `monotonic_s` for durations and deadlines, `event_ms` for the time that an event is
stamped with. Promise: `event_ms` never goes back within a process, even when the wall clock does, so that
"shipped through t" stays true once it has been said.
"""

from __future__ import annotations

import time
from typing import Protocol


class Clock(Protocol):
    def event_ms(self) -> int:
        """Wall-clock milliseconds since the epoch, never smaller than the last answer."""

    def monotonic_s(self) -> float:
        """Seconds of a clock that only measures durations."""


class SystemClock:
    """The machine's clocks. One per process; not for use from several threads."""

    def __init__(self) -> None:
        self._last_ms = 0

    def event_ms(self) -> int:
        self._last_ms = max(self._last_ms, time.time_ns() // 1_000_000)
        return self._last_ms

    def monotonic_s(self) -> float:
        return time.monotonic()


class ManualClock:
    """A clock that a test moves by hand."""

    def __init__(self, start_ms: int = 1_800_000_000_000) -> None:
        self.now_ms = start_ms

    def advance(self, ms: int) -> None:
        self.now_ms += ms

    def event_ms(self) -> int:
        return self.now_ms

    def monotonic_s(self) -> float:
        return self.now_ms / 1000
