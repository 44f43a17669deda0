"""Quantiles of latencies. Pure.

Duty: from seconds to the few numbers that are shown. numpy sorts; nothing is binned, so nothing is rounded.
Strategy: a quantile is a latency that somebody really met (the nearest rank above), not a mean of two.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class Latency:
    """Microseconds that so many requests took. All zero when there were none."""

    count: int = 0
    p50_us: float = 0.0
    p99_us: float = 0.0
    p999_us: float = 0.0
    max_us: float = 0.0

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Latency:
        """Summarise latencies in seconds."""
        if not len(seconds):
            return cls()
        found = np.quantile(np.asarray(seconds, dtype=np.float64), (0.5, 0.99, 0.999, 1.0), method="inverted_cdf") * 1e6
        return cls(len(seconds), *map(float, found))
