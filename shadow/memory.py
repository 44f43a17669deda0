"""What a recurrent shadow remembers of episodes: its own memory, which nobody else sees. Pure.

Duty: the memory before a step, for episodes that this shadow has watched from their first step on without a hole. Of
any other the memory is not what it would have been had the shadow decided: such rows are not scored.
Invariant: at most `most_bytes` are held, or one episode's; the longest unused goes first.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Memory = npt.NDArray[np.floating]  # [memory_size]
MOST_BYTES = 64 << 20
OVERHEAD_BYTES = 500


@dataclass(frozen=True, slots=True)
class _Step:
    number: int
    before: Memory
    after: Memory


class Episodes:
    """Memories by episode."""

    def __init__(self, most_bytes: int = MOST_BYTES) -> None:
        self._most_bytes = most_bytes
        self._steps: OrderedDict[str, _Step] = OrderedDict()
        self._bytes = 0

    def __len__(self) -> int:
        return len(self._steps)

    def before(self, episode: str | None, step: int | None, first: Memory) -> Memory | None:
        """Give the memory to take a step from; None where it is not known. first: of an episode that has not begun."""
        if episode is None or step is None:
            return None
        if step == 0:
            return first
        last = self._steps.get(episode)
        if last is None:
            return None
        if step == last.number:  # asked again
            return last.before
        return last.after if step == last.number + 1 else None

    def keep(self, episode: str, step: int, before: Memory, after: Memory) -> None:
        """Remember a step; one whose memory is not finite is forgotten, with its episode."""
        self.forget(episode)
        if not np.isfinite(after).all():
            return
        self._steps[episode] = _Step(step, before.copy(), after.copy())  # views would keep the batch alive
        self._bytes += _size(self._steps[episode])
        while len(self._steps) > 1 and self._bytes > self._most_bytes:
            self.forget(next(iter(self._steps)))

    def forget(self, episode: str) -> None:
        """Forget an episode, if it is known."""
        step = self._steps.pop(episode, None)
        if step is not None:
            self._bytes -= _size(step)


def _size(step: _Step) -> int:
    return OVERHEAD_BYTES + step.before.nbytes + step.after.nbytes


def waves(episodes: list[str | None]) -> list[list[int]]:
    """Rows in as few waves as hold each episode once at most, in their order."""
    found: list[list[int]] = []
    seen: dict[str, int] = {}
    for i, episode in enumerate(episodes):
        wave = 0 if episode is None else seen.get(episode, 0)
        if episode is not None:
            seen[episode] = wave + 1
        if wave == len(found):
            found.append([])
        found[wave].append(i)
    return found
