"""What Prometheus is told of rollouts: names, and a rollout turned into gauges. Part of `metrics.py`'s registry."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge

if TYPE_CHECKING:
    from shadow.evidence import Shown
    from shadow.rollout import Standing

BOUNDS = ("estimate", "lower", "upper", "margin")
Series = set[tuple[Gauge, tuple[str, ...]]]


class RolloutMetrics:
    """The series of all policies of a process. Those of a rollout go when it has ended."""

    def __init__(self, registry: CollectorRegistry) -> None:
        def gauge(name: str, text: str, *labels: str) -> Gauge:
            return Gauge(f"surefoot_rollout_{name}", text, ["policy", "version", *labels], registry=registry)

        self._stage = gauge("stage", "Where a rollout stands (1).", "stage")
        self._weight = gauge("weight", "The share of units that its version decides.")
        self._paused = gauge("paused", "Whether it waits for a person (1) or not (0).")
        self._units = gauge("units", "Units of the step that count, by the version that was assigned.")
        self._guard = gauge("guard", "Version less champion, by guard: estimate, bounds, margin.", "guard", "bound")
        self._mismatched = gauge("mismatched", "Whether units are not assigned as routing means to (1) or are (0).")
        self.moves = Counter(
            "surefoot_rollout_moves",
            "What rollouts did by themselves.",
            ["policy", "version", "move"],
            registry=registry,
        )
        self._told: dict[str, Series] = {}

    def tell(self, policy: str, standing: Standing, shown: Shown | None) -> None:
        """Bring a policy's series up to date. shown: what the leader said last of this step; None: nothing yet."""
        now: Series = set()

        def put(gauge: Gauge, value: float, *labels: str) -> None:
            gauge.labels(policy, *labels).set(value)
            now.add((gauge, (policy, *labels)))

        if standing.under_way:
            put(self._stage, 1, standing.version, standing.stage.value)
            put(self._weight, standing.weight, standing.version)
            put(self._paused, bool(standing.paused or standing.proposal), standing.version)
        if standing.under_way and shown is not None:
            put(self._units, shown.units.challenger, standing.version)
            put(self._units, shown.units.champion, standing.champion)
            put(self._mismatched, shown.ratio.mismatched, standing.version)
            for name, reading in shown.guards.items():
                for bound in BOUNDS:
                    put(self._guard, getattr(reading, bound), standing.version, name, bound)
        for gauge, labels in self._told.get(policy, set()) - now:
            gauge.remove(*labels)
        self._told[policy] = now
