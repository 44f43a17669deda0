"""Episodes that come from another worker, or from before a restart: looked up before their batch is routed.

Duty: for rows of episodes that this worker does not know, or knows an older step of, take over what was kept of them:
the memory, if it follows, and the version that the episode began on. It knows nothing of Redis.
Strategy: one lookup for a batch, and none for a first step, for an episode that goes on here, or where no loaded
version remembers anything. A memory is taken over only by the very content that made it, in its size and type.
Promise: what cannot be found out is not guessed: the step starts from zeros, and its answer says so.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, Protocol

from service.clock import Clock
from service.memory import Kept, Memories
from service.pins import Pins
from service.plan import Plan, Row

Outcome = Literal["found", "unfit", "unknown", "unanswered"]


class Lookup(Protocol):
    async def get(self, episodes: Sequence[str]) -> list[Kept | None] | None:
        """Give what is kept of episodes, or None when that cannot be found out soon. Never raises."""


def remembers(plan: Plan) -> bool:
    """Whether any loaded version remembers episodes: one that does not decide now may be what an episode began on."""
    return any(version.bundle.interface.recurrent for version in plan.versions.values())


class Arrivals:
    """What comes to one policy of one worker."""

    def __init__(self, memories: Memories, lookup: Lookup, clock: Clock, count: Callable[[Outcome, int], None]) -> None:
        self._memories = memories
        self._lookup = lookup
        self._clock = clock
        self._count = count
        self._seen: tuple[Plan | None, bool] = None, False  # the last plan, and whether it remembers

    async def meet(self, plan: Plan, rows: Sequence[Row], pins: Pins) -> None:
        """Find out what can be found out of these rows' episodes. Never raises."""
        if self._seen[0] is not plan:
            self._seen = plan, remembers(plan)
        wanted = self._unknown(plan, rows, pins) if self._seen[1] else {}
        if not wanted:
            return
        found = await self._lookup.get(list(wanted))
        self._memories.doubt(wanted if found is None else ())
        if found is None:
            self._count("unanswered", len(wanted))
            return
        for (episode, step), kept in zip(wanted.items(), found, strict=True):
            self._count("unknown" if kept is None else self._take(plan, episode, step, kept, pins), 1)

    def _unknown(self, plan: Plan, rows: Sequence[Row], pins: Pins) -> dict[str, int | None]:
        """Episodes to look up, with the first step that is asked; later ones of the batch follow here."""
        first: dict[str, int | None] = {}
        for row in rows:
            if row.episode is not None:
                first.setdefault(row.episode, row.step)
        now_s = self._clock.monotonic_s()
        return {
            episode: step
            for episode, step in first.items()
            if self._memories.lacks(episode, step, now_s) and self._may_remember(plan, episode, pins)
        }

    def _may_remember(self, plan: Plan, episode: str, pins: Pins) -> bool:
        """Whether an episode may be on a version that remembers, as far as is known here."""
        pin = pins.get(episode)
        version = None if pin is None else plan.versions.get(pin.version)
        return version is None or bool(version.bundle.interface.recurrent)

    def _take(self, plan: Plan, episode: str, step: int | None, kept: Kept, pins: Pins) -> Outcome:
        now_s = self._clock.monotonic_s()
        adopted = _fits(plan, kept) and self._memories.adopt(episode, kept, step, now_s)
        # Where nothing was taken over, what is known here of the version may be newer. One that is not loaded is noted,
        # too: routing assigns anew, and the step says that the version was switched.
        if adopted or pins.get(episode) is None:
            pins.put(episode, kept.assignment)
            pins.decided(episode, kept.version)
        return "found" if adopted else "unfit"


def _fits(plan: Plan, kept: Kept) -> bool:
    """Whether a loaded version made this memory, and would take it."""
    for version in plan.versions.values():
        if version.bundle.digest == kept.digest:
            like = version.engine.first_memory(1)[0]
            return all(
                row is not None and (row.shape, row.dtype) == (like.shape, like.dtype)
                for row in (kept.before, kept.after)
            )
    return False
