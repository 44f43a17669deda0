"""Boxes over continuous actions. Pure, total: every input gives a box, an empty one where nothing is left."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from policies.types import Floats

Bounds = tuple[Sequence[float], Sequence[float]] | None  # low and high that a caller allows; None: all


def request_box(allowed: Sequence[Bounds], size: int) -> tuple[Floats, Floats] | None:
    """Bound by the callers' `allowed_actions`, low and high, float64 [B, D], or None when no row names any.

    NaN allows nothing: it is refused at the edge, and here it is merely harmless.
    """
    if all(row is None for row in allowed):
        return None
    low, high = np.full((len(allowed), size), -np.inf), np.full((len(allowed), size), np.inf)
    for index, row in enumerate(allowed):
        if row is not None:
            low[index], high[index] = row
    return np.where(np.isnan(low), np.inf, low), np.where(np.isnan(high), -np.inf, high)
