"""A dry run of rules on a policy's recent decisions, in a running worker.

    rules readable? fit the policy? -> decisions out of Redis -> judged in chunks, newest first -> report

Duty: the order, and the bounds. What rules say of decisions is `dry_run.py`'s; where decisions lie, `recent.py`'s.
Strategy: all that computes runs in a thread, a chunk at a time, so that the event loop has its turn in between. The
rules in force are bound anew for it: what the pipeline uses is not for two threads.
Promise: one at a time in a worker, at most MOST_S of judging, and nothing is changed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from policies.errors import SurefootError, Unavailable
from service.clock import Clock
from service.dry_run import Trial
from service.dry_run_facts import Seen, Versions
from service.dry_run_report import Cut, Judged, Report, report
from service.plan import Plan
from service.recent import Recent, recent_decisions
from service.redis_streams import RedisStreams
from service.ruling import Ruling
from service.safeguards import fitting_rules

CHUNK: Final = 256
MOST_S: Final = 20.0


class Rehearsal:
    """The dry runs of one worker. Use from the event loop's thread only."""

    def __init__(self, streams: RedisStreams, clock: Clock) -> None:
        self._streams = streams
        self._clock = clock
        self._busy = asyncio.Lock()

    async def run(self, plan: Plan, in_force: str, source: str, last: int) -> Report:
        """Try rules on the `last` newest decisions of a policy. in_force: its `safety.yaml`; an empty text: no rules.

        Raises SafetyError naming line, column and field, InvalidField, StoreAway, and Unavailable while another runs.
        """
        if self._busy.locked():
            raise Unavailable("another dry run is under way in this worker; try again when it has ended")
        async with self._busy:
            tested = await asyncio.to_thread(_ruling, plan, source)
            recent = await recent_decisions(self._streams, plan.policy, last, Seen.of)
            scene = await asyncio.to_thread(_scene, plan, in_force, tested, recent)
            first, cut = await self._judge(scene)
            return await asyncio.to_thread(scene.report, first, "size" if recent.cut else cut)

    async def _judge(self, scene: _Scene) -> tuple[int, Cut | None]:
        """Judge from the newest on. Gives the first place that was judged, and what came in between."""
        until_s, first = self._clock.monotonic_s() + MOST_S, len(scene.decisions)
        while first > 0:
            if self._clock.monotonic_s() >= until_s:
                return first, "time"
            begin = max(0, first - CHUNK)
            await asyncio.to_thread(scene.judge, range(begin, first))
            first = begin
        return 0, None


@dataclass(frozen=True, slots=True)
class _Scene:
    """Decisions, and the two sets of rules that are tried on them."""

    policy: str
    versions: Versions
    decisions: Sequence[Seen]
    other_spaces: int
    in_force: Judged
    tested: Judged

    def judge(self, places: Sequence[int]) -> None:
        for each in (self.in_force, self.tested):
            each.trial.judge(places)

    def report(self, first: int, cut: Cut | None) -> Report:
        places = range(first, len(self.decisions))
        return report(
            self.policy,
            self.versions,
            self.decisions,
            places,
            self.in_force,
            self.tested,
            other_spaces=self.other_spaces,
            cut=cut,
        )


def _ruling(plan: Plan, source: str) -> Ruling | None:
    """Bind rules as a replacement of those in force would be. Raises SafetyError or InvalidField."""
    if not source:
        return None
    rules = fitting_rules(source, [version.bundle for version in plan.versions.values()])
    return Ruling.fitting(rules, plan.versions[plan.routes.champion].bundle)


def _scene(plan: Plan, source: str, tested: Ruling | None, recent: Recent[Seen]) -> _Scene:
    versions, in_force, refused = Versions(plan), None, None
    try:
        in_force = _ruling(plan, source)
    except SurefootError as error:
        refused = error.detail
    decisions = [each for each in recent.decisions if versions.fits(each)]
    return _Scene(
        policy=plan.policy,
        versions=versions,
        decisions=decisions,
        other_spaces=len(recent.decisions) - len(decisions),
        in_force=Judged(in_force, Trial(in_force, plan, versions, decisions), refused),
        tested=Judged(tested, Trial(tested, plan, versions, decisions)),
    )
