"""What clients wrote down: `issued` before each call, `acked` after it. The ground that the oracle stands on.

Duty: values only. An act is known by its (episode, step), which the client chose, since a call that is never answered
has no other name; a reward by its decision. The process that holds a journal is never faulted.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import Any

Token = tuple[str, int]  # episode, step


@dataclass(slots=True)
class Act:
    request: dict[str, Any]
    sent_s: float  # monotonic, as `here_s`
    answer: dict[str, Any] | None = None  # of a 200
    here_s: float = 0.0

    @property
    def acked(self) -> bool:
        """Whether the answer says that the decision is kept."""
        return self.answer is not None and bool(self.answer["logged"])


@dataclass(slots=True)
class Reward:
    value: float
    statuses: list[str] = field(default_factory=list)  # of each 202
    others: set[float] = field(default_factory=set)  # values that were sent, too, and must not take effect

    @property
    def acked(self) -> bool:
        return bool(self.statuses)


@dataclass(frozen=True, slots=True)
class Failure:
    """A call that got no 2xx."""

    path: str
    status: int  # 0: the connection broke
    code: str
    at_s: float  # monotonic
    retry_after: str | None = None


@dataclass
class Journal:
    """Written by many threads; each key by one of them only."""

    acts: dict[Token, Act] = field(default_factory=dict)
    rewards: dict[str, Reward] = field(default_factory=dict)
    failures: list[Failure] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def answered(self) -> int:
        """How many acts have had a 200."""
        with self.lock:
            return sum(act.answer is not None for act in self.acts.values())

    def between(self, start_s: float, end_s: float) -> list[Act]:
        """Acts that were sent and answered within these times."""
        with self.lock:
            return [act for act in self.acts.values() if act.answer and start_s <= act.sent_s and act.here_s <= end_s]

    def failed(self, path: str = "") -> list[Failure]:
        with self.lock:
            return [each for each in self.failures if each.path.startswith(path)]
