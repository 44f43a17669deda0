"""How long to wait before trying again: exponential backoff with full jitter, up to a deadline. Pure.

Strategy: "full jitter" of Brooker, "Exponential Backoff And Jitter" (AWS Architecture Blog, 2015): a uniform draw
between zero and a bound that doubles. It spreads callers that one outage has synchronised better than a fixed schedule.
It knows neither a clock nor a network: time and chance are arguments.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field

# Not the seeded global generator: a program that seeds it must not thereby retry in step with its replicas.
chance: Callable[[], float] = random.SystemRandom().random


@dataclass(slots=True)
class Backoff:
    """The delays of one call. `deadline_s` is on the clock of `now_s`; None means never to give up."""

    deadline_s: float | None
    base_s: float = 0.05
    cap_s: float = 2.0
    jitter: Callable[[], float] = chance
    failures: int = field(default=0, init=False)

    def delay_s(self, now_s: float, at_least_s: float = 0.0) -> float | None:
        """Count a failure and say how long to wait, or None when the wait would end past the deadline.

        `at_least_s` is what the other side asked for (Retry-After); the jitter is added to it.
        """
        bound_s = min(self.cap_s, self.base_s * 2.0 ** min(self.failures, 32))
        self.failures += 1
        delay_s = at_least_s + self.jitter() * bound_s
        if self.deadline_s is not None and now_s + delay_s >= self.deadline_s:
            return None
        return delay_s
