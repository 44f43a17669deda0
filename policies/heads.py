"""Network outputs to target distributions. Pure, vectorised over the batch.

Invariant: a row of the result is a distribution (or a row of values, for a greedy head), or it is marked faulty.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from policies.types import Bools, Floats, HeadKind, Target

# How far the sum of a `probabilities` head may be from one: float32 softmax over 65,536 actions stays within.
SUM_TOLERANCE = 1e-3


def target(outputs: npt.NDArray[np.floating], head: HeadKind, temperature: float | None = None) -> Target:
    """Read the network's `outputs` [B, n] as the distribution that the head declares.

    q_values: greedy; with `temperature` T > 0, softmax(q / T).
    logits: softmax(logits / T), T = 1 unless given.
    probabilities: as they are, renormalised in float64.
    action: rows that `index_rows` made, one-hot: all mass on that action. Any other row is faulty.
    """
    values = outputs.astype(np.float64)
    faulty: Bools = ~np.all(np.isfinite(values), axis=1)
    if faulty.any():
        values[faulty] = 0.0
    if head == "probabilities":
        return _probabilities(values, faulty)
    if head == "action":
        return _certain(values, faulty)
    if head == "q_values" and temperature is None:
        return Target(values, greedy=True, faulty=faulty)
    return Target(_softmax(values / (1.0 if temperature is None else temperature)), greedy=False, faulty=faulty)


def index_rows(indices: npt.NDArray[np.generic], n: int) -> npt.NDArray[np.float32]:
    """Turn the output of a network that answers with an action index into rows like every other head's, [B, n].

    indices: [B] or [B, 1], integers of any width or floats. A row is one-hot, or NaN where the number is not an index
    of the space: out of range, fractional, not finite.
    """
    numbers = indices.reshape(len(indices)).astype(np.float64)
    known = (numbers == np.floor(numbers)) & (numbers >= 0) & (numbers < n)  # False for NaN and infinity
    rows = np.where(known[:, None], np.float32(0), np.float32(np.nan)) * np.ones(n, dtype=np.float32)
    (at,) = np.nonzero(known)
    rows[at, numbers[at].astype(np.int64)] = 1.0
    return np.asarray(rows, dtype=np.float32)


def _certain(values: Floats, faulty: Bools) -> Target:
    """All mass on one action: such a network names no second-best, so where its action is masked no mass is left."""
    one_hot = ((values == 0.0) | (values == 1.0)).all(axis=1) & (values.sum(axis=1) == 1.0)
    faulty = faulty | ~one_hot
    values[faulty] = 0.0
    return Target(values, greedy=False, faulty=faulty)


def _probabilities(values: Floats, faulty: Bools) -> Target:
    total = values.sum(axis=1)
    faulty = faulty | np.any(values < 0, axis=1) | (np.abs(total - 1.0) > SUM_TOLERANCE)
    values[faulty] = 0.0
    return Target(values / np.where(faulty, 1.0, total)[:, None], greedy=False, faulty=faulty)


def _softmax(logits: Floats) -> Floats:
    weights = np.exp(logits - logits.max(axis=1, keepdims=True))
    return np.asarray(weights / weights.sum(axis=1, keepdims=True), dtype=np.float64)
