"""The workers of one `surefoot serve`, as one of them sees them: which place it has, and the boards of all.

Duty: what the parent tells a worker on its command line, and what metrics and readiness ask of it. A worker that is
alone has no boards, and its metrics are as if this file were not there.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

import prometheus_client.values
from prometheus_client import CollectorRegistry

from service.boards import Board, value_on
from service.merging import key_of, kind_of, merged_registry
from service.metrics import Metrics

REFRESH_S: Final = 1.0


@dataclass(frozen=True, slots=True)
class Team:
    """Invariant: place < size; boards are empty, or one for each place."""

    place: int = 0
    restarts: int = 0  # how often this place has had a new worker
    boards: tuple[Board, ...] = field(default=())

    @classmethod
    def of(cls, arguments: list[str]) -> Team:
        """Read what the parent says (`crew.py`): place, restarts, descriptors of boards. Count on the own board."""
        place, restarts, *descriptors = map(int, arguments)
        team = cls(place, restarts, tuple(map(Board, descriptors)))
        if team.boards:
            team.mine.own()
            # How the library wants it told, before the first metric is made: it asks for the class by this name.
            prometheus_client.values.ValueClass = value_on(team.mine, key_of, kind_of)
        return team

    @property
    def size(self) -> int:
        return len(self.boards) or 1

    @property
    def mine(self) -> Board:
        """The board of this worker, where there are several."""
        return self.boards[self.place]

    @property
    def others(self) -> list[Board]:
        return [board for place, board in enumerate(self.boards) if place != self.place]

    @property
    def serving(self) -> int:
        """How many workers serve, this one included."""
        return sum(board.serving for board in self.boards) if self.boards else 1

    def serve(self, metrics: Metrics) -> None:
        """Say that this worker has started."""
        metrics.workers.set(1)
        metrics.worker_restarts.set(self.restarts)
        if self.boards:
            self.mine.serve()

    def leave(self) -> None:
        """Let what this worker has counted stand: to be called while its metrics are still there."""
        if self.boards:
            self.mine.leave()

    async def registry(self, own: CollectorRegistry) -> CollectorRegistry:
        """Give the metrics of all. Raises NotReady."""
        return await merged_registry(own, self.boards) if self.boards else own

    async def refresh(self, measure: Callable[[], None]) -> None:
        """Measure again and again what another worker may be asked for. For ever."""
        while True:
            if self.boards:
                measure()
            await asyncio.sleep(REFRESH_S)
