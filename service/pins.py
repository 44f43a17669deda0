"""Which version an episode began on: a bounded memory of this worker. Pure but for what it remembers.

Invariant: len(self) <= capacity; the least recently used episode is forgotten first, and its next step is assigned
anew by the hash, which gives the same version unless weights changed meanwhile.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

from policies.route import Assignment

# 100,000 episodes of some 300 bytes: 30 MB at most.
CAPACITY = 100_000


@dataclass(slots=True)
class Pin:
    """An episode's assignment, and the version its last step ran on."""

    assignment: Assignment
    last_version: str


class Pins:
    """Episodes by id, least recently used first."""

    def __init__(self, capacity: int = CAPACITY) -> None:
        self._capacity = capacity
        self._pins: OrderedDict[str, Pin] = OrderedDict()

    def __len__(self) -> int:
        return len(self._pins)

    def get(self, episode: str) -> Pin | None:
        pin = self._pins.get(episode)
        if pin is not None:
            self._pins.move_to_end(episode)
        return pin

    def put(self, episode: str, assignment: Assignment) -> Pin:
        """Pin an episode that is not pinned yet."""
        if len(self._pins) >= self._capacity:
            self._pins.popitem(last=False)
        pin = self._pins[episode] = Pin(assignment, assignment.version)
        return pin

    def forget(self, episode: str) -> None:
        """Drop the pin of an episode that has ended."""
        self._pins.pop(episode, None)
