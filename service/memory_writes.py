"""Steps of episodes that wait to be written where other workers find them. Pure.

Duty: a bounded queue with one place for each episode, in which the newest wins. It knows nothing of Redis.
Promise: at most `most` writes wait, of `most_bytes` together, or a single one; whoever drops is told how many.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from service.memory import Kept

# For each policy. What waits is mostly memory that the worker holds anyway.
MOST_BYTES: Final = 32 << 20
MOST_WAITING: Final = 50_000
FORGETTING_BYTES: Final = 300


@dataclass(frozen=True, slots=True)
class Write:
    """What becomes of an episode. kept: None to forget it, if `last` was its last decision, or '' whichever was."""

    kept: Kept | None
    last: str = ""

    @property
    def bytes(self) -> int:
        return FORGETTING_BYTES if self.kept is None else self.kept.bytes


class Writes:
    """Writes that wait: the newest of each episode, in the order in which the episodes came."""

    def __init__(self, most: int = MOST_WAITING, most_bytes: int = MOST_BYTES) -> None:
        self._most, self._most_bytes = most, most_bytes
        self._waiting: dict[str, Write] = {}
        self.bytes = 0  # Invariant: the sum over _waiting, at most _most_bytes, or one write's

    def __len__(self) -> int:
        return len(self._waiting)

    def put_nowait(self, episode: str, kept: Kept) -> int:
        """Queue an episode's last step. Gives how many others were dropped for it, the oldest first."""
        return self._put(episode, Write(kept))

    def forget_nowait(self, episode: str, decision_id: str) -> int:
        """Queue that an episode is forgotten, if that decision was its last. Gives how many writes were dropped."""
        standing = self._waiting.get(episode)
        # A step that waits here, or did, is not known there: what is held there is of an earlier decision.
        unsent = standing is not None and (standing.kept is not None or not standing.last)
        return self._put(episode, Write(None, "" if unsent else decision_id))

    def take(self, most: int, most_bytes: int) -> dict[str, Write]:
        """Take the oldest writes: one at least, if there is one, then up to a limit."""
        taken: dict[str, Write] = {}
        size = 0
        for episode, write in self._waiting.items():
            size += write.bytes
            if taken and (len(taken) >= most or size > most_bytes):
                break
            taken[episode] = write
        for episode, write in taken.items():
            del self._waiting[episode]
            self.bytes -= write.bytes
        return taken

    def give_back(self, taken: dict[str, Write]) -> int:
        """Queue again, in front, what was taken and not written, where nothing newer waits. Gives how many drop out."""
        self._waiting = {**taken, **self._waiting}
        self.bytes = sum(write.bytes for write in self._waiting.values())
        return self._shrink()

    def clear(self) -> int:
        """Drop everything. Gives how much that was."""
        dropped = len(self._waiting)
        self._waiting, self.bytes = {}, 0
        return dropped

    def _put(self, episode: str, write: Write) -> int:
        standing = self._waiting.get(episode)
        self._waiting[episode] = write  # in the place of the one before: who steps often must not wait for ever
        self.bytes += write.bytes - (0 if standing is None else standing.bytes)
        return self._shrink()

    def _shrink(self) -> int:
        dropped = 0
        while len(self._waiting) > 1 and (len(self._waiting) > self._most or self.bytes > self._most_bytes):
            self.bytes -= self._waiting.pop(next(iter(self._waiting))).bytes
            dropped += 1
        return dropped
