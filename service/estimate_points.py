"""Steps of continuous actions for the estimators: ratios of densities, and what a point cannot do. Pure; loads scipy.

Duty: as `estimate_rows.py`, for points in a box. Strategy: a ratio exists where both sides measure alike, and the
formulas need no more than the ratio. Without noise a log goes to one point, and a shadow's own point between the ends
of the box is where a log with a density never goes: neither is supported by the other.
Promise: what the record does not settle has no propensity, and then the step counts as not known.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from policies.continuous import Gaussian, Transform, behave, log_propensity_at
from service.estimate_rows import Said, Seen
from shadow.rows import Step


def own_point(step: Step, row: Seen) -> Step:
    """w of a point: π_M without noise over what it was drawn from; never above 1/(1-ε)."""
    record = row.record
    if record.log_propensity is None or record.epsilon >= 1.0:
        return step
    if record.fallback is not None or record.epsilon <= 0.0 or not record.sigma:
        return _with_ratio(step, 0.0)
    size = len(row.action)
    bounds, target, box = (np.frombuffer(each, "<f8") for each in (record.bounds, record.target, row.mask))
    if len(bounds) != 2 * size or len(target) != 2 * size or len(box) != 2 * size:
        return step
    said = Gaussian(target[None, :size], target[None, size:], np.zeros(1, np.bool_))
    transform = Transform(record.transform, bounds[:size], bounds[size:])  # type: ignore[arg-type]
    low, high = box[None, :size], box[None, size:]
    own = behave(said, transform, (low, high), np.zeros(1), None, np.zeros((1, size)))
    log_own = float(log_propensity_at(own, np.array([row.action]))[0][0])
    if math.isnan(log_own):
        return step
    return _with_ratio(step, min(log_own - record.log_propensity, -math.log1p(-record.epsilon)))


def shadow_point(step: Step, row: Seen, score: Said, champion: tuple[str, str]) -> Step:
    """A point's ratio, where both measures are alike; what a point without noise could not do is not supported."""
    record, log_b = row.record, row.record.log_propensity
    if log_b is None or (score.log_probability is None and score.probability != 0.0):
        return step
    sure = _certain(row)
    lost = _beyond(row, score) if sure is not None else None
    if sure is None or lost is None:
        return step
    found = _with_ratio(step, -math.inf if score.log_probability is None else score.log_probability - log_b)
    mass = score.probability or 0.0
    found = replace(found, unsupported=min(max(1.0 - mass, 0.0), 1.0) if sure else lost)
    if (record.version, record.digest) != champion:
        return found
    disagrees = not score.agrees
    return replace(found, disagrees=disagrees, matched=disagrees and found.target == 1.0)


def _certain(row: Seen) -> bool | None:
    """Whether the log had one point to go to; None: in some coordinates, and then nothing can be said."""
    record, size = row.record, len(row.action)
    if record.fallback is not None:
        return True
    box, target = np.frombuffer(row.mask, "<f8"), np.frombuffer(record.target, "<f8")
    if len(box) != 2 * size or len(target) != 2 * size:
        return None
    noise = np.frombuffer(record.sigma, "<f8") if record.sigma and record.epsilon > 0.0 else np.zeros(size)
    free = box[:size] < box[size:]
    sure = (target[size:] == 0.0) & (noise == 0.0) & free
    return True if bool(sure[free].all()) else None if bool(sure.any()) else False


def _beyond(row: Seen, score: Said) -> float | None:
    """Mass of a shadow's own atoms between the ends of the box, where a log with a density has none."""
    size = len(row.action)
    target, box = np.frombuffer(score.target, "<f8"), np.frombuffer(row.mask, "<f8")
    point = score.proposed if isinstance(score.proposed, list) else [score.proposed]
    if len(target) != 2 * size or len(box) != 2 * size or len(point) != size:
        return None
    inside = (np.array(point) > box[:size]) & (np.array(point) < box[size:])
    atom = bool(((target[size:] == 0.0) & inside).any())
    return 1.0 if atom and score.log_probability is None else 0.0


def _with_ratio(step: Step, log_w: float) -> Step:
    """Probabilities with a given ratio: the formulas need no more of a point."""
    target, propensity = math.exp(min(log_w, 0.0)), math.exp(-max(log_w, 0.0))
    return replace(step, target=target, propensity=max(propensity, 1e-300))
