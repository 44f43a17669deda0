"""When to call Redis again after a call that it did not answer: exponential, with full jitter. Pure.

Duty: the arithmetic of waiting. Time is given. Knows nothing of what is called.
Promise: never longer than MAX_BACKOFF_S; workers that failed together do not return in step.
"""

from __future__ import annotations

from collections.abc import Callable

FIRST_BACKOFF_S = 0.02
MAX_BACKOFF_S = 1.0


class Backoff:
    def __init__(self, jitter: Callable[[], float]) -> None:
        self._jitter = jitter
        self._attempts = 0
        self.retry_s = float("-inf")  # not before this time
        self.away_since_s: float | None = None  # None: the last call was answered

    def answered(self) -> None:
        self._attempts = 0
        self.away_since_s = None

    def failed(self, now_s: float) -> bool:
        """Return whether this is the first failure after an answer."""
        first = self.away_since_s is None
        if first:
            self.away_since_s = now_s
        ceiling = min(MAX_BACKOFF_S, FIRST_BACKOFF_S * 2 ** min(self._attempts, 10))
        self._attempts += 1
        self.retry_s = now_s + ceiling * self._jitter()
        return first
