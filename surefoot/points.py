"""How likely logged points are under another policy, through the transform and the box they were logged with. Pure.

Duty: the numerator of an importance weight whose denominator is `Batch.log_propensities`. It knows nothing of streams.
Strategy: as design and service have it, coordinate by coordinate: at an end of the box the mass that projection gathers
there, between them the density of the raw draw over the slope of the transform.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from surefoot.batch import Batch, Floats

_LOG_SQRT_2PI = 0.5 * np.log(2.0 * np.pi)
_TANH_END = float(np.arctanh(1.0 - 2.0**-53))  # beyond it tanh rounds to 1


def log_prob(batch: Batch, mean: npt.ArrayLike, std: npt.ArrayLike) -> Floats:
    """Give the log of the probability or density of each executed action under another Gaussian policy, float64 [B].

    mean, std: [B, D] or what broadcasts to it, in the raw space of the logged network (before squash or unscale), for
    `batch.states`. The other policy is taken without exploration and behind the same transform and box, so that
    `exp(log_prob(batch, mean, std) - batch.log_propensities)` is the importance weight of each row. NaN where the
    fallback answered: no policy's distribution has a part in it.
    Raises ValueError for actions that are no points, and for deviations that are not positive.
    """
    if batch.action_kind != "continuous":
        raise ValueError(f"actions are {batch.action_kind}: use the probabilities themselves")
    mean, std = (np.broadcast_to(np.asarray(each, np.float64), batch.actions.shape) for each in (mean, std))
    if not (std > 0.0).all():
        raise ValueError("deviations must be positive: without one there is no density")
    from scipy.special import log_ndtr  # a large library, needed here alone

    low, high = (_inverse(batch, batch.boxes[:, end]) for end in (0, 1))
    # The draw itself where it is known in raw units, for tanh loses digits near its ends.
    z = np.where(batch.explored[:, None], _within_tanh(batch, _inverse(batch, batch.actions)), batch.raw_actions)
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        score = (z - mean) / std
        between = -0.5 * score * score - _LOG_SQRT_2PI - np.log(std) - _log_slope(batch, z)
        below, above = log_ndtr((low - mean) / std), log_ndtr((mean - high) / std)
    each = np.where(batch.at_bound < 0, below, np.where(batch.at_bound > 0, above, between))
    fixed = batch.boxes[:, 0] >= batch.boxes[:, 1]  # a side without width: all mass is there
    whole = np.where(fixed, 0.0, each).sum(axis=1)
    return np.where(batch.fallbacks == "", whole, np.nan)


def _kinds(batch: Batch) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
    """Rows without a transform, and rows with tanh, [B, 1] each."""
    return (batch.transforms == "none")[:, None], (batch.transforms == "tanh")[:, None]


def _inverse(batch: Batch, action: Floats) -> Floats:
    """Raw points that give these actions, [B, D]; infinite where none does."""
    none, tanh = _kinds(batch)
    low, high = batch.bounds[:, 0], batch.bounds[:, 1]
    with np.errstate(invalid="ignore", divide="ignore"):
        unit = (action - low) / (high - low) * 2.0 - 1.0
        unit = np.where(np.isnan(unit), 0.0, unit)
        return np.where(none, action, np.where(tanh, np.arctanh(np.clip(unit, -1.0, 1.0)), unit))


def _within_tanh(batch: Batch, z: Floats) -> Floats:
    _, tanh = _kinds(batch)
    return np.where(tanh, np.clip(z, -_TANH_END, _TANH_END), z)


def _log_slope(batch: Batch, z: Floats) -> Floats:
    """Log of the transform's slope at raw points, [B, D]."""
    none, tanh = _kinds(batch)
    with np.errstate(divide="ignore"):
        scale = np.log((batch.bounds[:, 1] - batch.bounds[:, 0]) * 0.5)
    size = np.abs(z)
    squash = np.where(tanh, 2.0 * (np.log(2.0) - size - np.log1p(np.exp(-2.0 * size))), 0.0)
    return np.where(none, 0.0, scale + squash)
