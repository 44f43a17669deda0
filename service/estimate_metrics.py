"""What Prometheus is told of estimates: names, and a view turned into gauges. Part of `metrics.py`'s registry."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Gauge

if TYPE_CHECKING:
    from service.estimate_tallies import Told, View  # loads numbers: what only names metrics need not


class EstimateMetrics:
    """The series of all policies of a process: for each version two or three methods, and what all share."""

    def __init__(self, registry: CollectorRegistry) -> None:
        def gauge(name: str, text: str, *labels: str) -> Gauge:
            return Gauge(f"surefoot_estimate_{name}", text, ["policy", *labels], registry=registry)

        by_method = ("version", "method")
        self._by_method = {
            "value": gauge("value", "What a version would be worth, had it decided; NaN: not known yet.", *by_method),
            "lower": gauge("lower", "Its lower bound, valid at any time.", *by_method),
            "upper": gauge("upper", "Its upper bound, valid at any time.", *by_method),
        }
        self._by_version = {
            "effective_n": gauge("effective_n", "Decisions or episodes that its estimate is worth.", "version"),
            "unsupported": gauge("unsupported", "Share of what it does that the log could never do.", "version"),
        }
        self._share = gauge("share", "Share of units that is estimated, for want of time or memory.")
        self._told: dict[str, set[tuple[Gauge, tuple[str, ...]]]] = {}

    def tell(self, policy: str, view: View | None) -> None:
        """Bring a policy's series up to date; None: there is nothing to tell any more."""
        series: set[tuple[Gauge, tuple[str, ...]]] = set()
        if view is not None:
            self._share.labels(policy).set(view.share)
            series.add((self._share, (policy,)))
            for told in view.versions.values():
                series |= self._version(policy, told)
        for gauge, labels in self._told.get(policy, set()) - series:
            gauge.remove(*labels)
        self._told[policy] = series

    def _version(self, policy: str, told: Told) -> set[tuple[Gauge, tuple[str, ...]]]:
        series: set[tuple[Gauge, tuple[str, ...]]] = set()
        for estimate in told.estimates.methods:
            for name, gauge in self._by_method.items():
                labels = policy, told.version, estimate.method
                gauge.labels(*labels).set(_number(getattr(estimate, name)))
                series.add((gauge, labels))
        for name, gauge in self._by_version.items():
            gauge.labels(policy, told.version).set(_number(getattr(told.estimates.support, name)))
            series.add((gauge, (policy, told.version)))
        return series


def _number(value: float | None) -> float:
    return math.nan if value is None else value
