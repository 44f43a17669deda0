"""Which version an episode began on: a bounded memory of this worker.

Invariant: len(pins) <= capacity; the least recently used episode is forgotten first, and its next step is assigned
anew by the hash, which gives the same version unless weights changed meanwhile.
"""

from __future__ import annotations

from collections import OrderedDict

from policies.route import Assignment

# 100,000 episodes of some 300 bytes: 30 MB at most.
CAPACITY = 100_000


class Pins:
    """Assignments by episode, least recently used first."""

    def __init__(self, capacity: int = CAPACITY) -> None:
        self._capacity = capacity
        self._pins: OrderedDict[str, Assignment] = OrderedDict()

    def __len__(self) -> int:
        return len(self._pins)

    def get(self, episode: str) -> Assignment | None:
        pin = self._pins.get(episode)
        if pin is not None:
            self._pins.move_to_end(episode)
        return pin

    def put(self, episode: str, assignment: Assignment) -> None:
        if episode not in self._pins and len(self._pins) >= self._capacity:
            self._pins.popitem(last=False)
        self._pins[episode] = assignment
