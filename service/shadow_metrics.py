"""What Prometheus is told of shadows: names, and sums turned into counters. Part of `metrics.py`'s registry."""

from __future__ import annotations

from collections import Counter as Counts
from collections.abc import Callable
from typing import TYPE_CHECKING, Final, get_args

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.metrics import MetricWrapperBase

from shadow.totals import Drop

if TYPE_CHECKING:
    from shadow.runner import Statistics  # opens networks: what only names metrics need not

OF = ("policy", "version")
STREAM: Final = "stream"  # scored, and not written
OVERLOAD: Final = "overload"  # not shown: callers wait


class ShadowMetrics:
    """The series of all shadows of a process."""

    def __init__(self, registry: CollectorRegistry, buckets: tuple[float, ...]) -> None:
        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"surefoot_shadow_{name}", text, [*OF, *labels], registry=registry)

        def gauge(name: str, text: str) -> Gauge:
            return Gauge(f"surefoot_shadow_{name}", text, OF, registry=registry)

        self._counters = {
            "scored": counter("scored", "Decisions that a shadow has scored."),
            "agreed": counter("agreed", "Of them: it would have done the same."),
            "overridden": counter("overridden", "Of them: rules forbid what it would have done."),
            "fallen": counter("fallbacks", "Of them: it would have answered with its fallback."),
            "divergence": counter("divergence", "Sum of how far it was from the version that decided, 0 to 1 each."),
            "faults": counter("faults", "Calls of its network that failed."),
        }
        self._drops = counter("drops", "Decisions that it did not score, or whose score was not written.", "reason")
        self._duration = Histogram(
            "surefoot_shadow_duration_seconds", "One call of its network.", OF, buckets=buckets, registry=registry
        )
        self._waiting = gauge("waiting", "Decisions that wait for it.")
        self._lag = gauge("lag_seconds", "Age of the oldest decision that waits for it.")
        self._share = gauge("share", "Share of decisions that it keeps, for want of time.")
        self._open = gauge("breaker_open", "Whether its breaker, or a failure to open it, has stopped it (1) or not.")
        self._told: dict[tuple[str, str], dict[str, float]] = {}
        self._told_drops: dict[tuple[str, str], Counts[Drop]] = {}

    def called(self, policy: str, version: str) -> Callable[[float], None]:
        """Give what is to be told the duration of each call, from any thread."""
        return self._duration.labels(policy, version).observe

    def unwritten(self, policy: str, version: str, count: int) -> None:
        """Count scores that did not get to Redis."""
        self._drops.labels(policy, version, STREAM).inc(count)

    def unshown(self, policy: str, version: str, count: int) -> None:
        """Count decisions that nobody had the time to show."""
        self._drops.labels(policy, version, OVERLOAD).inc(count)

    def tell(self, policy: str, version: str, now: Statistics) -> None:
        """Bring a shadow's series up to date. Sums of a new runner go on from zero."""
        told = self._told.setdefault((policy, version), {})
        for name, counter in self._counters.items():
            total = float(getattr(now.totals, name))
            counter.labels(policy, version).inc(max(0.0, total - told.get(name, 0.0)))
            told[name] = total
        before = self._told_drops.setdefault((policy, version), Counts())
        for reason, count in dict(now.totals.dropped).items():
            self._drops.labels(policy, version, reason).inc(max(0, count - before[reason]))
            before[reason] = count
        self._waiting.labels(policy, version).set(now.waiting_rows)
        self._lag.labels(policy, version).set(now.lag_s)
        self._share.labels(policy, version).set(now.share)
        self._open.labels(policy, version).set(now.status in ("tripped", "failed"))

    def forget(self, policy: str, version: str) -> None:
        """Drop the series of a shadow that is none any more."""
        self._told.pop((policy, version), None)
        self._told_drops.pop((policy, version), None)
        for metric in (*self._counters.values(), self._duration, self._waiting, self._lag, self._share, self._open):
            _remove(metric, policy, version)
        for reason in (*get_args(Drop), STREAM, OVERLOAD):
            _remove(self._drops, policy, version, reason)


def _remove(metric: MetricWrapperBase, *labels: str) -> None:
    try:
        metric.remove(*labels)
    except KeyError:  # it stands only once something was told
        return
