"""Who waits for the join's verdict on which reward.

Duty: hand each verdict to the one who asked, once. Knows nothing of rewards or Redis. Bounded.
Promise: an entry is gone as soon as its waiter has its verdict or has given up.
"""

from __future__ import annotations

import asyncio

MAX_WAITERS = 10_000
UNKNOWN = "accepted"  # what is answered when nothing more is known


class Verdicts:
    def __init__(self, max_waiters: int = MAX_WAITERS) -> None:
        self._max_waiters = max_waiters
        self._waiters: dict[tuple[str, int], asyncio.Future[str]] = {}

    def __len__(self) -> int:
        return len(self._waiters)

    def expect(self, policy: str, seq: int) -> asyncio.Future[str]:
        """Give a future for the verdict on one event; done at once, with `accepted`, when too many wait."""
        future: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        if len(self._waiters) >= self._max_waiters:
            future.set_result(UNKNOWN)
            return future
        key = (policy, seq)
        self._waiters[key] = future
        future.add_done_callback(lambda done: self._forget(key, done))
        return future

    def resolve(self, policy: str, seq: int, verdict: str) -> None:
        future = self._waiters.get((policy, seq))
        if future is not None and not future.done():
            future.set_result(verdict)

    def _forget(self, key: tuple[str, int], future: asyncio.Future[str]) -> None:
        # A seq is given out again after a failed commit: the entry may be another's by now.
        if self._waiters.get(key) is future:
            del self._waiters[key]
