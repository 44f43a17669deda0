"""Which version an episode began on: a bounded memory of this worker.

Invariant: len(pins) <= capacity; the least recently used episode is forgotten first, and its next step is assigned
anew by the hash, which gives the same version unless weights changed meanwhile.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

from policies.route import Assignment

# 100,000 episodes of some 300 bytes: 30 MB at most.
CAPACITY = 100_000


@dataclass(slots=True)
class _Pin:
    assignment: Assignment
    decided: str = ""  # the version that decided the last step, which need not be the assigned one


class Pins:
    """Assignments by episode, least recently used first."""

    def __init__(self, capacity: int = CAPACITY) -> None:
        self._capacity = capacity
        self._pins: OrderedDict[str, _Pin] = OrderedDict()

    def __len__(self) -> int:
        return len(self._pins)

    def get(self, episode: str) -> Assignment | None:
        pin = self._pins.get(episode)
        if pin is None:
            return None
        self._pins.move_to_end(episode)
        return pin.assignment

    def put(self, episode: str, assignment: Assignment) -> None:
        """Pin an episode, or pin it anew."""
        pin = self._pins.get(episode)
        if pin is not None:
            pin.assignment = assignment
            return
        if len(self._pins) >= self._capacity:
            self._pins.popitem(last=False)
        self._pins[episode] = _Pin(assignment)

    def decided(self, episode: str, version: str) -> bool:
        """Note which version decides a step. Gives whether another one decided the step before, as far as is known."""
        pin = self._pins.get(episode)
        if pin is None:
            return False
        before, pin.decided = pin.decided, version
        return before not in ("", version)
