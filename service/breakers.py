"""The breakers of one policy's versions, as its pipeline uses them.

Duty: ask a version's breaker before its network is called, tell it what the call did, keep it while the same content
stays loaded, and agree with the control state about trips. What opens and closes is decided in `safety/breaker.py`.
Promise: a trip acts on the next call here, before anybody is told.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

import numpy as np

from safety.breaker import Action, Breaker, Counts, Faults, Latency
from service.clock import Clock
from service.plan import Group, LoadedVersion, Plan


@dataclass(slots=True)
class _Kept:
    """A breaker and the content that it watches."""

    digest: str
    breaker: Breaker


class Breakers:
    """One breaker for each loaded version."""

    def __init__(self, clock: Clock, tripped: Callable[[str, str], None]) -> None:
        """tripped: told policy and label when a version trips here; it must not block."""
        self._clock = clock
        self._tell = tripped
        self._kept: dict[str, _Kept] = {}
        self._tripped: frozenset[str] = frozenset()  # what the control state says

    def admits(self, version: LoadedVersion) -> bool:
        """Whether a version may be asked. Call once for each call of its network."""
        return self._of(version).admits(self._clock.monotonic_s())

    def able(self, plan: Plan, label: str) -> bool:
        """Whether a version could stand in: its breaker is closed, or it has seen nothing yet."""
        breaker = self._of(plan.versions[label])
        return breaker.faults is Faults.CLOSED and breaker.latency is not Latency.OPEN

    def observe(self, group: Group) -> bool:
        """Count a call that was made. Gives whether the baseline should be timed on the same rows."""
        bundle, now_s = group.version.bundle, self._clock.monotonic_s()
        if group.failure == "session_reopening":
            return False  # the network was not asked
        fault = group.failure is not None or _faulty(group)
        slow = group.infer_s * 1000 > bundle.latency_budget_ms
        last = bundle.version == group.plan.baseline  # nothing better is left: its slowness opens nothing
        if last and not fault:
            self.observe_baseline(slow)
        breaker = self._of(group.version)
        if breaker.observe(now_s, fault=fault, slow=slow and not last) is Action.PUBLISH:
            self._tell(bundle.policy, bundle.version)
        return breaker.wants_baseline

    def observe_baseline(self, slow: bool) -> None:
        """Count a call of the baseline against its own budget."""
        for kept in self._kept.values():
            kept.breaker.observe_baseline(self._clock.monotonic_s(), slow=slow)

    def follow(self, tripped: Collection[str]) -> None:
        """Do as the control state says: trip what others saw trip, re-arm what an operator took off the list."""
        now = frozenset(tripped)
        for label, kept in self._kept.items():
            if label in now:
                kept.breaker.trip()
            elif label in self._tripped:
                kept.breaker.rearm()
        self._tripped = now

    def keep(self, versions: Collection[LoadedVersion]) -> None:
        """Forget the breakers of versions that are not loaded any more."""
        labels = {version.bundle.version for version in versions}
        self._kept = {label: kept for label, kept in self._kept.items() if label in labels}

    def view(self) -> dict[str, Counts]:
        return {label: kept.breaker.counts for label, kept in self._kept.items()}

    def _of(self, version: LoadedVersion) -> Breaker:
        label, digest = version.bundle.version, version.bundle.digest
        kept = self._kept.get(label)
        if kept is None or kept.digest != digest:
            kept = self._kept[label] = _Kept(digest, Breaker(open=label in self._tripped))
        return kept.breaker


def _faulty(group: Group) -> bool:
    """Whether the network gave something that is no answer, for a state of the kind that it was trained on."""
    if group.outputs is None or np.isfinite(group.outputs).all():
        return False
    known = group.version.bundle.observation.within(group.states)
    return bool((~np.isfinite(group.outputs).all(axis=1) & known).any())
