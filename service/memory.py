"""What recurrent versions remember of episodes: a bounded memory of this worker, with a time to live.

    recall -> (the network's step) -> keep -> … -> forget

Duty: the memory before a step, and whether it fits the step; the least recently used episode goes first. It knows
nothing of networks or requests, and reads no clock: `now_s` is given.
Strategy: an entry holds the memory before and after its last step, so that asking for the same step again (a client
whose answer was lost) starts where the first did.
Invariant: the bytes held are at most `max_bytes`, or one episode's.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Row = npt.NDArray[np.floating]  # [memory_size]
# What an entry costs besides its numbers: two arrays' heads, names, places in two dictionaries. Measured.
OVERHEAD_BYTES = 800


class Recalled(NamedTuple):
    """The memory to start a step from. row: None for the memory of an episode that has not begun.

    reset: the caller is in the middle of an episode, and what it did before is not remembered here.
    """

    row: Row | None
    reset: bool


@dataclass(slots=True)
class _Entry:
    digest: str
    step: int | None
    before: Row
    after: Row | None  # None: the last step failed, and what comes after it is not known
    decision_id: str
    used_s: float

    @property
    def bytes(self) -> int:
        return OVERHEAD_BYTES + self.before.nbytes + (0 if self.after is None else self.after.nbytes)


class Memories:
    """Memories of one policy by episode, least recently used first."""

    def __init__(self, max_bytes: int, ttl_s: float) -> None:
        self._max_bytes = max_bytes
        self._ttl_s = ttl_s
        self._entries: OrderedDict[str, _Entry] = OrderedDict()
        self._episode_of: dict[str, str] = {}  # last decision of an episode -> the episode
        self._bytes = 0

    def __len__(self) -> int:
        return len(self._entries)

    def statistics(self) -> dict[str, int]:
        return {"episodes": len(self._entries), "bytes": self._bytes}

    def recall(self, episode: str, step: int | None, digest: str, now_s: float) -> Recalled:
        """Give the memory before `step` of an episode, as the version of that digest left it.

        Without a step (None) the episode goes on from wherever it is.
        """
        entry = self._fresh(episode, now_s)
        if step == 0:
            return Recalled(None, False)
        if entry is None:
            return Recalled(None, step is not None)
        if entry.digest != digest:
            return Recalled(None, True)
        if step is not None and step == entry.step:
            return Recalled(entry.before, False)
        fits = step is None or entry.step is None or step == entry.step + 1
        return Recalled(entry.after, False) if fits and entry.after is not None else Recalled(None, True)

    def keep(
        self,
        episode: str,
        step: int | None,
        digest: str,
        decision_id: str,
        before: Row,
        after: Row | None,
        now_s: float,
    ) -> None:
        """Remember an episode after a step. after: None when the step failed, or left numbers that are not finite."""
        if after is not None and not np.isfinite(after).all():
            after = None
        self._drop(episode)
        entry = _Entry(digest, step, before, after, decision_id, now_s)
        self._entries[episode] = entry
        self._episode_of[decision_id] = episode
        self._bytes += entry.bytes
        while len(self._entries) > 1 and (self._bytes > self._max_bytes or self._oldest_is_old(now_s)):
            self._drop(next(iter(self._entries)))

    def ended(self, decision_id: str) -> None:
        """Forget the episode whose last decision this was: the environment has ended it."""
        episode = self._episode_of.get(decision_id)
        if episode is not None:
            self._drop(episode)

    def _fresh(self, episode: str, now_s: float) -> _Entry | None:
        entry = self._entries.get(episode)
        if entry is not None and now_s - entry.used_s > self._ttl_s:
            self._drop(episode)
            return None
        return entry

    def _oldest_is_old(self, now_s: float) -> bool:
        return now_s - next(iter(self._entries.values())).used_s > self._ttl_s

    def _drop(self, episode: str) -> None:
        entry = self._entries.pop(episode, None)
        if entry is not None:
            self._bytes -= entry.bytes
            self._episode_of.pop(entry.decision_id, None)
