"""What a shadow has come to so far: sums over the rows that it has scored. Pure.

Duty: add comparisons, give what operators look at. Means are over scored rows, as they came: a row that stands for
several (share below 1) counts once. Estimates weigh rows; these figures do not.
"""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from shadow.compare import Compared

Drop = Literal["shed", "tripped", "memory", "internal", "closed"]
RECENT_CALLS = 1_000


@dataclass(slots=True)
class Totals:
    """Sums. Each `…_of`: over how many rows, where not all have such a number."""

    scored: int = 0
    agreed: int = 0
    overridden: int = 0
    fallen: int = 0
    faulty: int = 0
    divergence: float = 0.0
    kl: float = 0.0
    kl_of: int = 0
    w2: float = 0.0
    w2_of: int = 0
    difference: float = 0.0
    difference_of: int = 0
    unsupported: int = 0  # rows whose executed action tells nothing about the shadow
    calls: int = 0
    faults: int = 0  # calls
    dropped: Counter[Drop] = field(default_factory=Counter)
    recent_s: deque[float] = field(default_factory=lambda: deque(maxlen=RECENT_CALLS))  # per row, one for each call

    def add(self, compared: Compared, faulty: int) -> None:
        """Add a comparison of which so many rows have no usable answer."""
        self.scored += len(compared.agrees)
        self.faulty += faulty
        self.agreed += int(compared.agrees.sum())
        self.overridden += int(compared.overridden.sum())
        self.fallen += int(compared.fallen.sum())
        self.unsupported += int(np.isnan(compared.log_probability).sum())
        self.divergence += float(compared.divergence.sum())
        for name in ("kl", "w2", "difference"):
            numbers = getattr(compared, name)
            numbers = numbers[np.isfinite(numbers)]
            setattr(self, name, getattr(self, name) + float(numbers.sum()))
            setattr(self, f"{name}_of", getattr(self, f"{name}_of") + len(numbers))

    def call(self, seconds: float, rows: int, *, fault: bool) -> None:
        """Count one call of the network."""
        self.calls += 1
        self.faults += fault
        self.recent_s.append(seconds / max(rows, 1))

    def view(self) -> dict[str, Any]:
        """The same as rates and means; None where nothing was counted."""
        per_row = sorted(self.recent_s)
        return {
            "scored": self.scored,
            "agreement": _mean(self.agreed, self.scored),
            "override_rate": _mean(self.overridden, self.scored),
            "fallback_rate": _mean(self.fallen, self.scored),
            "fault_rate": _mean(self.faulty, self.scored),
            "divergence": _mean(self.divergence, self.scored),
            "kl": _mean(self.kl, self.kl_of),
            "w2": _mean(self.w2, self.w2_of),
            "difference": _mean(self.difference, self.difference_of),
            "no_ratio_rate": _mean(self.unsupported, self.scored),
            "calls": self.calls,
            "faults": self.faults,
            "latency_ms": {name: _quantile(per_row, q) for name, q in (("p50", 0.5), ("p99", 0.99))},
            "dropped": dict(self.dropped),
        }


def _mean(total: float, count: int) -> float | None:
    return total / count if count else None


def _quantile(ordered: list[float], q: float) -> float | None:
    """In milliseconds."""
    return round(ordered[min(len(ordered) - 1, int(q * len(ordered)))] * 1000, 4) if ordered else None
