"""States that no export has tried: corners of what training has seen, and random ones within it. Pure.

Duty: where the probes ask. It knows nothing of networks.
Strategy: a fixed seed, so that a report says the same twice; bounds before quantiles before golden states.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from policies.bundle import PolicyBundle
from policies.types import Feature

States = npt.NDArray[np.floating]

CORNERS = 14
RANDOM_STATES = 64


def seen_of(feature: Feature) -> tuple[float, float] | None:
    """What training has seen of a feature, as far as the manifest says: quantiles before bounds."""
    if feature.quantiles:
        return min(feature.quantiles.values()), max(feature.quantiles.values())
    if feature.low is not None and feature.high is not None:
        return feature.low, feature.high
    return None


def untried(bundle: PolicyBundle) -> Iterator[tuple[str, States]]:
    """States that nobody has tried: corners of the bounds, and random ones between them."""
    low, high = _box(bundle)
    shape, dtype = bundle.observation.shape, bundle.observation.dtype
    random = np.random.default_rng(0)
    corners = random.integers(0, 2, size=(CORNERS, low.size)).astype(np.bool_)
    chosen = np.vstack([low, high, np.where(corners, high, low)])
    yield "at corners of its bounds", chosen.astype(dtype).reshape(-1, *shape)
    inside = random.uniform(size=(RANDOM_STATES, low.size)) * (high - low) + low
    yield "at random states within its bounds", inside.astype(dtype).reshape(-1, *shape)


def _box(bundle: PolicyBundle) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """The box that training has seen, flat: low and high, else quantiles, else what golden states span."""
    seen = bundle.golden_states.reshape(len(bundle.golden_states), -1).astype(np.float64)
    low, high = seen.min(axis=0), seen.max(axis=0)
    for column, feature in enumerate(bundle.observation.features):
        known = seen_of(feature) or (low[column], high[column])
        below = known[0] if feature.low is None else feature.low
        above = known[1] if feature.high is None else feature.high
        if math.isfinite(below) and math.isfinite(above) and below <= above:
            low[column], high[column] = below, above
    return low, high
